// AVX2 + FMA + F16C kernels of linear.h. Compiled with those flags: intrinsics and plain loops only, nothing that
// could leave an AVX2 copy of a shared inline function behind.
#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>

#include <type_traits>

#include "linear_prompt_avx2.h"
#include "prefetch_x86.h"
#include "simd_avx2.h"

namespace qwen_rt {
namespace {

struct Pair {
  __m256 lo, hi;  // columns 0-7 and 8-15
};

inline Pair load_half16(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
}

inline Pair load_pair(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

inline __m256i load256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline __m256i broadcast_pair(const int16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return _mm256_set1_epi32(pair);
}

// acc += w . b over pairs. The sums are written as asm, in order and in place: left to itself the compiler hoists the
// products over each other, runs out of registers and spills a sum, whose way through memory then bounds the loop.
inline void madd_into(__m256i (&acc)[2], __m256i w0, __m256i w1, __m256i b) {
  __asm__ volatile("vpaddd %1, %0, %0" : "+x"(acc[0]) : "x"(_mm256_madd_epi16(w0, b)));
  __asm__ volatile("vpaddd %1, %0, %0" : "+x"(acc[1]) : "x"(_mm256_madd_epi16(w1, b)));
}

// --- few rows: int16 activations, exact int32 sums within a group ---------------------------------------------------

// bits & mask of x shifted left by `by` (right where negative): moves a code's top bits over its low nibble.
inline __m256i shifted(__m256i x, int by, __m256i mask) {
  return _mm256_and_si256(by >= 0 ? _mm256_slli_epi16(x, by) : _mm256_srli_epi16(x, -by), mask);
}

constexpr int kPairsAhead = 2048;  // bytes that weights are fetched ahead, past the caches: they are read once

// use(k, p0, p1) for each two k of a group: their codes as packed, as pairs of 16-bit integers, columns 0-7 and 8-15.
template <WeightKind kKind, class F>
__attribute__((always_inline)) inline void each_pair(const uint8_t* codes, int64_t group, const F& use) {
  const auto ahead = [](const uint8_t* p) { prefetch_once(p + kPairsAhead); };
  if constexpr (kKind == WeightKind::kInt8) {
    for (int64_t k = 0; k < group; k += 4, codes += 64) {
      const __m256i v0 = load256(codes), v1 = load256(codes + 32);
      ahead(codes);
      use(k, _mm256_srai_epi16(_mm256_slli_epi16(v0, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(v1, 8), 8));
      use(k + 2, _mm256_srai_epi16(v0, 8), _mm256_srai_epi16(v1, 8));
    }
  } else {
    // Vectors of low nibbles in a unit, and bits above them.
    constexpr int kLow = kKind == WeightKind::kInt4 ? 1 : kKind == WeightKind::kInt5 ? 4 : 2;
    constexpr int kTop = kKind == WeightKind::kInt4 ? 0 : kKind == WeightKind::kInt5 ? 1 : 2;
    const __m256i mask = _mm256_set1_epi16(0xf), top = _mm256_set1_epi16(((1 << kTop) - 1) << 4);
    for (int64_t k = 0; k < group; k += 8 * kLow, codes += 64 * (kLow + (kTop > 0))) {
      __m256i h0 = mask, h1 = mask;
      if constexpr (kTop > 0) {
        h0 = load256(codes + 64 * kLow);
        h1 = load256(codes + 64 * kLow + 32);
        ahead(codes + 64 * kLow);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kLow; ++v) {
        const __m256i v0 = load256(codes + 64 * v), v1 = load256(codes + 64 * v + 32);
        ahead(codes + 64 * v);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          __m256i p0 = _mm256_and_si256(_mm256_srli_epi16(v0, 4 * i), mask);
          __m256i p1 = _mm256_and_si256(_mm256_srli_epi16(v1, 4 * i), mask);
          if constexpr (kTop > 0) {
            const int by = 4 - 8 * (i / 2) - kTop * (2 * v + i % 2);
            p0 = _mm256_or_si256(p0, shifted(h0, by, top));
            p1 = _mm256_or_si256(p1, shifted(h1, by, top));
          }
          use(k + 8 * v + 2 * i, p0, p1);
        }
      }
    }
  }
}

template <WeightKind kKind, Aux kAux, int kRows>
void gemv_grouped(const PackedLinear& w, int64_t panel, const GemvInput& in, int row0, float* y) {
  constexpr int kShift = kKind == WeightKind::kInt8 ? 128 : 0;  // what a code lost on packing
  const int64_t groups = w.groups(), ldx = w.padded_k;
  const int16_t* x = in.xq + row0 * ldx;
  const float* scale = in.scale + row0 * groups;
  const int32_t* sum = in.sum + row0 * groups;
  __m256 total[kRows][2];
  for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm256_setzero_ps();
  const uint8_t* group = w.panel(panel);
  for (int64_t g = 0; g < groups; ++g, group += w.group_bytes) {
    __m256i acc[kRows][2];
    if constexpr (kAux == Aux::kZeros) {
      const Pair z = load_half16(group + 32);
      const __m256i shift = _mm256_set1_epi32(kShift);
      const __m256i z0 = _mm256_sub_epi32(shift, _mm256_cvtps_epi32(z.lo));
      const __m256i z1 = _mm256_sub_epi32(shift, _mm256_cvtps_epi32(z.hi));
      for (int r = 0; r < kRows; ++r) {
        const __m256i s = _mm256_set1_epi32(sum[r * groups + g]);
        acc[r][0] = _mm256_mullo_epi32(z0, s);
        acc[r][1] = _mm256_mullo_epi32(z1, s);
      }
    } else {
      constexpr int kOffset = kAux == Aux::kMins ? kShift : kShift - implied_zero(kKind);
      for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm256_set1_epi32(kOffset * sum[r * groups + g]);
    }
    const int16_t* xg = x + g * w.group;
    const uint8_t* codes = group + header_bytes(kAux);
    each_pair<kKind>(codes, w.group, [&](int64_t k, __m256i p0, __m256i p1) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) madd_into(acc[r], p0, p1, broadcast_pair(xg + r * ldx + k));
    });
    const Pair s = load_half16(group);
    for (int r = 0; r < kRows; ++r) {
      const __m256 sx = _mm256_set1_ps(scale[r * groups + g]);
      total[r][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][0]), _mm256_mul_ps(s.lo, sx), total[r][0]);
      total[r][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][1]), _mm256_mul_ps(s.hi, sx), total[r][1]);
    }
    if constexpr (kAux == Aux::kMins) {
      const Pair m = load_half16(group + 32);
      for (int r = 0; r < kRows; ++r) {
        const __m256 sx = _mm256_set1_ps(scale[r * groups + g] * static_cast<float>(sum[r * groups + g]));
        total[r][0] = _mm256_fmadd_ps(m.lo, sx, total[r][0]);
        total[r][1] = _mm256_fmadd_ps(m.hi, sx, total[r][1]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    _mm256_storeu_ps(y + (row0 + r) * kPanel, total[r][0]);
    _mm256_storeu_ps(y + (row0 + r) * kPanel + 8, total[r][1]);
  }
}

template <WeightKind kKind>
inline Pair load_dense(const uint8_t* p) {
  if constexpr (kKind == WeightKind::kFloat32) {
    return load_pair(reinterpret_cast<const float*>(p));
  } else if constexpr (kKind == WeightKind::kFloat16) {
    return load_half16(p);
  } else {
    const __m256i v = load256(p);
    const __m256i lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(v));
    const __m256i hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  }
}

template <WeightKind kKind>
constexpr int kRowBytes = kKind == WeightKind::kFloat32 ? kPanel * 4 : kPanel * 2;

template <WeightKind kKind, Aux, int kRows>
void gemv_dense(const PackedLinear& w, int64_t panel, const GemvInput& in, int row0, float* y) {
  // Enough independent sums to hide the latency of an FMA.
  constexpr int kChains = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  const float* x = in.x + row0 * w.padded_k;
  const uint8_t* p = w.panel(panel);
  __m256 acc[kRows][kChains][2];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kChains; ++c) acc[r][c][0] = acc[r][c][1] = _mm256_setzero_ps();
  }
  for (int64_t k = 0; k < w.padded_k; k += kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const Pair v = load_dense<kKind>(p + (k + c) * kRowBytes<kKind>);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m256 b = _mm256_set1_ps(x[r * w.padded_k + k + c]);
        acc[r][c][0] = _mm256_fmadd_ps(v.lo, b, acc[r][c][0]);
        acc[r][c][1] = _mm256_fmadd_ps(v.hi, b, acc[r][c][1]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 1; c < kChains; ++c) {
      acc[r][0][0] = _mm256_add_ps(acc[r][0][0], acc[r][c][0]);
      acc[r][0][1] = _mm256_add_ps(acc[r][0][1], acc[r][c][1]);
    }
    _mm256_storeu_ps(y + (row0 + r) * kPanel, acc[r][0][0]);
    _mm256_storeu_ps(y + (row0 + r) * kPanel + 8, acc[r][0][1]);
  }
}

using GemvFn = void (*)(const PackedLinear&, int64_t, const GemvInput&, int, float*);

template <WeightKind kKind, Aux kAux>
GemvFn pick_rows(int rows) {
  if constexpr (kKind <= WeightKind::kInt8) {
    constexpr GemvFn table[4] = {gemv_grouped<kKind, kAux, 1>, gemv_grouped<kKind, kAux, 2>,
                                 gemv_grouped<kKind, kAux, 3>, gemv_grouped<kKind, kAux, 4>};
    return table[rows - 1];
  } else {
    constexpr GemvFn table[4] = {gemv_dense<kKind, kAux, 1>, gemv_dense<kKind, kAux, 2>, gemv_dense<kKind, kAux, 3>,
                                 gemv_dense<kKind, kAux, 4>};
    return table[rows - 1];
  }
}

template <WeightKind kKind>
GemvFn pick_aux(Aux aux, int rows) {
  switch (aux) {
    case Aux::kZeros:
      return pick_rows<kKind, Aux::kZeros>(rows);
    case Aux::kMins:
      return pick_rows<kKind, Aux::kMins>(rows);
    default:
      return pick_rows<kKind, Aux::kNone>(rows);
  }
}

GemvFn pick(const PackedLinear& w, int rows) {
  switch (w.kind) {
    case WeightKind::kInt4:
      return pick_aux<WeightKind::kInt4>(w.aux, rows);
    case WeightKind::kInt5:
      return pick_aux<WeightKind::kInt5>(w.aux, rows);
    case WeightKind::kInt6:
      return pick_aux<WeightKind::kInt6>(w.aux, rows);
    case WeightKind::kInt8:
      return pick_aux<WeightKind::kInt8>(w.aux, rows);
    case WeightKind::kFloat32:
      return pick_rows<WeightKind::kFloat32, Aux::kNone>(rows);
    case WeightKind::kFloat16:
      return pick_rows<WeightKind::kFloat16, Aux::kNone>(rows);
    default:
      return pick_rows<WeightKind::kBFloat16, Aux::kNone>(rows);
  }
}

void gemv_avx2(const PackedLinear& w, int64_t panel, const GemvInput& in, int rows, float* y) {
  for (int row0 = 0; row0 < rows; row0 += 4) pick(w, rows - row0 < 4 ? rows - row0 : 4)(w, panel, in, row0, y);
}

void quantize_row_avx2(const float* x, int64_t padded_k, int64_t group, int16_t* xq, float* scale, int32_t* sum) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t g = 0; g * group < padded_k; ++g) {
    const float* xg = x + g * group;
    __m256 top = _mm256_setzero_ps(), poison = top;  // poison: 0, or NaN when x holds a NaN or infinity
    for (int64_t i = 0; i < group; i += 8) {
      const __m256 v = _mm256_loadu_ps(xg + i);
      top = _mm256_max_ps(top, _mm256_and_ps(v, magnitude));
      poison = _mm256_fmadd_ps(v, _mm256_setzero_ps(), poison);
    }
    __m128 bad = _mm_add_ps(_mm256_castps256_ps128(poison), _mm256_extractf128_ps(poison, 1));
    bad = _mm_add_ps(bad, _mm_movehl_ps(bad, bad));
    bad = _mm_add_ss(bad, _mm_movehdup_ps(bad));
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    t = _mm_max_ss(t, _mm_movehdup_ps(t));
    const float most = _mm_cvtss_f32(t);
    const __m256 inverse = _mm256_set1_ps(most > kTiny ? kSteps16 / most : 0.0f);
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < group; i += 16) {
      const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(xg + i), inverse));
      const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(xg + i + 8), inverse));
      const __m256i q = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(xq + g * group + i), q);
      total = _mm256_add_epi32(total, _mm256_madd_epi16(q, ones));
    }
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    sum[g] = _mm_cvtsi128_si32(s);
    scale[g] = most / kSteps16 + _mm_cvtss_f32(bad);
  }
}

// --- many rows: register tiles over an unpacked block ---------------------------------------------------------------

template <WeightKind kKind>
void unpack_group(const uint8_t* group, Aux aux, int64_t size, int16_t* out) {
  constexpr int kShift = kKind == WeightKind::kInt8 ? 128 : 0;
  __m256i z0, z1;  // zero points, twice a column
  if (aux == Aux::kZeros) {
    const Pair z = load_half16(group + 32);
    const __m256i shift = _mm256_set1_epi32(kShift);
    z0 = _mm256_sub_epi32(_mm256_cvtps_epi32(z.lo), shift);
    z1 = _mm256_sub_epi32(_mm256_cvtps_epi32(z.hi), shift);
    const __m256i low = _mm256_set1_epi32(0xffff);
    z0 = _mm256_or_si256(_mm256_and_si256(z0, low), _mm256_slli_epi32(z0, 16));
    z1 = _mm256_or_si256(_mm256_and_si256(z1, low), _mm256_slli_epi32(z1, 16));
  } else {
    z0 = z1 = _mm256_set1_epi16(static_cast<short>(aux == Aux::kMins ? -kShift : implied_zero(kKind) - kShift));
  }
  each_pair<kKind>(group + header_bytes(aux), size, [&](int64_t, __m256i p0, __m256i p1) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_sub_epi16(p0, z0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_sub_epi16(p1, z1));
    out += 32;
  });
}

void unpack_avx2(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, int16_t* codes, float* scale,
                 float* min) {
  const uint8_t* group = w.panel(panel) + g0 * w.group_bytes;
  for (int64_t g = g0; g < g1; ++g, group += w.group_bytes, codes += w.group * kPanel) {
    switch (w.kind) {
      case WeightKind::kInt4:
        unpack_group<WeightKind::kInt4>(group, w.aux, w.group, codes);
        break;
      case WeightKind::kInt5:
        unpack_group<WeightKind::kInt5>(group, w.aux, w.group, codes);
        break;
      case WeightKind::kInt6:
        unpack_group<WeightKind::kInt6>(group, w.aux, w.group, codes);
        break;
      default:
        unpack_group<WeightKind::kInt8>(group, w.aux, w.group, codes);
    }
    const Pair s = load_half16(group);
    _mm256_storeu_ps(scale + (g - g0) * kPanel, s.lo);
    _mm256_storeu_ps(scale + (g - g0) * kPanel + 8, s.hi);
    if (w.aux == Aux::kMins) {
      const Pair m = load_half16(group + 32);
      _mm256_storeu_ps(min + (g - g0) * kPanel, m.lo);
      _mm256_storeu_ps(min + (g - g0) * kPanel + 8, m.hi);
    }
  }
}

// --- byte products (vpmaddubsw), codes of up to 6 bits ---------------------------------------------------------------

constexpr int kRowAhead = 4096;  // bytes that one row's weights are fetched ahead, past the caches: they are read once

inline __m256i broadcast_word(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

// Bytes of 4 k of a group's codes, columns 0-7 and 8-15.
struct Quad {
  __m256i lo, hi;
};

// How the codes of a kind are packed (linear.h), in units of quads; kFit of these have products whose sum fits 16 bits.
template <WeightKind kKind>
struct ByteCodes {
  static constexpr int kLow = kKind == WeightKind::kInt4 ? 4 : kKind == WeightKind::kInt5 ? 4 : 2;  // low vectors
  static constexpr int kTop = kKind == WeightKind::kInt4 ? 0 : kKind == WeightKind::kInt5 ? 1 : 2;  // bits above them
  static constexpr int kQuads = 2 * kLow;                                                           // of a unit
  static constexpr int kFit = kKind == WeightKind::kInt4 ? 8 : kKind == WeightKind::kInt5 ? 4 : 2;
  static constexpr int kUnitBytes = 64 * (kLow + (kTop > 0));

  static __m256i half(const uint8_t* unit, int u) {
    const __m256i nibbles = load256(unit + 64 * (u / 2)), low = _mm256_set1_epi8(0xf);
    const __m256i v = _mm256_and_si256(u % 2 ? _mm256_srli_epi16(nibbles, 4) : nibbles, low);
    if constexpr (kTop == 0) return v;
    const __m256i top = _mm256_set1_epi8(((1 << kTop) - 1) << 4);
    return _mm256_or_si256(v, shifted(load256(unit + 64 * kLow), 4 - kTop * u, top));
  }
  // The u-th 4 k of a unit.
  static Quad quad(const uint8_t* unit, int u) { return {half(unit, u), half(unit + 32, u)}; }
};

// pick(ByteCodes of w's kind, whether it has zeros or minimums).
template <class Pick>
auto for_codes(const PackedLinear& w, const Pick& pick) {
  const auto of_kind = [&](auto codes) {
    return w.aux == Aux::kNone ? pick(codes, std::false_type()) : pick(codes, std::true_type());
  };
  return w.kind == WeightKind::kInt4   ? of_kind(ByteCodes<WeightKind::kInt4>())
         : w.kind == WeightKind::kInt5 ? of_kind(ByteCodes<WeightKind::kInt5>())
                                       : of_kind(ByteCodes<WeightKind::kInt6>());
}

// Scales and, with zeros or minimums, minimums of a group.
template <bool kMin>
struct Affine {
  Pair scale, min;

  Affine(const PackedLinear& w, const uint8_t* head) : scale(load_half16(head)), min(scale) {
    if constexpr (kMin) {
      min = load_half16(head + 32);
      if (w.aux == Aux::kZeros) min = {-(scale.lo * min.lo), -(scale.hi * min.hi)};
    }
  }
};

// acc = R rows of x times kFit quads of a unit from the kFirst-th: two 16-bit sums a column, columns 0-7 and 8-15. As in
// madd_into, asm keeps them where they are: 12 sums, a quad, an activation and a product fill the 16 registers.
template <class Codes, int kFirst, int R>
__attribute__((always_inline)) inline void byte_products(const uint8_t* unit, const int8_t* x, int64_t step,
                                                         __m256i (&acc)[R][2]) {
#pragma GCC unroll 8
  for (int i = 0; i < Codes::kFit; ++i, x += step) {
    __asm__("" : "+r"(x));  // one address a step, not one of each activation
    const Quad w = Codes::quad(unit, kFirst + i);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256i b = broadcast_word(x + 4 * r);
      if (i == 0) {
        acc[r][0] = _mm256_maddubs_epi16(w.lo, b);
        acc[r][1] = _mm256_maddubs_epi16(w.hi, b);
      } else {
        __asm__ volatile("vpaddw %1, %0, %0" : "+x"(acc[r][0]) : "x"(_mm256_maddubs_epi16(w.lo, b)));
        __asm__ volatile("vpaddw %1, %0, %0" : "+x"(acc[r][1]) : "x"(_mm256_maddubs_epi16(w.hi, b)));
      }
    }
  }
}

// Groups [g0, g1) of a panel times R rows of a tile of `stride` rows, added to y. kOne: a group is one unit.
template <class Codes, bool kOne, bool kMin, int R>
void byte_block(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, const ByteRows& in, int64_t stride,
                float* y) {
  const int8_t* x = in.x;
  const float *scale = in.scale, *scaled_sum = in.scaled_sum;
  const int32_t* start = in.start;
  const __m256i ones = _mm256_set1_epi16(1);
  const uint8_t* head = w.panel(panel) + g0 * w.group_bytes;
  const uint8_t* codes = head + header_bytes(w.aux);
  const int64_t group = w.group, bytes = w.group_bytes;
  for (int64_t g = g0; g < g1; ++g) {
    __m256i sum[R][2];
    const auto add = [&](const uint8_t* unit, auto first, bool begin) __attribute__((always_inline)) {
      __m256i acc[R][2];
      byte_products<Codes, decltype(first)::value>(unit, x, 4 * stride, acc);
      x += 4 * Codes::kFit * stride;
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        acc[r][0] = _mm256_madd_epi16(acc[r][0], ones);
        acc[r][1] = _mm256_madd_epi16(acc[r][1], ones);
        if (begin && kMin) {
          sum[r][0] = acc[r][0];
          sum[r][1] = acc[r][1];
        } else {
          const __m256i from = _mm256_set1_epi32(start[r]);
          sum[r][0] = _mm256_add_epi32(begin ? from : sum[r][0], acc[r][0]);
          sum[r][1] = _mm256_add_epi32(begin ? from : sum[r][1], acc[r][1]);
        }
      }
    };
    const auto add_unit = [&](const uint8_t* unit, bool begin) __attribute__((always_inline)) {
#pragma GCC unroll 5
      for (int v = 0; v < Codes::kUnitBytes; v += 64) {
        prefetch_l1(unit + v + 1024);
      }
      add(unit, std::integral_constant<int, 0>(), begin);
      if constexpr (Codes::kFit < Codes::kQuads) add(unit, std::integral_constant<int, Codes::kFit>(), false);
    };
    add_unit(codes, true);
    if constexpr (!kOne) {
      for (int64_t k = 4 * Codes::kQuads; k < group; k += 4 * Codes::kQuads) {
        add_unit(codes + k / (4 * Codes::kQuads) * Codes::kUnitBytes, false);
      }
    }
    const Affine<kMin> affine(w, head);
    const Pair s = affine.scale, m = affine.min;
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256 sx = _mm256_broadcast_ss(scale + r);
      float* out = y + r * kPanel;
      __m256 y0 = _mm256_loadu_ps(out), y1 = _mm256_loadu_ps(out + 8);
      y0 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][0]), _mm256_mul_ps(s.lo, sx), y0);
      y1 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][1]), _mm256_mul_ps(s.hi, sx), y1);
      if constexpr (kMin) {
        const __m256 total = _mm256_broadcast_ss(scaled_sum + r);
        y0 = _mm256_fmadd_ps(m.lo, total, y0);
        y1 = _mm256_fmadd_ps(m.hi, total, y1);
      }
      _mm256_storeu_ps(out, y0);
      _mm256_storeu_ps(out + 8, y1);
    }
    head += bytes;
    codes += bytes;
    scale += stride;
    start += stride;
    scaled_sum += stride;
  }
}

// One row of 16-bit activations: the planes' 16-bit sums meet 256 and 1 where they widen to 32 bits, so that only one
// sum a column ends with a float operation. asm as in byte_products.
template <class Codes, bool kMin>
void byte_row(const PackedLinear& w, int64_t panel, const ByteRows& in, float* y) {
  const __m256i upper = _mm256_set1_epi16(256), lower = _mm256_set1_epi16(1);
  const int8_t* x = in.x;
  __m256 y0 = _mm256_setzero_ps(), y1 = y0;
  const uint8_t* head = w.panel(panel);
  for (int64_t g = 0; g < w.groups(); ++g, head += w.group_bytes) {
    const uint32_t from = 256 * static_cast<uint32_t>(in.start[2 * g]) + static_cast<uint32_t>(in.start[2 * g + 1]);
    __m256i sum0 = _mm256_set1_epi32(kMin ? 0 : static_cast<int32_t>(from)), sum1 = sum0;
    const uint8_t* unit = head + header_bytes(w.aux);
    for (int64_t k = 0; k < w.group; k += 4 * Codes::kQuads, unit += Codes::kUnitBytes) {
#pragma GCC unroll 5
      for (int v = 0; v < Codes::kUnitBytes; v += 64) {
        prefetch_once(unit + v + kRowAhead);
      }
#pragma GCC unroll 4
      for (int first = 0; first < Codes::kQuads; first += Codes::kFit) {
        __m256i acc[4];
#pragma GCC unroll 8
        for (int i = 0; i < Codes::kFit; ++i, x += 8) {
          const Quad q = Codes::quad(unit, first + i);
          const __m256i high = broadcast_word(x), low = broadcast_word(x + 4);
          const __m256i product[4] = {_mm256_maddubs_epi16(q.lo, high), _mm256_maddubs_epi16(q.hi, high),
                                      _mm256_maddubs_epi16(q.lo, low), _mm256_maddubs_epi16(q.hi, low)};
#pragma GCC unroll 4
          for (int a = 0; a < 4; ++a) {
            if (i == 0) {
              acc[a] = product[a];
            } else {
              __asm__ volatile("vpaddw %1, %0, %0" : "+x"(acc[a]) : "x"(product[a]));
            }
          }
        }
        const __m256i add0 = _mm256_add_epi32(_mm256_madd_epi16(acc[0], upper), _mm256_madd_epi16(acc[2], lower));
        const __m256i add1 = _mm256_add_epi32(_mm256_madd_epi16(acc[1], upper), _mm256_madd_epi16(acc[3], lower));
        sum0 = _mm256_add_epi32(sum0, add0);
        sum1 = _mm256_add_epi32(sum1, add1);
      }
    }
    const Affine<kMin> affine(w, head);
    const Pair s = affine.scale, m = affine.min;
    const __m256 step = _mm256_broadcast_ss(in.scale + 2 * g + 1);
    y0 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum0), _mm256_mul_ps(s.lo, step), y0);
    y1 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum1), _mm256_mul_ps(s.hi, step), y1);
    if constexpr (kMin) {
      const __m256 total = _mm256_set1_ps(in.scaled_sum[2 * g] + in.scaled_sum[2 * g + 1]);
      y0 = _mm256_fmadd_ps(m.lo, total, y0);
      y1 = _mm256_fmadd_ps(m.hi, total, y1);
    }
  }
  _mm256_storeu_ps(y, y0);
  _mm256_storeu_ps(y + 8, y1);
}

void byte_row_avx2(const PackedLinear& w, int64_t panel, const ByteRows& in, float* y) {
  for_codes(w, [](auto codes, auto min) { return byte_row<decltype(codes), min()>; })(w, panel, in, y);
}

// A tile's rows from the r-th on.
ByteRows rows_from(const ByteRows& in, int r) {
  return {in.x + 4 * r, in.scale + r, in.start + r, in.scaled_sum + r, {in.fold.start + r, nullptr, nullptr}};
}

template <class Codes, bool kOne, bool kMin>
void byte_tile(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, const ByteRows& in, int rows, float* y) {
  using Block = void (*)(const PackedLinear&, int64_t, int64_t, int64_t, const ByteRows&, int64_t, float*);
  static constexpr Block kBlock[6] = {byte_block<Codes, kOne, kMin, 1>, byte_block<Codes, kOne, kMin, 2>,
                                      byte_block<Codes, kOne, kMin, 3>, byte_block<Codes, kOne, kMin, 4>,
                                      byte_block<Codes, kOne, kMin, 5>, byte_block<Codes, kOne, kMin, 6>};
  const int most = rows <= 6 ? rows : (rows + 1) / 2;
  for (int r = 0; r < rows; r += most) {
    kBlock[(rows - r < most ? rows - r : most) - 1](w, panel, g0, g1, rows_from(in, r), rows, y + r * kPanel);
  }
}

// Sums of earlier groups, or zeros, to y: rows of 64 bytes, all in L1, to which a tile adds group by group.
void byte_tile_avx2(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, const ByteRows& in, int rows,
                    const float* sums, float* y, int64_t ldy) {
  float near[kByteTileRows * kPanel];
  float* const total = ldy == kPanel ? y : near;
  if (g0 == 0) {
    for (int i = 0; i < rows * kPanel; i += 8) _mm256_storeu_ps(total + i, _mm256_setzero_ps());
  } else if (total != sums) {
    for (int i = 0; i < rows * kPanel; i += 8) _mm256_storeu_ps(total + i, _mm256_loadu_ps(sums + i));
  }
  const auto tile = for_codes(w, [&](auto codes, auto min) {
    using Codes = decltype(codes);
    return w.group == 4 * Codes::kQuads ? byte_tile<Codes, true, min()> : byte_tile<Codes, false, min()>;
  });
  tile(w, panel, g0, g1, in, rows, total);
  if (total == y) return;
  for (int r = 0; r < rows; ++r) {
    _mm256_storeu_ps(y + r * ldy, _mm256_loadu_ps(total + r * kPanel));
    _mm256_storeu_ps(y + r * ldy + 8, _mm256_loadu_ps(total + r * kPanel + 8));
  }
}

void whole_tile_avx2(const PackedLinear& w, const uint8_t* unpacked, int64_t g0, int64_t g1, const ByteRows& in, float* sums,
                     float* y, int64_t ldy) {
  if (g0 == 0) {
    for (int i = 0; i < kByteTileRows * kPanel; i += 8) _mm256_storeu_ps(sums + i, _mm256_setzero_ps());
  }
  const int64_t units = (g1 - g0) / unit_of(w).groups;
  prompt_rows_avx2(w, unpacked + kStepBytes, units, in, kByteTileRows, sums);
  prompt_rows_avx2(w, unpacked + kStepBytes, units, rows_from(in, kPromptRows), kByteTileRows, sums + kPromptRows * kPanel);
  if (g1 < w.groups()) return;
  const Pair step = load_pair(reinterpret_cast<const float*>(unpacked));
  for (int r = 0; r < kByteTileRows; ++r, y += ldy, sums += kPanel) {
    const Pair total = load_pair(sums);
    _mm256_storeu_ps(y, _mm256_mul_ps(total.lo, step.lo));
    _mm256_storeu_ps(y + 8, _mm256_mul_ps(total.hi, step.hi));
  }
}

// Two sets of words as the lower and the upper halves of each word.
__m256i halves(__m256i lower, __m256i upper) {
  return _mm256_blend_epi16(lower, _mm256_slli_epi32(upper, 16), 0xaa);
}

// Steps of a panel's columns, of which the largest scale has `limit`; one where all are zero.
struct Steps {
  Pair one, inverse;

  Steps(const PackedLinear& w, int64_t panel, int64_t limit) {
    const __m256 sign = _mm256_set1_ps(-0.0f), zero = _mm256_setzero_ps(), unit = _mm256_set1_ps(1.0f);
    Pair most{zero, zero};
    const uint8_t* head = w.panel(panel);
    for (int64_t g = 0; g < w.groups(); ++g, head += w.group_bytes) {
      const Pair scale = load_half16(head);
      most = {_mm256_max_ps(most.lo, _mm256_andnot_ps(sign, scale.lo)), _mm256_max_ps(most.hi, _mm256_andnot_ps(sign, scale.hi))};
    }
    const auto per_step = [&](__m256 m) {
      const __m256 steps = _mm256_div_ps(_mm256_set1_ps(static_cast<float>(limit)), m);
      return _mm256_blendv_ps(steps, unit, _mm256_cmp_ps(m, zero, _CMP_EQ_OQ));
    };
    inverse = {per_step(most.lo), per_step(most.hi)};
    one = {_mm256_div_ps(unit, inverse.lo), _mm256_div_ps(unit, inverse.hi)};
  }
};

// Scales as integers.
__m256i in_steps(__m256 scale, __m256 inverse) { return _mm256_cvtps_epi32(_mm256_mul_ps(scale, inverse)); }

template <class Codes, bool kMin>
void unpack_codes(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, uint8_t* out) {
  const auto put = [&](auto lo, auto hi) {
    __builtin_memcpy(out, &lo, 32);
    __builtin_memcpy(out + 32, &hi, 32);
    out += 64;
  };
  const Unit unit = unit_of(w);
  const uint8_t* head = w.panel(panel) + g0 * w.group_bytes;
  const Steps steps(w, panel, unit.limit());
  put(steps.one.lo, steps.one.hi);
  for (int64_t g = g0; g < g1; g += unit.groups, head += unit.groups * w.group_bytes) {
    const uint8_t* second = head + (unit.groups - 1) * w.group_bytes;
    const Affine<kMin> a(w, head), b(w, second);
    put(halves(in_steps(a.scale.lo, steps.inverse.lo), in_steps(b.scale.lo, steps.inverse.lo)),
        halves(in_steps(a.scale.hi, steps.inverse.hi), in_steps(b.scale.hi, steps.inverse.hi)));
    if constexpr (kMin) {
      const float zero = static_cast<float>(implied_zero(w.kind));  // codes are multiplied less that
      put((a.min.lo + zero * a.scale.lo) * steps.inverse.lo, (a.min.hi + zero * a.scale.hi) * steps.inverse.hi);
      if (unit.groups == 2) put((b.min.lo + zero * b.scale.lo) * steps.inverse.lo, (b.min.hi + zero * b.scale.hi) * steps.inverse.hi);
    }
    const uint8_t *from = head + header_bytes(w.aux), *other = second + header_bytes(w.aux);
    for (int64_t k = 0; k < w.group; k += 4 * Codes::kQuads, from += Codes::kUnitBytes, other += Codes::kUnitBytes) {
#pragma GCC unroll 8
      for (int u = 0; u < Codes::kQuads; ++u) {
        const Quad q = Codes::quad(from, u);
        if (unit.groups == 1) {
          put(q.lo, q.hi);
        } else {
          const Quad p = Codes::quad(other, u);
          put(halves(q.lo, p.lo), halves(q.hi, p.hi));
          put(halves(_mm256_srli_epi32(q.lo, 16), _mm256_srli_epi32(p.lo, 16)),
              halves(_mm256_srli_epi32(q.hi, 16), _mm256_srli_epi32(p.hi, 16)));
        }
      }
    }
  }
}

void unpack_bytes_avx2(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, uint8_t* out) {
  for_codes(w, [](auto codes, auto min) { return unpack_codes<decltype(codes), min()>; })(w, panel, g0, g1, out);
}

int64_t unpacked_bytes_avx2(const PackedLinear& w, int64_t groups) {
  const Unit unit = unit_of(w);
  return kStepBytes + groups / unit.groups * (unit_header(w, unit) + unit.groups * w.group * kPanel);
}

// 16-bit activations cost twice the products: worth it for one row only, where unpacking takes longer than they do
// (byte_row; tiles have rows of one plane).
bool bytes_serve_avx2(const PackedLinear& w, int planes, int64_t rows) {
  const int unit = w.kind == WeightKind::kInt6 ? 16 : 32;
  return w.kind <= WeightKind::kInt6 && w.group % unit == 0 && (planes == 1 || rows == 1);
}

// The largest magnitude of a group, in the order of bits: infinity and NaN are above all numbers.
float widest_of(const float* x, int64_t group) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i top = _mm256_setzero_si256();
  for (int64_t i = 0; i < group; i += 8) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    top = _mm256_max_epi32(top, _mm256_and_si256(v, magnitude));
    prefetch_l1(x + group + i);  // the row's next group, which comes after this one of the other rows
  }
  return widest(top);
}

// 32 inputs of a row (16: the rest zeros) as bytes in the order of the packing: quads 0-3 and 4-7.
struct Quads {
  __m128i part[2];

  Quads(const float* x, bool whole, __m256 inverse) {
    const auto eight = [&](int i) { return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse)); };
    const __m256i a = eight(0), b = eight(1), c = whole ? eight(2) : _mm256_setzero_si256(), d = whole ? eight(3) : c;
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    part[0] = _mm_unpacklo_epi8(low, high);
    part[1] = _mm_unpackhi_epi8(low, high);
  }
};

// Four words of each of four rows -> four vectors, of one word of every row each.
inline void transpose(__m128i (&x)[4]) {
  const __m128i ab = _mm_unpacklo_epi32(x[0], x[1]), cd = _mm_unpacklo_epi32(x[2], x[3]);
  const __m128i ef = _mm_unpackhi_epi32(x[0], x[1]), gh = _mm_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm_unpacklo_epi64(ab, cd);
  x[1] = _mm_unpackhi_epi64(ab, cd);
  x[2] = _mm_unpacklo_epi64(ef, gh);
  x[3] = _mm_unpackhi_epi64(ef, gh);
}

// A word of each of `count` rows, of which there are 1 .. 4.
template <class T>
inline void put_words(T* out, __m128i words, int64_t count) {
  if (count == 4) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), words);
  } else {
    __builtin_memcpy(out, &words, static_cast<size_t>(4 * count));
  }
}

// Sums of the two 16-bit halves of words.
inline __m128i lower_halves(__m128i words) { return _mm_srai_epi32(_mm_slli_epi32(words, 16), 16); }
inline __m128i upper_halves(__m128i words) { return _mm_srai_epi32(words, 16); }

// One plane, four rows at a time, whose words lie together. kWhole: units of kGroups groups for whole tiles, with the starts
// of their parts; else groups.
template <bool kWhole, int kGroups>
void quantize_plane(const PackedLinear& w, const float* const* rows, int64_t count, int64_t g0, int64_t g1,
                    const ByteRows& to) {
  const Unit unit = unit_of(w);
  const int64_t group = w.group, quads = kWhole ? unit.quads : group / 4, parts = whole_parts_avx2(w);
  const __m128i ones8 = _mm_set1_epi8(1);
  const __m128i zero16 = _mm_set1_epi16(static_cast<short>(-implied_zero(w.kind)));
  const __m128i zero32 = _mm_set1_epi32(-implied_zero(w.kind));
  for (int64_t g = g0; g < g1; g += kGroups) {
    for (int64_t r0 = 0; r0 < count; r0 += 4) {
      const int64_t here = count - r0 < 4 ? count - r0 : 4;
      const float* x[4];
      __m256 inverse[4];
      alignas(16) float scale[4];
      for (int64_t r = 0; r < 4; ++r) {
        x[r] = rows[r0 + (r < here ? r : here - 1)] + g * group;
        const float most = widest_of(x[r], kGroups * group);
        inverse[r] = _mm256_set1_ps(most > kTiny ? kSteps8 / most : 0.0f);
        scale[r] = most < INFINITY ? most / kSteps8 : NAN;
      }
      int8_t* out = to.x + g * group * count + 4 * r0;
      int32_t* start = to.fold.start + g * parts * count + r0;
      const __m128i none = _mm_setzero_si128();
      __m128i lower = none, upper = none;           // of each row
      __m128i sums[4] = {none, none, none, none};  // of a part: bytes 0 and 1 of words, and 2 and 3
      int64_t left = quads;
      const auto take = [&](__m128i (&words)[4]) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) sums[r] = _mm_add_epi16(sums[r], _mm_maddubs_epi16(ones8, words[r]));
        transpose(words);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q, out += 4 * count) put_words(out, words[q], here);
        if ((left -= 4) > 0) return;
        left = quads;
        transpose(sums);
        const __m128i pairs = _mm_add_epi16(_mm_add_epi16(sums[0], sums[1]), _mm_add_epi16(sums[2], sums[3]));
        if constexpr (kWhole) {
          put_words(start, _mm_mullo_epi16(pairs, zero16), here);
          start += count;
        }
        lower = _mm_add_epi32(lower, lower_halves(pairs));
        upper = _mm_add_epi32(upper, upper_halves(pairs));
        sums[0] = sums[1] = sums[2] = sums[3] = none;
      };
      for (int64_t k = 0; k < group; k += 32) {
        const bool whole = k + 32 <= group;
        const Quads all[4] = {{x[0] + k, whole, inverse[0]}, {x[1] + k, whole, inverse[1]},
                              {x[2] + k, whole, inverse[2]}, {x[3] + k, whole, inverse[3]}};
        if constexpr (kGroups == 1) {
#pragma GCC unroll 2
          for (int i = 0; i < 1 + whole; ++i) {
            __m128i words[4] = {all[0].part[i], all[1].part[i], all[2].part[i], all[3].part[i]};
            take(words);
          }
        } else {
          const Quads other[4] = {{x[0] + group + k, whole, inverse[0]}, {x[1] + group + k, whole, inverse[1]},
                                  {x[2] + group + k, whole, inverse[2]}, {x[3] + group + k, whole, inverse[3]}};
#pragma GCC unroll 2
          for (int i = 0; i < 1 + whole; ++i) {
            __m128i first[4], second[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
              first[r] = _mm_unpacklo_epi16(all[r].part[i], other[r].part[i]);
              second[r] = _mm_unpackhi_epi16(all[r].part[i], other[r].part[i]);
            }
            take(first);
            take(second);
          }
        }
      }
      const __m128 step = _mm_load_ps(scale);
      const auto scaled = [&](__m128i sum) { return _mm_castps_si128(_mm_mul_ps(step, _mm_cvtepi32_ps(sum))); };
      const int64_t at = g * count + r0;
      put_words(to.scale + at, _mm_castps_si128(step), here);
      if constexpr (kGroups == 2) {
        put_words(to.scaled_sum + at, scaled(lower), here);
        put_words(to.scaled_sum + at + count, scaled(upper), here);
      } else {
        const __m128i total = _mm_add_epi32(lower, upper);
        put_words(to.start + at, _mm_mullo_epi32(total, zero32), here);
        put_words(to.scaled_sum + at, scaled(total), here);
      }
    }
  }
}

void quantize_whole_avx2(const PackedLinear& w, const float* const* x, const ByteRows& out) {
  (unit_of(w).groups == 2 ? quantize_plane<true, 2> : quantize_plane<true, 1>)(w, x, kByteTileRows, 0, w.groups(), out);
}

// Scale, start and scaled sum of one row of a group, from the lanes of its sum.
void finish_group(const PackedLinear& w, const ByteRows& to, int64_t at, float scale, __m256i sum) {
  __m128i p = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  p = _mm_add_epi32(p, _mm_shuffle_epi32(p, 0x4e));
  p = _mm_add_epi32(p, _mm_shuffle_epi32(p, 0xb1));
  const int32_t total = _mm_cvtsi128_si32(p);
  to.scale[at] = scale;
  to.start[at] = start_of(w.kind, total);
  to.scaled_sum[at] = scale * static_cast<float>(total);
}

// Two planes of each row: the upper byte of 16 bits, and the lower.
void quantize_planes(const PackedLinear& w, const float* const* rows, int64_t count, int64_t g0, int64_t g1,
                     const ByteRows& to) {
  const int64_t R = 2 * count;
  const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 0, 0, 0, 0, 0, 0, 0, 0);
  // Eight integers that fit bytes to rows of a tile, in the order of the packing.
  const auto put = [&](__m256i q, int8_t* out) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    const int64_t bytes = _mm_cvtsi128_si64(_mm_shuffle_epi8(_mm_packs_epi16(words, words), order));
    __builtin_memcpy(out, &bytes, 4);
    __builtin_memcpy(out + 4 * R, reinterpret_cast<const char*>(&bytes) + 4, 4);
  };
  // Group by group of all rows, so that what is written lies together.
  for (int64_t at = g0 * count; at < g1 * count; ++at) {
    const int64_t g = at / count, r = at % count * 2;
    const float* x = rows[at % count] + g * w.group;
    int8_t* out = to.x + g * w.group * R + 4 * r;
    const float most = widest_of(x, w.group);
    const __m256 inverse = _mm256_set1_ps(most > kTiny ? kSteps16 / most : 0.0f);
    __m256i lower_sum = _mm256_setzero_si256(), upper_sum = lower_sum;
    for (int64_t i = 0; i < w.group; i += 8, out += 8 * R) {
      const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
      const __m256i upper = _mm256_srai_epi32(_mm256_add_epi32(q, _mm256_set1_epi32(128)), 8);
      const __m256i lower = _mm256_sub_epi32(q, _mm256_slli_epi32(upper, 8));
      upper_sum = _mm256_add_epi32(upper_sum, upper);
      lower_sum = _mm256_add_epi32(lower_sum, lower);
      put(upper, out);
      put(lower, out + 4);
    }
    const float s = most < INFINITY ? most / kSteps16 : NAN;
    finish_group(w, to, g * R + r, 256.0f * s, upper_sum);
    finish_group(w, to, g * R + r + 1, s, lower_sum);
  }
}

void quantize_bytes_avx2(const PackedLinear& w, const float* const* x, int rows, int planes, int64_t g0, int64_t g1,
                         const ByteRows& out) {
  (planes == 2 ? quantize_planes : quantize_plane<false, 1>)(w, x, rows, g0, g1, out);
}

template <WeightKind kKind>
void widen_kind(const uint8_t* p, int64_t k0, int64_t k1, float* out) {
  for (int64_t k = k0; k < k1; ++k, out += kPanel) {
    const Pair v = load_dense<kKind>(p + k * kRowBytes<kKind>);
    _mm256_storeu_ps(out, v.lo);
    _mm256_storeu_ps(out + 8, v.hi);
  }
}

void widen_avx2(const PackedLinear& w, int64_t panel, int64_t k0, int64_t k1, float* out) {
  const uint8_t* p = w.panel(panel);
  switch (w.kind) {
    case WeightKind::kFloat32:
      return widen_kind<WeightKind::kFloat32>(p, k0, k1, out);
    case WeightKind::kFloat16:
      return widen_kind<WeightKind::kFloat16>(p, k0, k1, out);
    default:
      return widen_kind<WeightKind::kBFloat16>(p, k0, k1, out);
  }
}

void dense_tile_avx2(const float* a, const float* b, int64_t kc, float* y) {
  __m256 acc[kDenseRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kDenseRows; ++r) {
    acc[r][0] = _mm256_loadu_ps(y + r * kPanel);
    acc[r][1] = _mm256_loadu_ps(y + r * kPanel + 8);
  }
  for (int64_t k = 0; k < kc; ++k, a += kDenseRows, b += kPanel) {
    const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
    for (int r = 0; r < kDenseRows; ++r) {
      const __m256 v = _mm256_broadcast_ss(a + r);
      acc[r][0] = _mm256_fmadd_ps(v, b0, acc[r][0]);
      acc[r][1] = _mm256_fmadd_ps(v, b1, acc[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kDenseRows; ++r) {
    _mm256_storeu_ps(y + r * kPanel, acc[r][0]);
    _mm256_storeu_ps(y + r * kPanel + 8, acc[r][1]);
  }
}

}  // namespace

const LinearKernels& linear_kernels_avx2() {
  static const WholeTiles whole{whole_parts_avx2, unpacked_bytes_avx2, unpack_bytes_avx2, quantize_whole_avx2,
                                whole_tile_avx2};
  static const ByteKernels bytes{bytes_serve_avx2, quantize_bytes_avx2, byte_tile_avx2, byte_row_avx2, &whole};
  static const LinearKernels k{widen_avx2,        dense_tile_avx2, unpack_avx2,
                               grouped_tile_avx2, gemv_avx2,       quantize_row_avx2, &bytes};
  return k;
}

}  // namespace qwen_rt

#endif
