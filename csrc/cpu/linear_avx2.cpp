// AVX2 + FMA + F16C kernels of linear.h. Compiled with those flags: intrinsics and plain loops only, nothing that
// could leave an AVX2 copy of a shared inline function behind.
#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>

#include "linear.h"

namespace qwen_rt {
namespace {

struct Pair {
  __m256 lo, hi;  // columns 0-7 and 8-15
};

inline Pair load_half16(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
}

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

constexpr int kHeader(Aux aux) { return aux == Aux::kNone ? 32 : 64; }

// --- few rows: int16 activations, exact int32 sums within a group ---------------------------------------------------

// bits & mask of x shifted left by `by` (right where negative): moves a code's top bits over its low nibble.
inline __m256i shifted(__m256i x, int by, __m256i mask) {
  return _mm256_and_si256(by >= 0 ? _mm256_slli_epi16(x, by) : _mm256_srli_epi16(x, -by), mask);
}

// use(k, p0, p1) for each two k of a group: their codes as packed, as pairs of 16-bit integers, columns 0-7 and 8-15.
template <WeightKind kKind, class F>
__attribute__((always_inline)) inline void each_pair(const uint8_t* codes, int64_t group, const F& use) {
  const auto ahead = [](const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p + 1024), _MM_HINT_T0); };
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
    each_pair<kKind>(group + kHeader(kAux), w.group, [&](int64_t k, __m256i p0, __m256i p1) __attribute__((always_inline)) {
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
    const float* f = reinterpret_cast<const float*>(p);
    return {_mm256_loadu_ps(f), _mm256_loadu_ps(f + 8)};
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
    const __m256 inverse = _mm256_set1_ps(most > 0.0f ? kSteps16 / most : 0.0f);
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
  each_pair<kKind>(group + kHeader(aux), size, [&](int64_t, __m256i p0, __m256i p1) {
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

void grouped_tile_avx2(const GroupedTile& t, float* y) {
  const int16_t *x = t.x, *codes = t.codes;
  for (int64_t g = 0; g < t.groups; ++g) {
    __m256i acc[kGroupedRows][2];
#pragma GCC unroll 4
    for (int r = 0; r < kGroupedRows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < t.group; k += 2, x += 2 * kGroupedRows, codes += 2 * kPanel) {
      const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 16));
#pragma GCC unroll 4
      for (int r = 0; r < kGroupedRows; ++r) madd_into(acc[r], w0, w1, broadcast_pair(x + 2 * r));
    }
    const __m256 s0 = _mm256_loadu_ps(t.w_scale + g * kPanel), s1 = _mm256_loadu_ps(t.w_scale + g * kPanel + 8);
#pragma GCC unroll 4
    for (int r = 0; r < kGroupedRows; ++r) {
      const __m256 sx = _mm256_broadcast_ss(t.scale + g * kGroupedRows + r);
      float* out = y + r * kPanel;
      __m256 y0 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][0]), _mm256_mul_ps(s0, sx), _mm256_loadu_ps(out));
      __m256 y1 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][1]), _mm256_mul_ps(s1, sx), _mm256_loadu_ps(out + 8));
      if (t.w_min) {
        const __m256 total = _mm256_mul_ps(sx, _mm256_set1_ps(static_cast<float>(t.sum[g * kGroupedRows + r])));
        y0 = _mm256_fmadd_ps(_mm256_loadu_ps(t.w_min + g * kPanel), total, y0);
        y1 = _mm256_fmadd_ps(_mm256_loadu_ps(t.w_min + g * kPanel + 8), total, y1);
      }
      _mm256_storeu_ps(out, y0);
      _mm256_storeu_ps(out + 8, y1);
    }
  }
}

// --- many rows: byte products (vpmaddubsw), codes of up to 6 bits ----------------------------------------------------

// use(v, k4) for each 16 k of a group: v[4] are unsigned codes of 4 k each, for the 8 columns of one half panel.
template <WeightKind kKind, class F>
__attribute__((always_inline)) inline void each_quad(const uint8_t* codes, int64_t group, const F& use) {
  const __m256i low = _mm256_set1_epi8(0xf);
  constexpr int kLow = kKind == WeightKind::kInt4 ? 2 : kKind == WeightKind::kInt5 ? 4 : 2;  // low vectors at a time
  constexpr int kTop = kKind == WeightKind::kInt4 ? 0 : kKind == WeightKind::kInt5 ? 1 : 2;
  const __m256i top = _mm256_set1_epi8(((1 << kTop) - 1) << 4);
  for (int64_t k = 0; k < group; k += 8 * kLow, codes += 64 * (kLow + (kTop > 0))) {
    __m256i high = low;
    if constexpr (kTop > 0) high = load256(codes + 64 * kLow);
#pragma GCC unroll 2
    for (int quad = 0; quad < kLow / 2; ++quad) {
      __m256i v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i nibbles = load256(codes + 64 * (2 * quad + i / 2));
        v[i] = _mm256_and_si256(i % 2 ? _mm256_srli_epi16(nibbles, 4) : nibbles, low);
        if constexpr (kTop > 0) v[i] = _mm256_or_si256(v[i], shifted(high, 4 - kTop * (4 * quad + i), top));
      }
      use(v, (k + 16 * quad) / 4);
    }
  }
}

// Half a panel (8 columns from 8 * half), R rows of a tile of `stride`.
template <WeightKind kKind, bool kMin, int R>
void byte_half(const PackedLinear& w, int64_t panel, int half, int64_t g0, int64_t g1, ByteRows in, int stride, float* y) {
  const __m256i ones = _mm256_set1_epi16(1);
  const uint8_t* group = w.panel(panel) + g0 * w.group_bytes;
  for (int64_t g = g0; g < g1; ++g, group += w.group_bytes) {
    __m256i acc[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) acc[r] = kMin ? _mm256_setzero_si256() : _mm256_set1_epi32(in.start[r]);
    each_quad<kKind>(group + kHeader(w.aux) + 32 * half, w.group, [&](const __m256i(&v)[4], int64_t k4) __attribute__((always_inline)) {
      const int8_t* x = in.x + 4 * k4 * stride;
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const auto product = [&](int i) __attribute__((always_inline)) {
          int32_t word;
          __builtin_memcpy(&word, x + 4 * (i * stride + r), 4);
          return _mm256_maddubs_epi16(v[i], _mm256_set1_epi32(word));
        };
        // A product of two is at most 2 * 127 * code: four of 5 bits fit 16, two of 6 bits do.
        const __m256i a = _mm256_add_epi16(product(0), product(1)), b = _mm256_add_epi16(product(2), product(3));
        if constexpr (kKind == WeightKind::kInt6) {
          acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(a, ones));
          acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(b, ones));
        } else {
          acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(_mm256_add_epi16(a, b), ones));
        }
      }
    });
    const auto halves = [&](int at) {
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group + at + 16 * half)));
    };
    const __m256 s = halves(0);
    const __m256 min = !kMin ? s : w.aux == Aux::kMins ? halves(32) : -(s * halves(32));
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      float* out = y + r * kPanel + 8 * half;
      __m256 total = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[r]), _mm256_mul_ps(s, _mm256_broadcast_ss(in.scale + r)));
      if (g > 0) total = _mm256_add_ps(total, _mm256_loadu_ps(out));
      if (kMin) total = _mm256_fmadd_ps(min, _mm256_broadcast_ss(in.scaled_sum + r), total);
      _mm256_storeu_ps(out, total);
    }
    in.x += w.group * stride;
    in.scale += stride;
    in.start += stride;
    in.scaled_sum += stride;
  }
}

template <WeightKind kKind, bool kMin>
void byte_rows(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, const ByteRows& in, int rows, float* y) {
  using Half = void (*)(const PackedLinear&, int64_t, int, int64_t, int64_t, ByteRows, int, float*);
  constexpr Half kHalf[6] = {byte_half<kKind, kMin, 1>, byte_half<kKind, kMin, 2>, byte_half<kKind, kMin, 3>,
                             byte_half<kKind, kMin, 4>, byte_half<kKind, kMin, 5>, byte_half<kKind, kMin, 6>};
  for (int r = 0; r < rows; r += 6) {
    const ByteRows from{in.x + 4 * r, in.scale + r, in.start + r, in.scaled_sum + r};
    const int count = rows - r < 6 ? rows - r : 6;
    for (int half = 0; half < 2; ++half) kHalf[count - 1](w, panel, half, g0, g1, from, rows, y + r * kPanel);
  }
}

template <WeightKind kKind>
void byte_aux(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, const ByteRows& in, int rows, float* y) {
  (w.aux == Aux::kNone ? byte_rows<kKind, false> : byte_rows<kKind, true>)(w, panel, g0, g1, in, rows, y);
}

void byte_tile_avx2(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, const ByteRows& in, int rows,
                    float* y) {
  const auto kind = w.kind == WeightKind::kInt4   ? byte_aux<WeightKind::kInt4>
                    : w.kind == WeightKind::kInt5 ? byte_aux<WeightKind::kInt5>
                                                  : byte_aux<WeightKind::kInt6>;
  kind(w, panel, g0, g1, in, rows, y);
}

bool bytes_serve_avx2(const PackedLinear& w, int planes) { return w.kind <= WeightKind::kInt6 && planes == 1; }

void quantize_bytes_avx2(const PackedLinear& w, const float* x, int, int64_t R, int64_t r, int8_t* xq, float* scale,
                         int32_t* start, float* scaled_sum) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 0, 0, 0, 0, 0, 0, 0, 0);
  int8_t* out = xq + 4 * r;
  for (int64_t g = 0; g < w.groups(); ++g, scale += R, start += R, scaled_sum += R) {
    const float* xg = x + g * w.group;
    // Magnitudes in the order of their bits, where infinity and NaN are above all numbers.
    __m256i top = _mm256_setzero_si256();
    for (int64_t i = 0; i < w.group; i += 8) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(xg + i));
      top = _mm256_max_epi32(top, _mm256_and_si256(v, magnitude));
    }
    __m128i t = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1));
    const float most = _mm_cvtss_f32(_mm_castsi128_ps(t));
    const __m256 inverse = _mm256_set1_ps(most > 0.0f ? kSteps8 / most : 0.0f);
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < w.group; i += 8, out += 8 * R) {
      const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(xg + i), inverse));
      total = _mm256_add_epi32(total, q);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
      const int64_t bytes = _mm_cvtsi128_si64(_mm_shuffle_epi8(_mm_packs_epi16(words, words), order));
      __builtin_memcpy(out, &bytes, 4);
      __builtin_memcpy(out + 4 * R, reinterpret_cast<const char*>(&bytes) + 4, 4);
    }
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    const int32_t sum = _mm_cvtsi128_si32(s);
    scale[r] = most < INFINITY ? most / kSteps8 : NAN;
    start[r] = -implied_zero(w.kind) * sum;
    scaled_sum[r] = scale[r] * static_cast<float>(sum);
  }
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
  static const ByteKernels bytes{bytes_serve_avx2, quantize_bytes_avx2, byte_tile_avx2};
  static const LinearKernels k{widen_avx2,        dense_tile_avx2, unpack_avx2,
                               grouped_tile_avx2, gemv_avx2,       quantize_row_avx2, &bytes};
  return k;
}

}  // namespace qwen_rt

#endif
