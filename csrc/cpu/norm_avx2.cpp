#if defined(__x86_64__)

#include <math.h>

#include "norm.h"
#include "simd_avx2.h"

namespace qwen_rt {

void rms_norm_row_avx2(const float* x, const float* residual, const float* weight, float eps, int64_t size,
                       float* normed, float* summed) {
  __m256 squares[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t d = 0;
  for (; d + 32 <= size; d += 32) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m256 s = _mm256_loadu_ps(x + d + 8 * i);
      if (residual) {
        s = _mm256_add_ps(s, _mm256_loadu_ps(residual + d + 8 * i));
        _mm256_storeu_ps(summed + d + 8 * i, s);
      }
      squares[i] = _mm256_fmadd_ps(s, s, squares[i]);
    }
  }
  for (; d < size; d += 8) {
    const int64_t n = size - d < 8 ? size - d : 8;
    __m256 s = load_part(x + d, n);
    if (residual) {
      s = _mm256_add_ps(s, load_part(residual + d, n));
      store_part(summed + d, n, s);
    }
    squares[0] = _mm256_fmadd_ps(s, s, squares[0]);
  }
  const __m256 total = _mm256_add_ps(_mm256_add_ps(squares[0], squares[1]), _mm256_add_ps(squares[2], squares[3]));
  const double mean = static_cast<double>(horizontal_sum(total)) / static_cast<double>(size);
  const __m256 scale = _mm256_set1_ps(static_cast<float>(1.0 / sqrt(mean + eps)));
  const float* s = residual ? summed : x;
  for (d = 0; d + 8 <= size; d += 8) {
    const __m256 y = _mm256_mul_ps(_mm256_loadu_ps(s + d), scale);
    _mm256_storeu_ps(normed + d, _mm256_mul_ps(y, _mm256_loadu_ps(weight + d)));
  }
  if (d < size) {
    const __m256 y = _mm256_mul_ps(load_part(s + d, size - d), scale);
    store_part(normed + d, size - d, _mm256_mul_ps(y, load_part(weight + d, size - d)));
  }
}

}  // namespace qwen_rt

#endif
