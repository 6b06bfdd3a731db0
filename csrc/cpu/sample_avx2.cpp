#if defined(__x86_64__)

#include <math.h>

#include "sample.h"
#include "simd_avx2.h"

namespace qwen_rt {
namespace {

// e^x for x <= 0 in float64, relative error 2e-16 before rounding; below -708 it is 0.
// x = n ln2 + r; e^r by its Taylor series to degree 12.
__m256d exp_nonpositive(__m256d x) {
  constexpr double kInverseFactorial[13] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,      1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600};
  const __m256d n = _mm256_round_pd(_mm256_mul_pd(x, _mm256_set1_pd(1.4426950408889634)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256d r = _mm256_fnmadd_pd(n, _mm256_set1_pd(0.6931471805599453), x);
  r = _mm256_fnmadd_pd(n, _mm256_set1_pd(2.3190468138462996e-17), r);
  __m256d p = _mm256_set1_pd(kInverseFactorial[12]);
#pragma GCC unroll 12
  for (int i = 11; i >= 0; --i) p = _mm256_fmadd_pd(p, r, _mm256_set1_pd(kInverseFactorial[i]));
  // Adding 1.5 * 2^52 leaves n in the low bits of the mantissa.
  const __m256i bits = _mm256_castpd_si256(_mm256_add_pd(n, _mm256_set1_pd(6755399441055744.0)));
  const __m256i power = _mm256_slli_epi64(_mm256_add_epi64(bits, _mm256_set1_epi64x(1023)), 52);
  p = _mm256_mul_pd(p, _mm256_castsi256_pd(power));
  return _mm256_andnot_pd(_mm256_cmp_pd(x, _mm256_set1_pd(-708.0), _CMP_LT_OQ), p);
}

}  // namespace

void block_maxima_avx2(const float* x, int64_t n, float* highs) {
  for (int64_t begin = 0; begin < n; begin += kSampleBlock) {
    const int64_t count = n - begin < kSampleBlock ? n - begin : kSampleBlock;
    const float* p = x + begin;
    __m256 high = _mm256_set1_ps(-INFINITY), unordered = _mm256_setzero_ps();
    const auto look = [&](__m256 v) {
      high = _mm256_max_ps(high, v);
      unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    };
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) look(_mm256_loadu_ps(p + i));
    for (; i < count; ++i) look(_mm256_set1_ps(p[i]));
    *highs++ = _mm256_movemask_ps(unordered) ? NAN : horizontal_max(high);
  }
}

double sum_weights_avx2(const float* x, int64_t n, double top, double inverse) {
  const __m256d base = _mm256_set1_pd(top), factor = _mm256_set1_pd(inverse);
  __m256d sum[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
  for (int64_t i = 0; i < n; i += 16) {
    float part[16];
    const float* p = x + i;
    if (n - i < 16) {
      for (int64_t j = 0; j < 16; ++j) part[j] = j < n - i ? p[j] : -INFINITY;
      p = part;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m256d v = _mm256_cvtps_pd(_mm_loadu_ps(p + 4 * j));
      sum[j] = _mm256_add_pd(sum[j], exp_nonpositive(_mm256_mul_pd(_mm256_sub_pd(v, base), factor)));
    }
  }
  double lanes[4];
  _mm256_storeu_pd(lanes, _mm256_add_pd(_mm256_add_pd(sum[0], sum[1]), _mm256_add_pd(sum[2], sum[3])));
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

}  // namespace qwen_rt

#endif
