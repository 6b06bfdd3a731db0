// Element-wise kernels of a step. T is the compute dtype (f16, bf16); u its unit roundoff.
//
//   silu_mul_T     out = T(silu(gate) * up), silu(g) = g * (g < 0 ? e : 1) / (1 + e), e = exp(-|g|) in (0, 1], which
//                  cannot overflow; float32, within (10 + 1.25 |g|) 2^-24 + u of exact, relative (the argument of exp2 is
//                  |g| times a rounded constant, rounded); results below |up| 1e-35 may vanish.
//   embedding_X_T  out = T(table[id]), exact to the one rounding; table of X = f16, bf16, f32. An id outside the table
//                  makes its row NaN (so that the step's logits say so) and, where asked, counts in *bad.
//
// 8 values a thread where pointers and strides allow it, one at a time elsewhere and in the tail.
#include "elem.cuh"

namespace qrt {
namespace {

constexpr int kVec = 8;

QRT_DEVICE float silu(float g) {
  const float e = fast_exp(g < 0.0f ? g : -g);
  return g * (g < 0.0f ? e : 1.0f) / (1.0f + e);
}

// Calls f<N>(first element) for this thread's elements of a row of `size`: row blockIdx.x, part blockIdx.y of
// gridDim.y * blockDim.x threads.
template <class F>
QRT_DEVICE void for_row(int64_t size, bool wide, const F& f) {
  const int64_t threads = static_cast<int64_t>(gridDim.y) * blockDim.x;
  const int64_t me = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  const int64_t loads = wide ? size / kVec : 0;
  for (int64_t i = me; i < loads; i += threads) f.template at<kVec>(i * kVec);
  for (int64_t i = loads * kVec + me; i < size; i += threads) f.template at<1>(i);
}

template <class T>
struct SiluMul {
  T* out;
  const T *gate, *up;
  template <int N>
  QRT_DEVICE void at(int64_t i) const {
    float g[N], v[N];
    load_floats<T, N>(gate + i, g);
    load_floats<T, N>(up + i, v);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] *= silu(g[j]);
    store_floats<T, N>(out + i, v);
  }
};

template <class Out, class In>
struct Convert {
  Out* out;
  const In* in;
  template <int N>
  QRT_DEVICE void at(int64_t i) const {
    float v[N];
    load_floats<In, N>(in + i, v);
    store_floats<Out, N>(out + i, v);
  }
};

template <class T>
struct Fill {
  T* out;
  float value;
  template <int N>
  QRT_DEVICE void at(int64_t i) const {
    float v[N];
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = value;
    store_floats<T, N>(out + i, v);
  }
};

template <class T>
QRT_DEVICE void silu_mul(T* out, const T* gate_up, int64_t out_stride, int64_t stride, int size) {
  const bool wide = is_aligned(gate_up, stride, sizeof(T), 16) && is_aligned(gate_up, size, sizeof(T), 16) &&
                    is_aligned(out, out_stride, sizeof(T), 16);
  const int64_t row = blockIdx.x;
  const T* gate = gate_up + row * stride;
  for_row(size, wide, SiluMul<T>{out + row * out_stride, gate, gate + size});
}

template <class T, class X>
QRT_DEVICE void embedding(T* out, const int64_t* ids, const X* table, int64_t out_stride, int64_t table_stride,
                          int64_t vocab, int size, int32_t* bad) {
  const int64_t row = blockIdx.x, id = ids[row];
  const bool out_wide = is_aligned(out, out_stride, sizeof(T), 16);
  out += row * out_stride;
  if (id < 0 || id >= vocab) {
    if (bad && blockIdx.y == 0 && threadIdx.x == 0) atomicAdd(bad, 1);
    for_row(size, out_wide, Fill<T>{out, bits_float(0x7fc00000u)});
    return;
  }
  const bool wide = out_wide && is_aligned(table, table_stride, sizeof(X), 16);
  for_row(size, wide, Convert<T, X>{out, table + id * table_stride});
}

}  // namespace
}  // namespace qrt

// All: grid (rows, parts of a row), block 256 or fewer; strides of rows in elements.

// gate_up [rows, 2 * size], gate first -> out [rows, size]; no overlap.
#define QRT_SILU_MUL(NAME, T)                                                                                  \
  QRT_KERNEL(256) NAME(qrt::T* out, const qrt::T* gate_up, int64_t out_stride, int64_t stride, int32_t size) { \
    qrt::silu_mul<qrt::T>(out, gate_up, out_stride, stride, size);                                             \
  }                                                                                                            \
  QRT_REGISTER(NAME);

QRT_SILU_MUL(silu_mul_f16, half_t)
QRT_SILU_MUL(silu_mul_bf16, bf16_t)

// ids [rows], table [vocab, size] -> out [rows, size]; bad: null, or a counter of ids outside the table.
#define QRT_EMBEDDING(NAME, X, T)                                                                         \
  QRT_KERNEL(256)                                                                                         \
  NAME(qrt::T* out, const int64_t* ids, const X* table, int64_t out_stride, int64_t table_stride,         \
       int64_t vocab, int32_t size, int32_t* bad) {                                                       \
    qrt::embedding<qrt::T, X>(out, ids, table, out_stride, table_stride, vocab, size, bad);               \
  }                                                                                                       \
  QRT_REGISTER(NAME);

QRT_EMBEDDING(embedding_f16_f16, qrt::half_t, half_t)
QRT_EMBEDDING(embedding_bf16_f16, qrt::bf16_t, half_t)
QRT_EMBEDDING(embedding_f32_f16, float, half_t)
QRT_EMBEDDING(embedding_f16_bf16, qrt::half_t, bf16_t)
QRT_EMBEDDING(embedding_bf16_bf16, qrt::bf16_t, bf16_t)
QRT_EMBEDDING(embedding_f32_bf16, float, bf16_t)
