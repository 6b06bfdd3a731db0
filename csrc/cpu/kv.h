// The paged KV cache of one layer, and writing to it.
//
// float32 / float16 / bfloat16: elements rounded to nearest even. int8, per token and head, asymmetric:
//   scale = (max - min) / 255;  code = round((x - min) / scale), ties to even;  x ~ code * scale + min
// so |x - read| <= scale / 2 plus float32 rounding; a constant vector has scale 0 and comes back exact. A vector with
// NaN or infinity reads back as NaN.
#pragma once

#include <cstdint>

namespace qwen_rt {

enum class KvType { kFloat32, kFloat16, kBFloat16, kInt8 };

inline constexpr int64_t kv_element_bytes(KvType type) {
  return type == KvType::kFloat32 ? 4 : type == KvType::kInt8 ? 1 : 2;
}

struct KvPages {
  void* data;          // [num_blocks, heads, block, size]; each block contiguous, the next one block_rows rows on
  float *scale, *min;  // int8: [num_blocks, heads, block], alike; else null
};

struct KvLayer {
  KvType type;
  int64_t num_blocks, heads, block, size;
  int64_t block_rows;  // at least heads * block: what else is kept of a block (other layers, V beside K) may lie between
  KvPages k, v;

  // Row of a position: index into scale and min, and times `size` into data.
  int64_t row(int64_t block_id, int64_t head, int64_t offset) const {
    return block_id * block_rows + head * block + offset;
  }
};

// x [tokens, heads, size] -> pages, token t to slots[t] = block id * block + offset (distinct, in range).
void store_kv(const KvLayer& kv, const float* k, int64_t k_token_stride, int64_t k_head_stride, const float* v,
              int64_t v_token_stride, int64_t v_head_stride, const int64_t* slots, int64_t tokens);

// One vector of n elements; scale and min are written for int8 only.
void kv_store_row_scalar(KvType type, const float* x, int64_t n, void* out, float* scale, float* min);
void kv_store_row_avx2(KvType type, const float* x, int64_t n, void* out, float* scale, float* min);

}  // namespace qwen_rt
