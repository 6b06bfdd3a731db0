// The AVX-512 intrinsics of csrc/cpu on a processor with AVX2: SIMDe's (https://github.com/simd-everywhere/simde, 0.8.2),
// and ours where it lacks one, touches masked memory, or adds signed numbers that may wrap. `make test-native-avx512`.
#pragma once
#include_next <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
namespace shim {
#define SHIM static inline __attribute__((always_inline))
SHIM void aligned64(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) { std::fprintf(stderr, "shim: unaligned 512-bit access\n"); std::abort(); }
}
template <class V, class L> struct U { union { V v; L l[sizeof(V) / sizeof(L)]; }; };
template <class L, class V> SHIM void get(V v, L* to) { std::memcpy(to, &v, sizeof(V)); }
template <class V, class L> SHIM V make(const L* from) { V v; std::memcpy(&v, from, sizeof(V)); return v; }

SHIM __m256 lo(__m512 a) { __m256 r; std::memcpy(&r, &a, 32); return r; }
SHIM __m256 hi(__m512 a) { __m256 r; std::memcpy(&r, reinterpret_cast<char*>(&a) + 32, 32); return r; }
SHIM __m256i lo(__m512i a) { __m256i r; std::memcpy(&r, &a, 32); return r; }
SHIM __m256i hi(__m512i a) { __m256i r; std::memcpy(&r, reinterpret_cast<char*>(&a) + 32, 32); return r; }
SHIM __m512 join(__m256 a, __m256 b) { __m512 r; std::memcpy(&r, &a, 32); std::memcpy(reinterpret_cast<char*>(&r) + 32, &b, 32); return r; }
SHIM __m512i join(__m256i a, __m256i b) { __m512i r; std::memcpy(&r, &a, 32); std::memcpy(reinterpret_cast<char*>(&r) + 32, &b, 32); return r; }

// Masked memory: lanes without their bit are neither read nor written. Bytes by a scalar loop (SIMDe reads and writes all).
template <class V, class L> SHIM V maskz_load(uint64_t m, const void* p) {
  L l[sizeof(V) / sizeof(L)];
  for (size_t i = 0; i < sizeof(V) / sizeof(L); ++i) {
    l[i] = 0;
    if (m >> i & 1) std::memcpy(&l[i], static_cast<const char*>(p) + i * sizeof(L), sizeof(L));
  }
  return make<V>(l);
}
template <class V, class L> SHIM void mask_store(void* p, uint64_t m, V v) {
  L l[sizeof(V) / sizeof(L)];
  get(v, l);
  for (size_t i = 0; i < sizeof(V) / sizeof(L); ++i) if (m >> i & 1) std::memcpy(static_cast<char*>(p) + i * sizeof(L), &l[i], sizeof(L));
}
SHIM __m512 load_ps(const void* p) { aligned64(p); return make<__m512>(static_cast<const char*>(p)); }
SHIM void store_ps(void* p, __m512 v) { aligned64(p); std::memcpy(p, &v, 64); }

SHIM __m512 fmadd(__m512 a, __m512 b, __m512 c) { return join(_mm256_fmadd_ps(lo(a), lo(b), lo(c)), _mm256_fmadd_ps(hi(a), hi(b), hi(c))); }
SHIM __m512 fnmadd(__m512 a, __m512 b, __m512 c) { return join(_mm256_fnmadd_ps(lo(a), lo(b), lo(c)), _mm256_fnmadd_ps(hi(a), hi(b), hi(c))); }
SHIM __m512 max(__m512 a, __m512 b) { return join(_mm256_max_ps(lo(a), lo(b)), _mm256_max_ps(hi(a), hi(b))); }

// GCC 12's order of operands.
SHIM float reduce_max(__m512 a) {
  const __m256 t3 = _mm256_max_ps(hi(a), lo(a));
  const __m128 t6 = _mm_max_ps(_mm256_extractf128_ps(t3, 1), _mm256_castps256_ps128(t3));
  const __m128 t8 = _mm_max_ps(t6, _mm_shuffle_ps(t6, t6, 0x4e));
  return _mm_cvtss_f32(_mm_max_ps(t8, _mm_shuffle_ps(t8, t8, 0x11)));
}
SHIM float reduce_add(__m512 a) {
  const __m256 t3 = _mm256_add_ps(hi(a), lo(a));
  const __m128 t6 = _mm_add_ps(_mm256_extractf128_ps(t3, 1), _mm256_castps256_ps128(t3));
  const __m128 t8 = _mm_add_ps(t6, _mm_shuffle_ps(t6, t6, 0x4e));
  return t8[0] + t8[1];
}
SHIM int reduce_add(__m512i a) {
  uint32_t l[16], s = 0; get(a, l);
  for (uint32_t x : l) s += x;
  return static_cast<int>(s);
}
SHIM int reduce_max(__m512i a) {
  int32_t l[16]; get(a, l); int32_t m = l[0];
  for (int32_t x : l) m = x > m ? x : m;
  return m;
}
// vscalefps, one lane: a * 2^floor(b), rounded once; the table of special cases of the SDM.
SHIM float scalef1(float a, float b) {
  if (std::isnan(b)) return b;
  if (std::isnan(a)) return std::isinf(b) ? (b > 0 ? INFINITY : 0.0f) : a;
  if (std::isinf(a)) return std::isinf(b) && b < 0 ? NAN : a;
  if (a == 0.0f) return std::isinf(b) && b > 0 ? NAN : a;
  if (std::isinf(b)) return b > 0 ? std::copysign(INFINITY, a) : std::copysign(0.0f, a);
  const double e = std::fmin(std::fmax(std::floor(b), -600.0f), 600.0f);
  // 2^e as a double, by its bits; the product is exact in double, so that the conversion rounds once.
  const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(e) + 1023) << 52;
  double power; std::memcpy(&power, &bits, 8);
  return static_cast<float>(a * power);
}
SHIM __m512 scalef(__m512 a, __m512 b) {
  float x[16], y[16]; get(a, x); get(b, y);
  for (int i = 0; i < 16; ++i) x[i] = scalef1(x[i], y[i]);
  return make<__m512>(x);
}
// vgetmantps, interval [1, 2), sign cleared.
SHIM __m512 getmant(__m512 a, int norm, int sign) {
  if (norm != 0 || sign != 1) std::abort();
  float x[16]; get(a, x);
  for (float& f : x) {
    if (std::isnan(f)) continue;
    if (std::isinf(f) || f == 0.0f) { f = 1.0f; continue; }
    int e; f = std::frexp(std::fabs(f), &e) * 2.0f;
  }
  return make<__m512>(x);
}
SHIM __m128i cvtepi32_epi8(__m512i a) {
  uint32_t x[16]; uint8_t r[16]; get(a, x);
  for (int i = 0; i < 16; ++i) r[i] = static_cast<uint8_t>(x[i]);
  return make<__m128i>(r);
}
SHIM __m512i cvtepi8_epi32(__m128i a) { return join(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))); }
SHIM __m256i cvtsepi32_epi16(__m512i a) {  // packs saturates; its lanes of 128 bits are put in order
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(lo(a), hi(a)), 0xd8);
}
// vpdpbusd, vpdpwssd: no saturation; vpmaddwd's products of widened bytes are exact.
SHIM __m256i dpbusd(__m256i s, __m256i u, __m256i b) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(0xff)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(s, _mm256_add_epi32(even, odd));
}
SHIM __m512i dpbusd(__m512i s, __m512i u, __m512i b) { return join(dpbusd(lo(s), lo(u), lo(b)), dpbusd(hi(s), hi(u), hi(b))); }
SHIM __m512i dpwssd(__m512i s, __m512i a, __m512i b) {
  return join(_mm256_add_epi32(lo(s), _mm256_madd_epi16(lo(a), lo(b))), _mm256_add_epi32(hi(s), _mm256_madd_epi16(hi(a), hi(b))));
}
}  // namespace shim
#undef _mm512_load_ps
#undef _mm512_store_ps
#undef _mm512_maskz_loadu_ps
#undef _mm512_maskz_loadu_epi8
#undef _mm512_maskz_loadu_epi32
#undef _mm256_maskz_loadu_epi16
#undef _mm_maskz_loadu_epi8
#undef _mm512_mask_storeu_ps
#undef _mm512_mask_storeu_epi32
#undef _mm512_fmadd_ps
#undef _mm512_fnmadd_ps
#undef _mm512_max_ps
#undef _mm512_reduce_max_ps
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_max_epi32
#undef _mm512_reduce_add_epi32
#undef _mm512_scalef_ps
#undef _mm512_getmant_ps
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtsepi32_epi16
#undef _mm512_dpbusd_epi32
#undef _mm512_dpwssd_epi32
#define _mm512_load_ps(p) shim::load_ps(p)
#define _mm512_store_ps(p, v) shim::store_ps(p, v)
#define _mm512_maskz_loadu_ps(m, p) (shim::maskz_load<__m512, uint32_t>(m, p))
#define _mm512_maskz_loadu_epi8(m, p) (shim::maskz_load<__m512i, uint8_t>(m, p))
#define _mm512_maskz_loadu_epi32(m, p) (shim::maskz_load<__m512i, uint32_t>(m, p))
#define _mm256_maskz_loadu_epi16(m, p) (shim::maskz_load<__m256i, uint16_t>(m, p))
#define _mm_maskz_loadu_epi8(m, p) (shim::maskz_load<__m128i, uint8_t>(m, p))
#define _mm512_mask_storeu_ps(p, m, v) (shim::mask_store<__m512, uint32_t>(p, m, v))
#define _mm512_mask_storeu_epi32(p, m, v) (shim::mask_store<__m512i, uint32_t>(p, m, v))
#define _mm512_fmadd_ps(a, b, c) shim::fmadd(a, b, c)
#define _mm512_fnmadd_ps(a, b, c) shim::fnmadd(a, b, c)
#define _mm512_max_ps(a, b) shim::max(a, b)
#define _mm512_reduce_max_ps(a) shim::reduce_max(a)
#define _mm512_reduce_add_ps(a) shim::reduce_add(a)
#define _mm512_reduce_max_epi32(a) shim::reduce_max(a)
#define _mm512_reduce_add_epi32(a) shim::reduce_add(a)
#define _mm512_scalef_ps(a, b) shim::scalef(a, b)
#define _mm512_getmant_ps(a, n, s) shim::getmant(a, n, s)
#define _mm512_cvtepi32_epi8(a) shim::cvtepi32_epi8(a)
#define _mm512_cvtepi8_epi32(a) shim::cvtepi8_epi32(a)
#define _mm512_cvtsepi32_epi16(a) shim::cvtsepi32_epi16(a)
#define _mm512_dpbusd_epi32(s, a, b) shim::dpbusd(s, a, b)
#define _mm512_dpwssd_epi32(s, a, b) shim::dpwssd(s, a, b)
// Wrapping, as the instructions do (SIMDe's are signed additions, which UBSan reports).
namespace shim {
SHIM __m512i add(__m512i a, __m512i b) { return join(_mm256_add_epi32(lo(a), lo(b)), _mm256_add_epi32(hi(a), hi(b))); }
SHIM __m512i sub(__m512i a, __m512i b) { return join(_mm256_sub_epi32(lo(a), lo(b)), _mm256_sub_epi32(hi(a), hi(b))); }
SHIM __m512i mul(__m512i a, __m512i b) { return join(_mm256_mullo_epi32(lo(a), lo(b)), _mm256_mullo_epi32(hi(a), hi(b))); }
SHIM __m512i mask_add(__m512i s, __mmask16 m, __m512i a, __m512i b) {
  uint32_t x[16], y[16]; get(s, x); get(add(a, b), y);
  for (int i = 0; i < 16; ++i) if (m >> i & 1) x[i] = y[i];
  return make<__m512i>(x);
}
}
#undef _mm512_add_epi32
#undef _mm512_sub_epi32
#undef _mm512_mullo_epi32
#undef _mm512_mask_add_epi32
#define _mm512_add_epi32(a, b) shim::add(a, b)
#define _mm512_sub_epi32(a, b) shim::sub(a, b)
#define _mm512_mullo_epi32(a, b) shim::mul(a, b)
#define _mm512_mask_add_epi32(s, m, a, b) shim::mask_add(s, m, a, b)
