// Rotary embedding in place, rotating halves of the first 2r dims of every head:
//   x1 = x[0:r], x2 = x[r:2r];  x[0:r] = x1 cos - x2 sin;  x[r:2r] = x2 cos + x1 sin
// float32; each output within 2^-23 * (|x1| + |x2|) of exact.
#pragma once

#include <cstdint>

namespace qwen_rt {

// [tokens, heads, D] with D contiguous; strides in elements.
struct Heads {
  float* data;
  int64_t heads, token_stride, head_stride;
};

// cos, sin [tokens, r] with row strides.
void rope(const Heads& q, const Heads& k, int64_t tokens, const float* cos, int64_t cos_stride, const float* sin,
          int64_t sin_stride, int64_t r);

void rope_row_scalar(float* x, const float* cos, const float* sin, int64_t r);
void rope_row_avx2(float* x, const float* cos, const float* sin, int64_t r);

}  // namespace qwen_rt
