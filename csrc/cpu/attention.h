// Paged attention for prefill, chunked prefill and decode: causal, grouped queries, optional window.
//   out[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, g]) v[j, g],  g = h / (Hq / Hkv),
// over keys j <= p (with a window w: p - w < j <= p), p the position of row t. Only the cache is read for keys and
// values.
//
// Arithmetic: float32 dot products and an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) over tiles of
// kAttentionTile keys; a context may be split among threads and merged by the same recurrence (flash-decoding). Queries
// are multiplied by scale * log2(e) first, rounded once, so that weights are powers of two. Cached 16-bit values
// convert exactly; int8 is used as code * scale + min or (code - 128) * scale + (min + 128 scale) in float32. With D
// the head size and s_max the largest scale * |q| . |k| over the n visible keys:
//   |error| <= (2 (D + 2) s_max + n / 8 + 32) * 2^-24 * max|v|, up to the rounding of int8's min terms.
// With byte products (attention_int8_avx512.cpp: int8, D a multiple of 64 up to 256, at least 3 query rows to a key head)
// queries and weights are integers of 16 bits; with the largest steps of the keys and of the values this adds
//   score_error = scale * max|q| / 65024 * 128 D max(key scale), and to the bound
//   (exp(2 score_error) - 1) max|v| + max(value scale) / 16.
// With products of words (attention_words.h: 16-bit caches, D a multiple of 32 up to 256, more than
// kAttentionBlock query rows to a key head; 8-bit activations, see linear.h) all are integers, which adds
//   score_error = scale * (|q|_1 max|k| / 16382 + max|q| D / 262144 |k|_1), and to the bound
//   (exp(2 score_error) - 1) max|v| + max|v| / 2046 + max|v| / 1024.
// NaN or infinity in a sequence's own keys or values may reach any of its rows in the step, never another sequence.
#pragma once

#include <cstdint>

#include "kv.h"

namespace qwen_rt {

struct AttentionArgs {
  const float* q;  // [T, num_heads, size]
  int64_t q_token_stride, q_head_stride;
  float* out;  // alike
  int64_t out_token_stride, out_head_stride;
  int64_t num_heads;  // a multiple of kv->heads
  const KvLayer* kv;
  int64_t batch;
  const int64_t* q_start;      // [batch + 1]: rows of sequence b are q_start[b] .. q_start[b + 1] - 1
  const int64_t* kv_lens;      // [batch], >= its number of rows
  const int32_t* block_table;  // [batch, table_stride]
  int64_t table_stride;
  float scale;
  int64_t window;  // 0: all keys
};

void attention(const AttentionArgs& args);

// --- what an instruction set provides -------------------------------------------------------------------------------
constexpr int64_t kAttentionTile = 64;
constexpr int64_t kAttentionBlock = 12;  // query rows that a kernel takes at a time, at most

// Query rows that share a key head, against keys [begin, end) of their sequence.
struct AttentionTile {
  const KvLayer* kv;
  int64_t head;
  const int32_t* table;  // the sequence's blocks
  const float* q;        // [rows][stride], times scale * log2(e), zeros from `size` to `stride`
  int64_t stride;        // size rounded up to 16
  int64_t rows, group;   // row r sits at position first_pos + r / group
  int64_t first_pos, begin, end, window;
  float* scratch;  // attention_scratch_floats(stride, rows)
  // Results by row: out [stride] = sum_j 2^(s_j - max) v_j, sum = sum_j 2^(s_j - max), and max (-inf: no visible key).
  float *out, *max, *sum;
};

// One zero row, a tile of keys, one of values, the scores of a block of rows; each row's queries, 17 sums, position.
constexpr int64_t attention_scratch_floats(int64_t stride, int64_t rows) {
  return (1 + 2 * kAttentionTile) * stride + kAttentionBlock * kAttentionTile + rows * (stride + 18);
}

// 2^f = 1 + f P(f) for |f| <= 1/2: coefficients of P, the highest first (minimax, relative error 9.2e-8).
constexpr float kExp2[] = {0.001326472731307149f, 0.009671512991189957f, 0.05550733581185341f, 0.24022242426872253f,
                           0.6931470036506653f};

// The kernel for a cache's numbers, of an instruction set's four.
using Attend = void (*)(const AttentionTile&);
inline Attend attend_for(KvType type, Attend float32, Attend float16, Attend bfloat16, Attend int8) {
  return type == KvType::kFloat32    ? float32
         : type == KvType::kFloat16  ? float16
         : type == KvType::kBFloat16 ? bfloat16
                                     : int8;
}

void attend_scalar(const AttentionTile& tile);
void attend_avx2(const AttentionTile& tile);
void attend_avx512(const AttentionTile& tile);
void attend_neon(const AttentionTile& tile);

}  // namespace qwen_rt
