// AVX-512 VNNI kernels of linear.h: a panel of 16 columns is one register, vpdpbusd adds four products a column.
#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>

#include "linear_tiles.h"

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
    _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), kOnce ? _MM_HINT_NTA : _MM_HINT_T0);
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

template <class To, class From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

struct Step {
  float size, inverse;
  int32_t zero;  // the bits of 1.5 * 2^(23 + e)
  int root;

  // The smallest of which `steps` reach `most`.
  Step(float most, float steps) {
    const auto bits = bits_of<uint32_t>(most > kTiny ? most * (0x1p15f / steps) : 1.0f);  // 2^15: a normal number
    const float mantissa = bits_of<float>((bits & 0x7fffff) | 0x3f800000);
    const int above = (mantissa > kRoot[0]) + (mantissa > kRoot[1]) + (mantissa > kRoot[2]) + (mantissa > kRoot[3]);
    const uint32_t exponent = (bits >> 23) + above / kRoots;
    root = above % kRoots;
    zero = static_cast<int32_t>(((exponent - 15 + 23) << 23) | 0x400000);
    size = most < kHuge ? bits_of<float>(exponent << 23) * 0x1p-15f * kRoot[root] : NAN;
    inverse = most > kTiny && most < kHuge ? 1.0f / size : 0.0f;
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
        acc[0][r] = _mm512_set1_epi32(in.fold[r].start);
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
        const __m512 sum = _mm512_sub_ps(_mm512_castsi512_ps(acc[0][r]), _mm512_set1_ps(in.fold[r].zero));
        total[r] = _mm512_fmadd_ps(sum, _mm512_load_ps(scales[in.fold[r].root]), total[r]);
      }
      if (kMin) total[r] = _mm512_fmadd_ps(min, _mm512_set1_ps(in.scaled_sum[r]), total[r]);
    }
    in.scale += R;
    in.start += R;
    in.scaled_sum += R;
    in.fold += R;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) _mm512_storeu_ps(y + r * ldy, total[r]);
}

template <WeightKind kKind, bool kMin, int R>
struct Tile {
  static constexpr ByteTile run = tile_of<kKind, kMin, R>;
};

// --- activations ------------------------------------------------------------------------------------------------------

// 16 bytes (4 words of 4 k each, in the packing's order) to where tile rows keep them.
inline void store_words(__m128i bytes, int8_t* out, int64_t step) {
  const auto put = [&](int i, int word) { __builtin_memcpy(out + i * step, &word, 4); };
  put(0, _mm_cvtsi128_si32(bytes));
  put(1, _mm_extract_epi32(bytes, 1));
  put(2, _mm_extract_epi32(bytes, 2));
  put(3, _mm_extract_epi32(bytes, 3));
}

template <int kPlanes>
void quantize_planes(const PackedLinear& w, const float* x, int64_t R, int64_t r, const ByteRows& to) {
  constexpr float kSteps = kPlanes == 2 ? kSteps16 : kSteps8;
  const __m128i order = w.kind == WeightKind::kInt8
                            ? _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15)
                            : _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  int8_t* out = to.x + 4 * r;
  for (int64_t g = 0; g < w.groups(); ++g, x += w.group) {
    // Magnitudes in the order of their bits, where infinity and NaN are above all numbers.
    __m512i top = _mm512_setzero_si512();
    for (int64_t i = 0; i < w.group; i += 16) {
      top = _mm512_max_epi32(top, _mm512_and_si512(load512(x + i), magnitude));
    }
    const Step step(bits_of<float>(_mm512_reduce_max_epi32(top)), kSteps);
    const __m512 inverse = _mm512_set1_ps(step.inverse);
    const __mmask16 any = step.inverse > 0.0f ? 0xffff : 0;  // zeros also where an input is NaN
    __m512i lower_sum = _mm512_setzero_si512(), upper_sum = lower_sum;
    for (int64_t i = 0; i < w.group; i += 16, out += 16 * R) {
      const __m512i q = _mm512_maskz_cvtps_epi32(any, _mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
      if constexpr (kPlanes == 2) {
        const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
        const __m512i lower = _mm512_sub_epi32(q, _mm512_slli_epi32(upper, 8));
        upper_sum = _mm512_add_epi32(upper_sum, upper);
        lower_sum = _mm512_add_epi32(lower_sum, lower);
        store_words(_mm_shuffle_epi8(_mm512_cvtepi32_epi8(upper), order), out, 4 * R);
        store_words(_mm_shuffle_epi8(_mm512_cvtepi32_epi8(lower), order), out + 4, 4 * R);
      } else {
        lower_sum = _mm512_add_epi32(lower_sum, q);
        store_words(_mm_shuffle_epi8(_mm512_cvtepi32_epi8(q), order), out, 4 * R);
      }
    }
    // A plane of 2^shift steps.
    const auto finish = [&](int64_t at, int shift, __m512i sum) {
      const int32_t total = _mm512_reduce_add_epi32(sum), start = start_of(w.kind, total);
      const float scale = step.size * static_cast<float>(1 << shift);
      const auto zero = static_cast<uint32_t>(step.zero + (shift << 23));
      at += g * R;
      to.scale[at] = scale;
      to.start[at] = start;
      to.scaled_sum[at] = scale * static_cast<float>(total);
      to.fold[at] = {static_cast<int32_t>(zero + (w.aux == Aux::kNone ? static_cast<uint32_t>(start) : 0u)),
                     scale == scale ? bits_of<float>(zero) : NAN, step.root};
    };
    if constexpr (kPlanes == 2) {
      finish(r, 8, upper_sum);
      finish(r + 1, 0, lower_sum);
    } else {
      finish(r, 0, lower_sum);
    }
  }
}

void quantize(const PackedLinear& w, const float* x, int planes, int64_t R, int64_t r, const ByteRows& out) {
  (planes == 2 ? quantize_planes<2> : quantize_planes<1>)(w, x, R, r, out);
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
