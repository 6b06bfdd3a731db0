// RMSNorm over the last axis, with an optional float32 residual added first:
//   s = x + residual;  normed = T(T(s / sqrt(mean(s^2) + eps)) * weight);  summed = s
// T is the compute dtype (f16, bf16): normalise in float32, cast, multiply by the weight (the order of the original
// model). The sum of the D squares is float32 in per-thread partial sums joined by a tree; root and quotient are IEEE.
// With u the unit roundoff of T, relative to exact: normed within 2 u + (D/2 + 8) 2^-24, summed within 2^-24; an f16
// below 2^-14 instead has an absolute error of 2^-25 in each of the two roundings.
//
//   rms_norm_{f16,bf16}      x of T        one block a row
//   rms_norm_f32_{f16,bf16}  x of float32  one block a row
//   rms_norm_heads_{...}     x of T        one warp a head of [T, H, D] (query and key norms of Qwen3), no residual
//
// 8 values (16 bytes of T) a load where pointers and strides allow it, one at a time elsewhere and in the tail. A row of
// up to 32 * blockDim values is read once and held in registers. `normed` may be `x` and `summed` may be `residual` or
// a float32 `x`, row for row; no other overlap.
#include "elem.cuh"

namespace qrt {
namespace {

constexpr int kVec = 8;   // values a load
constexpr int kHeld = 4;  // loads a thread keeps

// Where a row's values come from, and where their sum goes: residual and summed both null or both set.
template <class X>
struct RmsSource {
  const X* x;
  const float* residual;
  float* summed;

  // Values [at, at + N), summed with the residual and written back.
  template <int N>
  QRT_DEVICE void first(int64_t at, float (&s)[N]) const {
    load_floats<X, N>(x + at, s);
    if (residual) {
      float r[N];
      load_floats<float, N>(residual + at, r);
#pragma unroll
      for (int i = 0; i < N; ++i) s[i] += r[i];
      store_floats<float, N>(summed + at, s);
    }
  }
  // The same values once more.
  template <int N>
  QRT_DEVICE void again(int64_t at, float (&s)[N]) const {
    if (residual) {
      load_floats<float, N>(summed + at, s);
    } else {
      load_floats<X, N>(x + at, s);
    }
  }
};

template <int N>
QRT_DEVICE float add_squares(const float (&s)[N], float total) {
#pragma unroll
  for (int i = 0; i < N; ++i) total += s[i] * s[i];
  return total;
}

template <class T, int N>
QRT_DEVICE void write_normed(T* normed, const T* weight, int64_t at, const float (&s)[N], float scale) {
  float w[N], y[N];
  load_floats<T, N>(weight + at, w);
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = rounded_to<T>(s[i] * scale) * w[i];
  store_floats<T, N>(normed + at, y);
}

QRT_DEVICE float rms_scale(float squares, int size, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(size) + eps);
}

template <class T, class X>
QRT_DEVICE void rms_norm_row(float* partial, T* normed, const X* x, const T* weight, const float* residual,
                             float* summed, int64_t normed_stride, int64_t x_stride, int64_t residual_stride,
                             int64_t summed_stride, int size, float eps) {
  const int64_t row = blockIdx.x;
  bool wide = is_aligned(x, x_stride, sizeof(X), 16) && is_aligned(normed, normed_stride, sizeof(T), 16) &&
              is_aligned(weight, 0, sizeof(T), 16);
  if (residual) {
    wide = wide && is_aligned(residual, residual_stride, 4, 16) && is_aligned(summed, summed_stride, 4, 16);
    residual += row * residual_stride;
    summed += row * summed_stride;
  }
  const RmsSource<X> source{x + row * x_stride, residual, summed};
  normed += row * normed_stride;
  const int loads = wide ? size / kVec : 0;
  const int threads = blockDim.x, me = threadIdx.x;

  float held[kHeld][kVec], one[1], squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = me + i * threads;
    if (at < loads) {
      source.first(static_cast<int64_t>(at) * kVec, held[i]);
      squares = add_squares(held[i], squares);
    }
  }
  for (int at = me + kHeld * threads; at < loads; at += threads) {
    float s[kVec];
    source.first(static_cast<int64_t>(at) * kVec, s);
    squares = add_squares(s, squares);
  }
  for (int at = loads * kVec + me; at < size; at += threads) {
    source.first(at, one);
    squares = add_squares(one, squares);
  }

  const float scale = rms_scale(block_sum(squares, partial), size, eps);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = me + i * threads;
    if (at < loads) write_normed(normed, weight, static_cast<int64_t>(at) * kVec, held[i], scale);
  }
  for (int at = me + kHeld * threads; at < loads; at += threads) {
    float s[kVec];
    source.again(static_cast<int64_t>(at) * kVec, s);
    write_normed(normed, weight, static_cast<int64_t>(at) * kVec, s, scale);
  }
  for (int at = loads * kVec + me; at < size; at += threads) {
    source.again(at, one);
    write_normed(normed, weight, at, one, scale);
  }
}

template <class T>
QRT_DEVICE void rms_norm_head(T* normed, const T* x, const T* weight, int64_t normed_row, int64_t normed_head,
                              int64_t x_row, int64_t x_head, int heads, int size, float eps) {
  const int head = static_cast<int>(blockIdx.y) * (static_cast<int>(blockDim.x) / kWarp) + warp_id();
  if (head >= heads) return;
  constexpr int kPart = 128 / kWarp;  // a warp moves 128 values at a time
  const bool wide = is_aligned(x, x_row, sizeof(T), kPart * sizeof(T)) &&
                    is_aligned(x, x_head, sizeof(T), kPart * sizeof(T)) &&
                    is_aligned(normed, normed_row, sizeof(T), kPart * sizeof(T)) &&
                    is_aligned(normed, normed_head, sizeof(T), kPart * sizeof(T)) &&
                    is_aligned(weight, 0, sizeof(T), kPart * sizeof(T));
  const int64_t row = blockIdx.x;
  const RmsSource<T> source{x + row * x_row + head * x_head, nullptr, nullptr};
  normed += row * normed_row + head * normed_head;
  const int loads = wide ? size / kPart : 0, lane = lane_id();

  float part[kPart], one[1], squares = 0.0f;
  for (int at = lane; at < loads; at += kWarp) {
    source.first(at * kPart, part);
    squares = add_squares(part, squares);
  }
  for (int at = loads * kPart + lane; at < size; at += kWarp) {
    source.first(at, one);
    squares = add_squares(one, squares);
  }
  const float scale = rms_scale(warp_sum(squares), size, eps);
  for (int at = lane; at < loads; at += kWarp) {
    source.again(at * kPart, part);
    write_normed(normed, weight, at * kPart, part, scale);
  }
  for (int at = loads * kPart + lane; at < size; at += kWarp) {
    source.again(at, one);
    write_normed(normed, weight, at, one, scale);
  }
}

}  // namespace
}  // namespace qrt

// normed [rows, size] T, x [rows, size], weight [size] T, residual and summed [rows, size] float32 (both null: none);
// strides of rows in elements. Grid (rows); block 256.
#define QRT_RMS_NORM(NAME, T, X)                                                                                     \
  QRT_KERNEL(256)                                                                                                    \
  NAME(qrt::T* normed, const X* x, const qrt::T* weight, const float* residual, float* summed, int64_t normed_stride, \
       int64_t x_stride, int64_t residual_stride, int64_t summed_stride, int32_t size, float eps) {                  \
    __shared__ float partial[32];                                                                                    \
    qrt::rms_norm_row<qrt::T, X>(partial, normed, x, weight, residual, summed, normed_stride, x_stride,              \
                                 residual_stride, summed_stride, size, eps);                                         \
  }                                                                                                                  \
  QRT_REGISTER(NAME);

QRT_RMS_NORM(rms_norm_f16, half_t, qrt::half_t)
QRT_RMS_NORM(rms_norm_bf16, bf16_t, qrt::bf16_t)
QRT_RMS_NORM(rms_norm_f32_f16, half_t, float)
QRT_RMS_NORM(rms_norm_f32_bf16, bf16_t, float)

// normed, x [tokens, heads, size] T with strides of tokens (row) and heads in elements; weight [size] T.
// Grid (tokens, ceil(heads / warps a block)); block 256 or fewer.
#define QRT_RMS_NORM_HEADS(NAME, T)                                                                             \
  QRT_KERNEL(256)                                                                                               \
  NAME(qrt::T* normed, const qrt::T* x, const qrt::T* weight, int64_t normed_row, int64_t normed_head,          \
       int64_t x_row, int64_t x_head, int32_t heads, int32_t size, float eps) {                                 \
    qrt::rms_norm_head<qrt::T>(normed, x, weight, normed_row, normed_head, x_row, x_head, heads, size, eps);    \
  }                                                                                                             \
  QRT_REGISTER(NAME);

QRT_RMS_NORM_HEADS(rms_norm_heads_f16, half_t)
QRT_RMS_NORM_HEADS(rms_norm_heads_bf16, bf16_t)
