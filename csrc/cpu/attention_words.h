// Attention by products of 16-bit integers, which attention_words_avx512.cpp and attention_words_avx2.cpp compute: prompts
// over a cache of 16-bit floats, for heads of a multiple of 32 dims.
//   scores  keys are integers of kKeySteps steps a key, queries of query_steps() a row;
//   values  integers of kValueSteps steps a key; weights times their value's step, of kWeightSteps a row and tile.
// No sum leaves 31 bits. What is rounded, beside attention.h's float32, with p_t the largest weight of tile t:
//   |error| of a score <= D max|q| max|k| (1 / (2 kKeySteps) + 1 / (2 query_steps)),
//   |error| of an output <= max|v| / (2 kValueSteps) + sum_t p_t max|v| kTile / (2 kWeightSteps) / sum p.
#pragma once

#include "attention.h"
#include "linear.h"

namespace qwen_rt {

constexpr int32_t kKeySteps = 8191, kValueSteps = 1023, kWeightSteps = 32767;
static_assert(int64_t{kAttentionTile} * kValueSteps * kWeightSteps <= INT32_MAX);

constexpr int32_t query_steps(int64_t size) { return static_cast<int32_t>(INT32_MAX / (kKeySteps * size)); }

// Whether they serve a cache, where there are more than kAttentionBlock query rows to a key head.
inline bool words_serve(const KvLayer& kv) {
  const bool half = kv.type == KvType::kFloat16 || kv.type == KvType::kBFloat16;
  return half && activation_bits() == 8 && kv.size % 32 == 0 && kv.size <= 256;
}

}  // namespace qwen_rt
