// AArch64 kernels of linear.h with FEAT_DotProd. A panel of 16 columns is four registers; SDOT adds four products a
// column, and takes the activations from one word of a register that holds those of four rows.
//
// SDOT is signed by signed. Codes of 4 to 6 bits are the same as signed bytes. Those of int8 are multiplied as they are
// packed, minus 128; what a group's sum loses by it, 128 times the sum of x, is where the sum begins. Products and sums
// of a group are exact in int32, as with AVX-512, and a group ends with the same float multiply-adds: the bound is that
// of linear.h.
#if defined(__aarch64__)

#include <arm_neon.h>
#include <math.h>

#include <type_traits>
#include <utility>

#include "linear_tiles.h"

namespace qwen_rt {
namespace {

// f(integral_constant<int, i>()) for each i < n: lanes and shifts are immediates.
template <class F, int... i>
__attribute__((always_inline)) inline void each_of(std::integer_sequence<int, i...>, const F& f) {
  (f(std::integral_constant<int, i>()), ...);
}

template <int n, class F>
__attribute__((always_inline)) inline void each(const F& f) {
  each_of(std::make_integer_sequence<int, n>(), f);
}

inline float32x4_t load_half4(const uint8_t* p) {
  uint16x4_t bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return vcvt_f32_f16(vreinterpret_f16_u16(bits));
}

// --- one tile ---------------------------------------------------------------------------------------------------------

// Codes of 4 k, four columns, from a low vector (its upper nibbles with kUpper) and the unit's vector of top bits, which
// `by` shifts to bit 4 (left, right where negative).
template <WeightKind kKind, bool kUpper>
inline int8x16_t codes_of(const uint8_t* low, const uint8_t* high, int8x16_t by) {
  constexpr int kTop = layout_of(kKind).top;
  uint8x16_t codes = vld1q_u8(low);
  if constexpr (kKind != WeightKind::kInt8) codes = kUpper ? vshrq_n_u8(codes, 4) : vandq_u8(codes, vdupq_n_u8(0xf));
  if constexpr (kTop > 0) {
    codes = vbslq_u8(vdupq_n_u8(((1 << kTop) - 1) << 4), vshlq_u8(vld1q_u8(high), by), codes);
  }
  return vreinterpretq_s8_u8(codes);
}

// 4 k of R rows: four rows a register, the last of which ends with the last row.
template <int R>
struct Activations {
  int8x16_t rows[(R + 3) / 4];

  __attribute__((always_inline)) explicit Activations(const int8_t* x) {
    if constexpr (R >= 4) {
      each<R / 4>([&](auto i) __attribute__((always_inline)) { rows[i] = vld1q_s8(x + 16 * i); });
      if constexpr (R % 4 != 0) rows[R / 4] = vld1q_s8(x + 4 * R - 16);
    } else {
      int64_t two = 0;
      __builtin_memcpy(&two, x, R == 1 ? 4 : 8);
      int32x4_t words = vreinterpretq_s32_s64(vdupq_n_s64(two));
      if constexpr (R == 3) {
        int32_t third;
        __builtin_memcpy(&third, x + 8, 4);
        words = vsetq_lane_s32(third, words, 2);
      }
      rows[0] = vreinterpretq_s8_s32(words);
    }
  }

  // sum += codes times row r.
  template <int r>
  __attribute__((always_inline)) int32x4_t add_to(int32x4_t sum, int8x16_t codes) const {
    constexpr int lane = R > 4 && r / 4 == R / 4 ? r - (R - 4) : r % 4;
    return vdotq_laneq_s32(sum, codes, rows[r / 4], lane);
  }
};

// R rows. Their sums fill the registers: few rows take a panel at a time, so that its codes are read in their order, and
// many take half of it.
template <WeightKind kKind, bool kMin, int R>
void tile_of(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, ByteRows in, const float* sums, float* y,
             int64_t ldy) {
  constexpr int kWide = R <= 4 ? 4 : 2;  // registers
  constexpr int kUnit = layout_of(kKind).ks, kLow = 64 * layout_of(kKind).low, kTop = layout_of(kKind).top;
  // ByteRows::start is for codes without 128 taken off, and for no minimum.
  constexpr bool kInt8 = kKind == WeightKind::kInt8;
  const uint8_t* group = w.panel(panel) + g0 * w.group_bytes;
  const int64_t header = header_bytes(w.aux);
  for (int64_t g = g0; g < g1; ++g, group += w.group_bytes) {
    for (int64_t column = 0; column < kPanel; column += 4 * kWide) {
      int32x4_t acc[R][kWide];
      each<R>([&](auto r) __attribute__((always_inline)) {
        const int32x4_t start = vdupq_n_s32(in.start[r]);
        each<kWide>([&](auto i) __attribute__((always_inline)) {
          acc[r][i] = kMin != kInt8 ? vdupq_n_s32(0) : kInt8 ? vnegq_s32(start) : start;
        });
      });
      const uint8_t* unit = group + header + 4 * column;
      const int8_t* x = in.x;
      for (int64_t k = 0; k < w.group; k += kUnit, unit += layout_of(kKind).unit_bytes()) {
        int8x16_t by = vdupq_n_s8(4);
        for (const uint8_t* low = unit; low < unit + kLow; low += 64) {
          if constexpr (kLow > 64) __asm__("" : "+r"(low));  // not unrolled, which would take too many registers
          each<kInt8 ? 1 : 2>([&](auto u) __attribute__((always_inline)) {
            const Activations<R> rows(x);
            x += 4 * R;
            each<kWide>([&](auto i) __attribute__((always_inline)) {
              const int8x16_t codes = codes_of<kKind, u == 1>(low + 16 * i, unit + kLow + 16 * i, by);
              each<R>([&](auto r) __attribute__((always_inline)) {
                acc[r][i] = rows.template add_to<r>(acc[r][i], codes);
              });
            });
            by = vsubq_s8(by, vdupq_n_s8(kTop));
          });
        }
      }
      each<kWide>([&](auto i) __attribute__((always_inline)) {
        const uint8_t* head = group + 2 * (column + 4 * i);
        const float32x4_t scale = load_half4(head);
        float32x4_t min = scale;
        if constexpr (kMin) min = load_half4(head + 32);
        if (kMin && w.aux == Aux::kZeros) min = vnegq_f32(vmulq_f32(scale, min));
        each<R>([&](auto r) __attribute__((always_inline)) {
          float* out = y + r * ldy + column + 4 * i;
          float32x4_t total = g == 0    ? vdupq_n_f32(0.0f)
                              : g == g0 ? vld1q_f32(sums + r * kPanel + column + 4 * i)
                                        : vld1q_f32(out);
          total = vfmaq_f32(total, vcvtq_f32_s32(acc[r][i]), vmulq_n_f32(scale, in.scale[r]));
          if constexpr (kMin) total = vfmaq_n_f32(total, min, in.scaled_sum[r]);
          vst1q_f32(out, total);
        });
      });
    }
    in.x += w.group * R;
    in.scale += R;
    in.start += R;
    in.scaled_sum += R;
  }
}

template <WeightKind kKind, bool kMin, int R>
struct Tile {
  static constexpr ByteTile run = tile_of<kKind, kMin, R>;
};

// --- activations ------------------------------------------------------------------------------------------------------

// Integers that fit bytes, low parts only.
inline int8x16_t narrow(const int32x4_t (&q)[4]) {
  return vcombine_s8(vmovn_s16(vcombine_s16(vmovn_s32(q[0]), vmovn_s32(q[1]))),
                     vmovn_s16(vcombine_s16(vmovn_s32(q[2]), vmovn_s32(q[3]))));
}

template <int kPlanes>
void quantize_planes(const PackedLinear& w, const float* const* rows, int64_t count, int64_t g0, int64_t g1,
                     const ByteRows& to) {
  const int64_t R = count * kPlanes;
  constexpr float kSteps = kPlanes == 2 ? kSteps16 : kSteps8;
  constexpr uint8_t kOrder[2][16] = {{0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15},
                                     {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15}};
  const uint8x16_t order = vld1q_u8(kOrder[w.kind == WeightKind::kInt8]);
  // Four words of 4 k each, in the order of the packing, to where tile rows keep them.
  const auto put = [&](const int32x4_t(&q)[4], int8_t* out) {
    int8_t bytes[16];
    vst1q_s8(bytes, vqtbl1q_s8(narrow(q), order));
    for (int i = 0; i < 4; ++i) __builtin_memcpy(out + i * 4 * R, bytes + 4 * i, 4);
  };
  // Group by group of all rows, so that what is written lies together.
  for (int64_t at = g0 * count; at < g1 * count; ++at) {
    const int64_t g = at / count, r = at % count * kPlanes;
    const float* x = rows[at % count] + g * w.group;
    int8_t* out = to.x + g * w.group * R + 4 * r;
    // Magnitudes in the order of their bits, where infinity and NaN are above all numbers.
    uint32x4_t top = vdupq_n_u32(0);
    for (int64_t i = 0; i < w.group; i += 4) {
      top = vmaxq_u32(top, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + i))));
    }
    const uint32_t bits = vmaxvq_u32(top);
    float most;
    __builtin_memcpy(&most, &bits, 4);
    const float inverse = most > kTiny ? kSteps / most : 0.0f;
    const float step = most < INFINITY ? most / kSteps : NAN;
    int32x4_t lower_sum = vdupq_n_s32(0), upper_sum = lower_sum;
    for (int64_t i = 0; i < w.group; i += 16, out += 16 * R) {
      int32x4_t lower[4], upper[4];
      for (int j = 0; j < 4; ++j) {
        lower[j] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4 * j), inverse));
        if constexpr (kPlanes == 2) {
          upper[j] = vrshrq_n_s32(lower[j], 8);
          lower[j] = vsubq_s32(lower[j], vshlq_n_s32(upper[j], 8));
          upper_sum = vaddq_s32(upper_sum, upper[j]);
        }
        lower_sum = vaddq_s32(lower_sum, lower[j]);
      }
      if constexpr (kPlanes == 2) put(upper, out);
      put(lower, out + 4 * (kPlanes - 1));
    }
    const auto finish = [&](int64_t row, float factor, int32x4_t sum) {
      const int32_t total = vaddvq_s32(sum);
      to.scale[g * R + row] = factor;
      to.start[g * R + row] = start_of(w.kind, total);
      to.scaled_sum[g * R + row] = factor * static_cast<float>(total);
    };
    if constexpr (kPlanes == 2) finish(r, 256.0f * step, upper_sum);
    finish(r + kPlanes - 1, step, lower_sum);
  }
}

void quantize(const PackedLinear& w, const float* const* x, int rows, int planes, int64_t g0, int64_t g1,
              const ByteRows& out) {
  (planes == 2 ? quantize_planes<2> : quantize_planes<1>)(w, x, rows, g0, g1, out);
}

}  // namespace

const LinearKernels& linear_kernels_neon() {
  static const ByteKernels bytes{TileTable<Tile>::serves, quantize, TileTable<Tile>::run};
  static const LinearKernels k = [] {
    LinearKernels all = linear_kernels_scalar();  // dense weights
    all.bytes = &bytes;
    return all;
  }();
  return k;
}

}  // namespace qwen_rt

#endif
