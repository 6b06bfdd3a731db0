#if defined(__x86_64__)

#include "silu.h"
#include "simd_avx2.h"

namespace qwen_rt {
namespace {

__m256 silu(__m256 g) {
  const __m256 one = _mm256_set1_ps(1.0f);
  const __m256 e = exp_nonpositive(_mm256_or_ps(g, _mm256_set1_ps(-0.0f)));
  const __m256 numerator = _mm256_mul_ps(g, _mm256_blendv_ps(one, e, g));
  return _mm256_div_ps(numerator, _mm256_add_ps(one, e));
}

}  // namespace

void silu_mul_avx2(const float* gate, const float* up, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_mul_ps(silu(_mm256_loadu_ps(gate + i)), _mm256_loadu_ps(up + i)));
  }
  if (i < n) {
    const __m256 y = _mm256_mul_ps(silu(load_part(gate + i, n - i)), load_part(up + i, n - i));
    store_part(out + i, n - i, y);
  }
}

}  // namespace qwen_rt

#endif
