// Choosing one token from a row of logits; processing order and definitions are those of SampleRow (backends/base.py).
//
// Bias and penalties are float64; weights w = e^((x - max) / temperature) are float64, and so is the cumulative sum.
// Nothing is sorted: tokens that provably lie past the point looked for are dropped by a threshold, and the rest is
// partitioned around pivots (quickselect by mass), expected O(V). Sums are taken in another order than a sort would, so
// a `uniform` within about 1e-12 of a border between two tokens may fall on either side.
#pragma once

#include <cstdint>

namespace qwen_rt {

struct SampleArgs {
  double temperature = 0.0;  // 0: argmax, ties to the lowest id
  int64_t top_k = 0;
  double top_p = 1.0, min_p = 0.0;
  double repetition_penalty = 1.0, presence_penalty = 0.0, frequency_penalty = 0.0;
  double uniform = 0.0;
  const int64_t* bias_ids = nullptr;
  const double* bias_values = nullptr;
  int64_t num_bias = 0;
  // Every id must be in [0, vocab). prompt_ids matter to the repetition penalty only, output_ids to all three.
  const int64_t *banned = nullptr, *prompt_ids = nullptr, *output_ids = nullptr;
  int64_t num_banned = 0, num_prompt = 0, num_output = 0;
};

// The chosen id, or -1 when the logits hold NaN or +infinity, or no token is left. Overwrites logits [vocab].
int64_t sample_row(float* logits, int64_t vocab, const SampleArgs& args);

// --- what an instruction set provides -------------------------------------------------------------------------------
constexpr int64_t kSampleBlock = 64;

// highs[b] = the largest of x[64 b : 64 b + 64] (the last block may be short); NaN in place of a block that holds one.
void block_maxima_scalar(const float* x, int64_t n, float* highs);
void block_maxima_avx2(const float* x, int64_t n, float* highs);

// sum_i e^((x[i] - top) * inverse) in float64 for x <= top; relative error 1e-13. -inf counts nothing.
double sum_weights_scalar(const float* x, int64_t n, double top, double inverse);
double sum_weights_avx2(const float* x, int64_t n, double top, double inverse);

}  // namespace qwen_rt
