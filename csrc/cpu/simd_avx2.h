// AVX2 helpers shared by the *_avx2.cpp files. Everything is static: nothing compiled for AVX2 may be what the linker
// picks for other code.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace qwen_rt {

static inline float horizontal_sum(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

static inline float horizontal_max(__m256 v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// The largest of eight magnitudes in the order of their bits, where infinity and NaN are above all numbers.
static inline float widest(__m256i bits) {
  __m128i t = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(t));
}

// First n < 8 floats of p, the rest zero; reads nothing past them.
static inline __m256 load_part(const float* p, int64_t n) {
  float part[8] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(float));
  return _mm256_loadu_ps(part);
}

static inline void store_part(float* p, int64_t n, __m256 v) {
  float part[8];
  _mm256_storeu_ps(part, v);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(float));
}

// e^x for x <= 0, within 1.5 ulp; below -87.3 (results under the smallest normal float) it is 0. NaN stays NaN.
// x = n ln2 + r, |r| <= ln2/2; e^r = 1 + r + r^2 P(r), P a minimax polynomial of degree 4 (relative error 3.1e-9).
static inline __m256 exp_nonpositive(__m256 x) {
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693147182f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-1.90465421e-9f), r);
  __m256 p = _mm256_set1_ps(0.0013814539415761828f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.00836874544620514f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.04166838899254799f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.1666652113199234f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.4999999403953552f));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r);
  p = _mm256_add_ps(p, _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  p = _mm256_mul_ps(p, _mm256_castsi256_ps(power));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-87.3f), _CMP_LT_OQ), p);
}

}  // namespace qwen_rt
