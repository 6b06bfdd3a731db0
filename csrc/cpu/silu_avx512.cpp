#if defined(__x86_64__)

#include <math.h>

#include "silu.h"
#include "simd_avx512.h"

namespace qwen_rt {
namespace {

// g / (1 + e^-g) * up. e^x as exp_nonpositive of simd_avx2.h has it, n ln2 + r from x; for g < -87.3 e^x is infinity,
// and beyond 87.3, where it no longer counts, that of -87.3.
__m512 silu_mul(__m512 g, __m512 up) {
  const __m512 one = _mm512_set1_ps(1.0f), round = _mm512_set1_ps(12582912.0f);
  const __mmask16 some = _mm512_cmp_ps_mask(g, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(-87.3f), _mm512_xor_ps(g, _mm512_set1_ps(-0.0f)));
  const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), round);  // its lowest bits are n
  const __m512 n = _mm512_sub_ps(shifted, round);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147182f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-1.90465421e-9f), r);
  __m512 p = _mm512_set1_ps(0.0013814539415761828f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.00836874544620514f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.04166838899254799f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.1666652113199234f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.4999999403953552f));
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), one);
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  const __m512 finite = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power));
  const __m512 e = _mm512_mask_mov_ps(_mm512_set1_ps(INFINITY), some, finite);
  return _mm512_mul_ps(_mm512_div_ps(g, _mm512_add_ps(e, one)), up);
}

}  // namespace

void silu_mul_avx512(const float* gate, const float* up, int64_t n, float* out) {
  for (; n >= 16; n -= 16, gate += 16, up += 16, out += 16) {
    _mm512_storeu_ps(out, silu_mul(_mm512_loadu_ps(gate), _mm512_loadu_ps(up)));
  }
  const __mmask16 rest = static_cast<__mmask16>((1u << n) - 1);
  _mm512_mask_storeu_ps(out, rest, silu_mul(_mm512_maskz_loadu_ps(rest, gate), _mm512_maskz_loadu_ps(rest, up)));
}

}  // namespace qwen_rt

#endif
