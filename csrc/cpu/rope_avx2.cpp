#if defined(__x86_64__)

#include "rope.h"
#include "simd_avx2.h"

namespace qwen_rt {

void rope_row_avx2(float* x, const float* cos, const float* sin, int64_t r) {
  int64_t d = 0;
  for (; d + 8 <= r; d += 8) {
    const __m256 x1 = _mm256_loadu_ps(x + d), x2 = _mm256_loadu_ps(x + d + r);
    const __m256 c = _mm256_loadu_ps(cos + d), s = _mm256_loadu_ps(sin + d);
    _mm256_storeu_ps(x + d, _mm256_fmsub_ps(x1, c, _mm256_mul_ps(x2, s)));
    _mm256_storeu_ps(x + d + r, _mm256_fmadd_ps(x2, c, _mm256_mul_ps(x1, s)));
  }
  for (; d < r; ++d) {
    const float x1 = x[d], x2 = x[d + r];
    x[d] = x1 * cos[d] - x2 * sin[d];
    x[d + r] = x2 * cos[d] + x1 * sin[d];
  }
}

}  // namespace qwen_rt

#endif
