// AVX2 + FMA + F16C kernels of linear.h. Compiled with those flags: intrinsics and plain loops only, nothing that
// could leave an AVX2 copy of a shared inline function behind.
#if defined(__x86_64__)

#include <immintrin.h>

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

template <WeightKind kKind, int kRows>
inline void dot_codes(const uint8_t* codes, int64_t group, const int16_t* x, int64_t ldx, __m256i (&acc)[kRows][2]) {
  if constexpr (kKind == WeightKind::kInt4) {
    const __m256i mask = _mm256_set1_epi16(0xf);
    for (int64_t k = 0; k < group; k += 8, codes += 64) {
      const __m256i v0 = load256(codes), v1 = load256(codes + 32);
      _mm_prefetch(reinterpret_cast<const char*>(codes + 1024), _MM_HINT_T0);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i p0 = _mm256_and_si256(_mm256_srli_epi16(v0, 4 * i), mask);
        const __m256i p1 = _mm256_and_si256(_mm256_srli_epi16(v1, 4 * i), mask);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) madd_into(acc[r], p0, p1, broadcast_pair(x + r * ldx + k + 2 * i));
      }
    }
  } else {
    for (int64_t k = 0; k < group; k += 4, codes += 64) {
      const __m256i v0 = load256(codes), v1 = load256(codes + 32);
      _mm_prefetch(reinterpret_cast<const char*>(codes + 1024), _MM_HINT_T0);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m256i p0 = _mm256_srai_epi16(i == 0 ? _mm256_slli_epi16(v0, 8) : v0, 8);
        const __m256i p1 = _mm256_srai_epi16(i == 0 ? _mm256_slli_epi16(v1, 8) : v1, 8);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) madd_into(acc[r], p0, p1, broadcast_pair(x + r * ldx + k + 2 * i));
      }
    }
  }
}

template <WeightKind kKind, Aux kAux, int kRows>
void gemv_grouped(const PackedLinear& w, int64_t panel, const GemvInput& in, int row0, float* y) {
  // What an unsigned code lost on packing: int4 codes are as stored, int8 codes minus 128.
  constexpr int kShift = kKind == WeightKind::kInt8 ? 128 : 0;
  constexpr int kMiddle = kKind == WeightKind::kInt8 ? 128 : 8;
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
      constexpr int kOffset = kAux == Aux::kMins ? kShift : kShift - kMiddle;
      for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm256_set1_epi32(kOffset * sum[r * groups + g]);
    }
    dot_codes<kKind, kRows>(group + kHeader(kAux), w.group, x + g * w.group, ldx, acc);
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
  if constexpr (kKind == WeightKind::kInt4 || kKind == WeightKind::kInt8) {
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
    const __m256 inverse = _mm256_set1_ps(most > 0.0f ? 32767.0f / most : 0.0f);
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
    scale[g] = most / 32767.0f + _mm_cvtss_f32(bad);
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
    z0 = z1 = _mm256_set1_epi16(aux == Aux::kMins ? -kShift : kKind == WeightKind::kInt8 ? 0 : 8);
  }
  const uint8_t* codes = group + kHeader(aux);
  const auto store = [&](__m256i p0, __m256i p1) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_sub_epi16(p0, z0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_sub_epi16(p1, z1));
    out += 32;
  };
  if constexpr (kKind == WeightKind::kInt4) {
    const __m256i mask = _mm256_set1_epi16(0xf);
    for (int64_t k = 0; k < size; k += 8, codes += 64) {
      const __m256i v0 = load256(codes), v1 = load256(codes + 32);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        store(_mm256_and_si256(_mm256_srli_epi16(v0, 4 * i), mask), _mm256_and_si256(_mm256_srli_epi16(v1, 4 * i), mask));
      }
    }
  } else {
    for (int64_t k = 0; k < size; k += 4, codes += 64) {
      const __m256i v0 = load256(codes), v1 = load256(codes + 32);
      store(_mm256_srai_epi16(_mm256_slli_epi16(v0, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(v1, 8), 8));
      store(_mm256_srai_epi16(v0, 8), _mm256_srai_epi16(v1, 8));
    }
  }
}

void unpack_avx2(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, int16_t* codes, float* scale,
                 float* min) {
  const uint8_t* group = w.panel(panel) + g0 * w.group_bytes;
  for (int64_t g = g0; g < g1; ++g, group += w.group_bytes, codes += w.group * kPanel) {
    if (w.kind == WeightKind::kInt4) {
      unpack_group<WeightKind::kInt4>(group, w.aux, w.group, codes);
    } else {
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
  static const LinearKernels k{widen_avx2,        dense_tile_avx2, unpack_avx2,
                               grouped_tile_avx2, gemv_avx2,       quantize_row_avx2};
  return k;
}

}  // namespace qwen_rt

#endif
