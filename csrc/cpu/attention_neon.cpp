// AArch64 kernels of attention.h: a tile of 64 keys and values is converted to float32 rows once, whatever the number of
// query rows, and stays in L1 or L2 while they pass by, four at a time. Dot products take four keys together, weighted
// values 16 dims. The arithmetic and the bound are those of attention.h: keys are summed in four lanes of D / 4, 2^x is
// within 3 * 2^-24 of itself.
#if defined(__aarch64__)

#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "attention.h"

namespace qwen_rt {
namespace {

constexpr int64_t kTile = kAttentionTile;
constexpr int kBlock = 4;

// --- formats: eight elements to float32; int8 as codes ---------------------------------------------------------------

struct Float32 {
  using T = float;
  static constexpr bool kCoded = false;
  static float32x4x2_t load(const T* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
};

struct Float16 {
  using T = uint16_t;
  static constexpr bool kCoded = false;
  static float32x4x2_t load(const T* p) {
    const float16x8_t x = vreinterpretq_f16_u16(vld1q_u16(p));
    return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)};
  }
};

struct BFloat16 {
  using T = uint16_t;
  static constexpr bool kCoded = false;
  static float32x4x2_t load(const T* p) {
    const uint16x8_t x = vld1q_u16(p);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(x, 16))};
  }
};

struct Int8 {
  using T = uint8_t;
  static constexpr bool kCoded = true;
  static float32x4x2_t load(const T* p) {
    const uint16x8_t x = vmovl_u8(vld1_u8(p));
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(x))), vcvtq_f32_u32(vmovl_high_u16(x))};
  }
};

// Keys or values [begin, begin + n) of the sequence as rows of `stride` floats, zeros (int8: the minimum) from the head
// size on.
template <class F>
void convert(const AttentionTile& t, const KvPages& pages, int64_t begin, int64_t n, float* out) {
  const KvLayer& kv = *t.kv;
  for (int64_t j = begin; j < begin + n; ++j, out += t.stride) {
    const int64_t row = kv.row(t.table[j / kv.block], t.head, j % kv.block);
    const typename F::T* from = static_cast<const typename F::T*>(pages.data) + row * kv.size;
    const float scale = F::kCoded ? pages.scale[row] : 1.0f;
    const float32x4_t min = vdupq_n_f32(F::kCoded ? pages.min[row] : 0.0f);
    for (int64_t d = 0; d < t.stride; d += 8) {
      typename F::T part[8] = {};
      if (d < kv.size && d + 8 > kv.size) memcpy(part, from + d, static_cast<size_t>(kv.size - d) * sizeof(part[0]));
      float32x4x2_t x = F::load(d + 8 <= kv.size ? from + d : part);
      if constexpr (F::kCoded) {
        x.val[0] = vfmaq_n_f32(min, x.val[0], scale);
        x.val[1] = vfmaq_n_f32(min, x.val[1], scale);
      }
      vst1q_f32(out + d, x.val[0]);
      vst1q_f32(out + d + 4, x.val[1]);
    }
  }
}

// --- products of M rows ----------------------------------------------------------------------------------------------

// scores[r][j] = q[r] . keys[j] for j < n, a multiple of four: those past the tile's end are of no use, and masked.
template <int M>
void multiply_keys(const float* q, const float* keys, int64_t stride, int64_t n, float* scores) {
  for (int64_t j = 0; j < n; j += 4, keys += 4 * stride) {
    float32x4_t acc[M][4];
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = vdupq_n_f32(0.0f);
    for (int64_t d = 0; d < stride; d += 4) {
      float32x4_t k[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) k[i] = vld1q_f32(keys + i * stride + d);
#pragma GCC unroll 4
      for (int r = 0; r < M; ++r) {
        const float32x4_t x = vld1q_f32(q + r * stride + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = vfmaq_f32(acc[r][i], x, k[i]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
      vst1q_f32(scores + r * kTile + j, vpaddq_f32(vpaddq_f32(acc[r][0], acc[r][1]), vpaddq_f32(acc[r][2], acc[r][3])));
    }
  }
}

// out[r] = factor[r] out[r] + sum_j weights[r][j] values[j], j < n.
template <int M>
void add_values(const float* weights, const float* values, int64_t stride, int64_t n, const float* factor, float* out) {
  for (int64_t d = 0; d < stride; d += 16) {
    float32x4_t acc[M][4];
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = vmulq_n_f32(vld1q_f32(out + r * stride + d + 4 * i), factor[r]);
    }
    for (int64_t j = 0; j < n; ++j) {
      float32x4_t v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) v[i] = vld1q_f32(values + j * stride + d + 4 * i);
#pragma GCC unroll 4
      for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = vfmaq_n_f32(acc[r][i], v[i], weights[r * kTile + j]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) vst1q_f32(out + r * stride + d + 4 * i, acc[r][i]);
    }
  }
}

using MultiplyKeys = void (*)(const float*, const float*, int64_t, int64_t, float*);
using AddValues = void (*)(const float*, const float*, int64_t, int64_t, const float*, float*);
constexpr MultiplyKeys kMultiplyKeys[kBlock] = {multiply_keys<1>, multiply_keys<2>, multiply_keys<3>, multiply_keys<4>};
constexpr AddValues kAddValues[kBlock] = {add_values<1>, add_values<2>, add_values<3>, add_values<4>};

// --- softmax ---------------------------------------------------------------------------------------------------------

// 2^x for x <= 0 within 3 * 2^-24 of itself; below -126 (no normal floats any more) it is 0. NaN stays NaN.
float32x4_t exp2_nonpositive(float32x4_t x) {
  const float32x4_t n = vrndnq_f32(x), f = vsubq_f32(x, n);
  float32x4_t p = vdupq_n_f32(kExp2[0]);
#pragma GCC unroll 4
  for (int i = 1; i < 5; ++i) p = vfmaq_f32(vdupq_n_f32(kExp2[i]), p, f);
  p = vfmaq_f32(vdupq_n_f32(1.0f), p, f);
  const uint32x4_t bits = vaddq_u32(vreinterpretq_u32_f32(p), vshlq_n_u32(vreinterpretq_u32_s32(vcvtnq_s32_f32(n)), 23));
  return vreinterpretq_f32_u32(vbicq_u32(bits, vcltq_f32(x, vdupq_n_f32(-126.0f))));
}

// Scores s[0:n] (n a multiple of four), of which keys [low, high) are visible, become weights 2^(s - max) with the row's
// new maximum; `sum` is updated. Returns the factor that brings what was summed under the old maximum to the new one.
float softmax_step(float* s, int64_t low, int64_t high, int64_t n, float* max, float* sum) {
  for (int64_t j = 0; j < n; ++j) {
    if (j < low || j >= high) s[j] = -INFINITY;
  }
  float32x4_t highest = vdupq_n_f32(*max);
  for (int64_t j = 0; j < n; j += 4) highest = vmaxq_f32(highest, vld1q_f32(s + j));
  const float top = vmaxvq_f32(highest);
  const float32x4_t base = vdupq_n_f32(top == -INFINITY ? 0.0f : top);  // nothing visible yet: all weights are 0
  float32x4_t total = vdupq_n_f32(0.0f);
  for (int64_t j = 0; j < n; j += 4) {
    const float32x4_t e = exp2_nonpositive(vsubq_f32(vld1q_f32(s + j), base));
    vst1q_f32(s + j, e);
    total = vaddq_f32(total, e);
  }
  const float factor = *max == top ? 1.0f : exp2f(*max - top);
  *max = top;
  *sum = *sum * factor + vaddvq_f32(total);
  return factor;
}

template <class F>
void attend(const AttentionTile& t) {
  float* const keys = t.scratch;
  float* const values = keys + kTile * t.stride;
  float* const scores = values + kTile * t.stride;
  memset(t.out, 0, static_cast<size_t>(t.rows * t.stride) * sizeof(float));
  for (int64_t r = 0; r < t.rows; ++r) {
    t.max[r] = -INFINITY;
    t.sum[r] = 0.0f;
  }
  for (int64_t begin = t.begin; begin < t.end; begin += kTile) {
    const int64_t n = t.end - begin < kTile ? t.end - begin : kTile;
    convert<F>(t, t.kv->k, begin, n, keys);
    convert<F>(t, t.kv->v, begin, n, values);
    int64_t m;
    for (int64_t r0 = 0; r0 < t.rows; r0 += m) {
      m = t.rows - r0 < kBlock ? t.rows - r0 : kBlock;
      // Keys of the tile that a row sees: [low, high), of those that are there.
      const auto low = [&](int64_t r) { return t.window > 0 ? t.first_pos + r / t.group - t.window + 1 - begin : 0; };
      const auto high = [&](int64_t r) { return t.first_pos + r / t.group + 1 - begin; };
      const int64_t count = high(r0 + m - 1) < n ? high(r0 + m - 1) : n;
      if (count <= 0 || low(r0) >= n) continue;
      const int64_t columns = (count + 3) / 4 * 4;
      kMultiplyKeys[m - 1](t.q + r0 * t.stride, keys, t.stride, columns, scores);
      float factor[kBlock];
      for (int64_t r = 0; r < m; ++r) {
        const int64_t end = high(r0 + r) < n ? high(r0 + r) : n;
        factor[r] = softmax_step(scores + r * kTile, low(r0 + r), end, columns, t.max + r0 + r, t.sum + r0 + r);
      }
      kAddValues[m - 1](scores, values, t.stride, count, factor, t.out + r0 * t.stride);
    }
  }
}

}  // namespace

void attend_neon(const AttentionTile& tile) {
  attend_for(tile.kv->type, attend<Float32>, attend<Float16>, attend<BFloat16>, attend<Int8>)(tile);
}

}  // namespace qwen_rt

#endif
