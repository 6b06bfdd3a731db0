// RMSNorm over the last axis, with an optional residual added first:
//   summed = x + residual;  normed = (summed / sqrt(mean(summed^2) + eps)) * weight
// float32 throughout; the scalar kernel sums squares in float64, AVX2 in 32 float32 partial sums, so for D elements
// normed is within (D/32 + 8) * 2^-24 of exact, relative.
#pragma once

#include <cstdint>

namespace qwen_rt {

// Rows of a [outer, inner, D] float32 array: row (o, i) starts at data + o * outer_stride + i * inner_stride.
struct Rows {
  float* data;
  int64_t outer_stride, inner_stride;
  float* row(int64_t o, int64_t i) const { return data + o * outer_stride + i * inner_stride; }
};

struct RmsNormArgs {
  Rows x, normed;
  Rows residual, summed;  // data null: no residual, and nothing summed is written
  const float* weight;    // [size]
  float eps;
  int64_t outer, inner, size;
};

// `normed` may be `x`, and `summed` may be `residual` or `x`, row for row; no other overlap.
void rms_norm(const RmsNormArgs& args);

// One row; residual and summed both null or both set.
void rms_norm_row_scalar(const float* x, const float* residual, const float* weight, float eps, int64_t size,
                         float* normed, float* summed);
void rms_norm_row_avx2(const float* x, const float* residual, const float* weight, float eps, int64_t size,
                       float* normed, float* summed);

}  // namespace qwen_rt
