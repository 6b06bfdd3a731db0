// AVX-512 VNNI kernels of linear.h: a panel of 16 columns is one register, vpdpbusd adds four products a column.
#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>

#include "linear_tiles.h"
#include "prefetch_x86.h"

namespace qwen_rt {
namespace {

inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }

inline __m512 load_half16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Four bytes of activations in every lane.
inline __m512i broadcast4(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

// use(v, u) for each 4 k of a group: v holds unsigned codes, u alternates between 0 and 1. Group sizes are multiples of 16.
// kOnce: the weights are not read again soon, and are fetched so as to leave the activations in L1.
template <WeightKind kKind, bool kOnce, class F>
inline void each_vector(const uint8_t* codes, int64_t group, const F& use) {
  const __m512i low = _mm512_set1_epi8(0xf);
  const auto join = [](__m512i a, __m512i high, __m512i mask) {
    return _mm512_ternarylogic_epi32(a, high, mask, 0xf8);  // a | (high & mask)
  };
  constexpr int64_t kAhead = kKind == WeightKind::kInt8 ? 1536 : 4096;
  const auto ahead = [](const uint8_t* p) {
    (kOnce ? prefetch_once : prefetch_l1)(p + kAhead);
  };
  if constexpr (kKind == WeightKind::kInt4) {
    for (int64_t k = 0; k < group; k += 8, codes += 64) {
      const __m512i v = load512(codes);
      ahead(codes);
      use(_mm512_and_si512(v, low), 0);
      use(_mm512_and_si512(_mm512_srli_epi16(v, 4), low), 1);
    }
  } else if constexpr (kKind == WeightKind::kInt5) {
    const __m512i top = _mm512_set1_epi8(0x10);
    for (int64_t k = 0; k < group; k += 32, codes += 320) {
      const __m512i high = load512(codes + 256);
      ahead(codes);
      ahead(codes + 64);
      ahead(codes + 128);
      ahead(codes + 192);
      ahead(codes + 256);
      __m512i v = load512(codes);
      use(join(_mm512_and_si512(v, low), _mm512_slli_epi16(high, 4), top), 0);
      use(join(_mm512_and_si512(_mm512_srli_epi16(v, 4), low), _mm512_slli_epi16(high, 3), top), 1);
      v = load512(codes + 64);
      use(join(_mm512_and_si512(v, low), _mm512_slli_epi16(high, 2), top), 0);
      use(join(_mm512_and_si512(_mm512_srli_epi16(v, 4), low), _mm512_slli_epi16(high, 1), top), 1);
      v = load512(codes + 128);
      use(join(_mm512_and_si512(v, low), high, top), 0);
      use(join(_mm512_and_si512(_mm512_srli_epi16(v, 4), low), _mm512_srli_epi16(high, 1), top), 1);
      v = load512(codes + 192);
      use(join(_mm512_and_si512(v, low), _mm512_srli_epi16(high, 2), top), 0);
      use(join(_mm512_and_si512(_mm512_srli_epi16(v, 4), low), _mm512_srli_epi16(high, 3), top), 1);
    }
  } else if constexpr (kKind == WeightKind::kInt6) {
    const __m512i top = _mm512_set1_epi8(0x30);
    for (int64_t k = 0; k < group; k += 16, codes += 192) {
      const __m512i high = load512(codes + 128);
      ahead(codes);
      ahead(codes + 64);
      ahead(codes + 128);
      __m512i v = load512(codes);
      use(join(_mm512_and_si512(v, low), _mm512_slli_epi16(high, 4), top), 0);
      use(join(_mm512_and_si512(_mm512_srli_epi16(v, 4), low), _mm512_slli_epi16(high, 2), top), 1);
      v = load512(codes + 64);
      use(join(_mm512_and_si512(v, low), high, top), 0);
      use(join(_mm512_and_si512(_mm512_srli_epi16(v, 4), low), _mm512_srli_epi16(high, 2), top), 1);
    }
  } else {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t k = 0; k < group; k += 8, codes += 128) {
      ahead(codes);
      ahead(codes + 64);
      use(_mm512_xor_si512(load512(codes), sign), 0);
      use(_mm512_xor_si512(load512(codes + 64), sign), 1);
    }
  }
}

// Scale and minimum of a packed group; the zero point, where it is given, as a minimum.
inline void load_header(const uint8_t* group, Aux aux, __m512* scale, __m512* min) {
  *scale = load_half16(group);
  if (aux == Aux::kMins) *min = load_half16(group + 32);
  if (aux == Aux::kZeros) *min = -(*scale * load_half16(group + 32));
}

// --- steps of activations ---------------------------------------------------------------------------------------------
// Products run on two of the four vector pipes, and so do float multiplications; additions run on the others. A step is
// therefore 2^e times one of kRoots, which takes a multiplication off the end of each group and row: a sum that starts at
// the bits of 1.5 * 2^(23 + e) is itself, read as a float, that number plus 2^e times the sum (exactly, sums being at
// most 2^22), and the number is subtracted. What is left of the step multiplies the weight's scales, once for all rows.

constexpr int kRoots = 4;
constexpr float kRoot[kRoots] = {1.0f, 1.18920712f, 1.41421356f, 1.68179283f};  // 2^(i / kRoots)
constexpr float kHuge = 0x1p110f;  // inputs from here on count as infinite: the exponent above would not fit

// Steps of 16 rows.
struct Steps {
  __m512 size, inverse;
  __m512i zero;  // the bits of 1.5 * 2^(23 + e)
  __m512i root;

  // The smallest of which `steps` reach `most`. NaN from kHuge on, with an inverse of zero.
  Steps(__m512 most, float steps) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_set1_ps(kTiny), _CMP_GT_OQ);
    const __mmask16 finite = _mm512_cmp_ps_mask(most, _mm512_set1_ps(kHuge), _CMP_LT_OQ);
    const __m512 share = _mm512_mask_mul_ps(one, some, most, _mm512_set1_ps(0x1p15f / steps));  // 2^15: normal numbers
    const __m512 mantissa = _mm512_getmant_ps(share, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
    __m512i above = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (float threshold : kRoot) {
      const __mmask16 over = _mm512_cmp_ps_mask(mantissa, _mm512_set1_ps(threshold), _CMP_GT_OQ);
      above = _mm512_mask_add_epi32(above, over, above, _mm512_set1_epi32(1));
    }
    root = _mm512_and_si512(above, _mm512_set1_epi32(kRoots - 1));
    const __m512i exponent = _mm512_add_epi32(_mm512_srli_epi32(_mm512_castps_si512(share), 23), _mm512_srli_epi32(above, 2));
    const __m512i power = _mm512_slli_epi32(exponent, 23);
    zero = _mm512_add_epi32(power, _mm512_set1_epi32(((23 - 15) << 23) | 0x400000));
    const __m512 roots = _mm512_permutexvar_ps(root, _mm512_broadcast_f32x4(_mm_loadu_ps(kRoot)));
    size = _mm512_mul_ps(_mm512_mul_ps(_mm512_castsi512_ps(power), _mm512_set1_ps(0x1p-15f)), roots);
    size = _mm512_mask_mov_ps(_mm512_set1_ps(NAN), finite, size);
    inverse = _mm512_maskz_div_ps(some & finite, one, size);
  }
};

// --- one tile ---------------------------------------------------------------------------------------------------------

// R rows. Few of them have two sums each, so that one product need not wait for the one before; many take the step into
// their sums.
template <WeightKind kKind, bool kMin, int R>
void tile_of(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, ByteRows in, const float* sums, float* y,
             int64_t ldy) {
  constexpr bool kFew = R <= 4;
  constexpr int kChains = kFew ? 2 : 1;
  const uint8_t* group = w.panel(panel) + g0 * w.group_bytes;
  const int64_t header = header_bytes(w.aux);
  __m512 total[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) total[r] = g0 == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * kPanel);
  alignas(64) float scales[kRoots][kPanel];
  for (int64_t g = g0; g < g1; ++g, group += w.group_bytes) {
    __m512 scale, min = _mm512_setzero_ps();
    load_header(group, w.aux, &scale, &min);
    __m512i acc[kChains][R];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      if constexpr (kFew) {
        acc[0][r] = kMin ? _mm512_setzero_si512() : _mm512_set1_epi32(in.start[r]);
        acc[1][r] = _mm512_setzero_si512();
      } else {
        acc[0][r] = _mm512_set1_epi32(in.fold.start[r]);
      }
    }
    if constexpr (!kFew) {
#pragma GCC unroll 4
      for (int i = 0; i < kRoots; ++i) _mm512_store_ps(scales[i], _mm512_mul_ps(scale, _mm512_set1_ps(kRoot[i])));
    }
    int8_t* x = in.x;
    each_vector<kKind, kFew>(group + header, w.group, [&](__m512i codes, int u) __attribute__((always_inline)) {
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        __m512i& sum = acc[kFew ? u : 0][r];
        sum = _mm512_dpbusd_epi32(sum, codes, broadcast4(x + 4 * r));
      }
      x += 4 * R;
    });
    in.x = x;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      if constexpr (kFew) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[0][r], acc[1][r]));
        total[r] = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(in.scale[r])), total[r]);
      } else {
        const __m512 sum = _mm512_sub_ps(_mm512_castsi512_ps(acc[0][r]), _mm512_set1_ps(in.fold.zero[r]));
        total[r] = _mm512_fmadd_ps(sum, _mm512_load_ps(scales[in.fold.root[r]]), total[r]);
      }
      if (kMin) total[r] = _mm512_fmadd_ps(min, _mm512_set1_ps(in.scaled_sum[r]), total[r]);
    }
    in.scale += R;
    in.start += R;
    in.scaled_sum += R;
    in.fold = {in.fold.start + R, in.fold.zero + R, in.fold.root + R};
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) _mm512_storeu_ps(y + r * ldy, total[r]);
}

template <WeightKind kKind, bool kMin, int R>
struct Tile {
  static constexpr ByteTile run = tile_of<kKind, kMin, R>;
};

// --- activations ------------------------------------------------------------------------------------------------------

constexpr int64_t kMaxGroup = 256;

// Words of R rows of a group, [R][kMaxGroup], to where a tile keeps them: out [group / 4][R][4].
void interleave(const int8_t* lines, int64_t group, int64_t R, int8_t* out) {
  const auto line = [&](int64_t r, int64_t k) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(lines + r * kMaxGroup + k));
  };
  for (int64_t k = 0; k < group; k += 16, out += 16 * R) {
    int64_t r = 0;
    for (; r + 4 <= R; r += 4) {
      const __m128i a = line(r, k), b = line(r + 1, k), c = line(r + 2, k), d = line(r + 3, k);
      const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
      const __m128i ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
      const auto put = [&](int i, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4 * (i * R + r)), v); };
      put(0, _mm_unpacklo_epi64(ab, cd));
      put(1, _mm_unpackhi_epi64(ab, cd));
      put(2, _mm_unpacklo_epi64(ab2, cd2));
      put(3, _mm_unpackhi_epi64(ab2, cd2));
    }
    for (; r < R; ++r) {
      for (int i = 0; i < 4; ++i) __builtin_memcpy(out + 4 * (i * R + r), lines + r * kMaxGroup + k + 4 * i, 4);
    }
  }
}

// Adds the words of `group` inputs of R rows, [group / 4][R], up: the sum of each row.
inline __m512i sum_rows(const int8_t* x, int64_t group, int64_t R) {
  const __mmask16 rows = static_cast<__mmask16>((1 << R) - 1);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < group; k += 4, x += 4 * R) {
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi32(rows, x));
  }
  return sum;
}

template <int kPlanes>
void quantize_planes(const PackedLinear& w, const float* const* rows, int64_t count, int64_t g0, int64_t g1,
                     const ByteRows& to) {
  const int64_t R = count * kPlanes;
  const __mmask16 live = static_cast<__mmask16>((1 << R) - 1), upper_rows = kPlanes == 2 ? 0x5555 : 0;
  const __m128i order = w.kind == WeightKind::kInt8
                            ? _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15)
                            : _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  const auto put = [&](__m512i q, int8_t* out) {  // the low bytes, in the order of the packing
    _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(q), order));
  };
  alignas(64) int8_t lines[kByteTileRows * kMaxGroup];
  alignas(64) int32_t most[16] = {};
  alignas(64) float inverses[16];
  for (int64_t g = g0; g < g1; ++g) {
    for (int64_t r = 0; r < R; r += kPlanes) {
      // Magnitudes in the order of their bits, where infinity and NaN are above all numbers.
      const float* x = rows[r / kPlanes] + g * w.group;
      __m512i top = _mm512_setzero_si512();
      for (int64_t i = 0; i < w.group; i += 16) {
        top = _mm512_max_epi32(top, _mm512_and_si512(load512(x + i), _mm512_set1_epi32(0x7fffffff)));
      }
      most[r] = most[r + kPlanes - 1] = _mm512_reduce_max_epi32(top);
    }
    const Steps steps(_mm512_load_ps(most), kPlanes == 2 ? kSteps16 : kSteps8);
    _mm512_store_ps(inverses, steps.inverse);
    for (int64_t r = 0; r < R; r += kPlanes) {
      const float* x = rows[r / kPlanes] + g * w.group;
      int8_t* out = lines + r * kMaxGroup;
      const __m512 inverse = _mm512_set1_ps(inverses[r]);
      for (int64_t i = 0; i < w.group; i += 16, out += 16) {
        // NaN becomes -2^31, of which all that is kept is zeros.
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
        if constexpr (kPlanes == 2) {
          const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
          put(upper, out);
          put(_mm512_sub_epi32(q, _mm512_slli_epi32(upper, 8)), out + kMaxGroup);
        } else {
          put(q, out);
        }
      }
    }
    int8_t* x = to.x + g * w.group * R;
    interleave(lines, w.group, R, x);
    // Upper planes have 256 times the step.
    const __m512i sum = sum_rows(x, w.group, R);
    const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_mullo_epi32(sum, _mm512_set1_epi32(implied_zero(w.kind))));
    const __m512 scale = _mm512_mask_mul_ps(steps.size, upper_rows, steps.size, _mm512_set1_ps(256.0f));
    const __m512i zero = _mm512_mask_add_epi32(steps.zero, upper_rows, steps.zero, _mm512_set1_epi32(8 << 23));
    const int64_t at = g * R;
    _mm512_mask_storeu_ps(to.scale + at, live, scale);
    _mm512_mask_storeu_epi32(to.start + at, live, start);
    _mm512_mask_storeu_ps(to.scaled_sum + at, live, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum)));
    _mm512_mask_storeu_epi32(to.fold.start + at, live, w.aux == Aux::kNone ? _mm512_add_epi32(zero, start) : zero);
    // NaN where the scale is.
    _mm512_mask_storeu_ps(to.fold.zero + at, live, _mm512_mask_mov_ps(scale, _mm512_cmp_ps_mask(scale, scale, _CMP_EQ_OQ), _mm512_castsi512_ps(zero)));
    _mm512_mask_storeu_epi32(to.fold.root + at, live, steps.root);
  }
}

void quantize(const PackedLinear& w, const float* const* x, int rows, int planes, int64_t g0, int64_t g1,
              const ByteRows& out) {
  (planes == 2 ? quantize_planes<2> : quantize_planes<1>)(w, x, rows, g0, g1, out);
}

// Sums of unsigned bytes over long groups would be above 2^22.
bool serves(const PackedLinear& w, int, int64_t) {
  return w.grouped() && (w.kind != WeightKind::kInt8 || w.aux == Aux::kNone || w.group <= 128);
}

}  // namespace

const LinearKernels& linear_kernels_avx512() {
  static const ByteKernels bytes{serves, quantize, TileTable<Tile>::run};
  static const LinearKernels k = [] {
    LinearKernels all = linear_kernels_avx2();  // dense weights
    all.bytes = &bytes;
    return all;
  }();
  return k;
}

}  // namespace qwen_rt

#endif
