#include "silu.h"

#include <algorithm>
#include <cmath>

#include "cpu_features.h"
#include "pool.h"

namespace qwen_rt {

void silu_mul_scalar(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = gate[i], e = std::exp(-std::fabs(g));
    out[i] = g * (g < 0.0f ? e : 1.0f) / (1.0f + e) * up[i];
  }
}

SiluMul silu_mul_kernel() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::kAvx512) return silu_mul_avx512;
  if (active_isa() >= Isa::kAvx2) return silu_mul_avx2;
#endif
  return silu_mul_scalar;
}

void silu_mul(const float* gate_up, int64_t stride, int64_t rows, int64_t size, float* out, int64_t out_stride) {
  const SiluMul kernel = silu_mul_kernel();
  constexpr int64_t kChunk = 8192;
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  parallel_for(rows * chunks, [&](int64_t task) {
    const int64_t row = task / chunks, begin = task % chunks * kChunk;
    const float* gate = gate_up + row * stride + begin;
    kernel(gate, gate + size, std::min(kChunk, size - begin), out + row * out_stride + begin);
  });
}

}  // namespace qwen_rt
