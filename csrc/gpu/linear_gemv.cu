// y = x W^T + bias for few rows of x: bandwidth-bound, every packed byte is read once.
//
// linear_rows_{int4,int8}_{f16,bf16}_r{8,16,32} (matrix units): a block owns 16 outputs (gridDim.x = ceil(N / 16)), its
// warps take the tiles of K in turn, so that a block streams contiguous kilobytes; up to four tiles are in flight a
// warp. Weights are the A operand, built in registers; a lane's x comes straight from the first-level cache, as each
// warp needs a part of x that no other warp of the block does. Warps meet once, in shared memory.
// linear_rows_simt_..._r{1,2,4,8}: the same walk with float32 (gfx906: fdot2) arithmetic, for devices without MMA.
// gridDim.z > 1 splits K over blocks: float32 sums go to partial[z][rows][N], linear_reduce_* adds them in order of z.
//
// Arithmetic: code - zero is exact in either 16-bit type, products with x are exact, sums are float32: first over the
// steps of a group, then scale * sum (+ min * sum of x) over groups, then warps, then splits. Nothing is rounded to 16
// bits before the result, so against exact
//     |error| <= (K + 8) u32 * sum_k |x_k| (scale |code - zero| or scale code + |min|)  +  u |y|
// with u32 = 2^-24 (2^-23 where a matrix unit truncates its sums) and u of the output type.
#include "linear_mma.cuh"

namespace qrt {
namespace linear {

#if QRT_HAS_MMA
template <class T, int Bits, int MaxRows, bool Min>
QRT_DEVICE void few_rows(T* y, float* partial, const T* x, const Weight& w, const float* bias, int rows) {
  constexpr int kB = MaxRows > kColumns ? MaxRows / kColumns : 1;  // B operands side by side
  constexpr int kFlight = kB == 1 && !Min ? 4 : 2;                 // tiles in flight
  constexpr int kTileK = Packing<Bits>::kTileK, kSteps = Packing<Bits>::kSteps;
  __shared__ float sums[kWarps][kB * kColumns][kTileN + 1];
  const int lane = lane_id(), warp = warp_id(), tile_n = static_cast<int>(blockIdx.x);
  const int tiles = w.tiles_k<Bits>();
  const int first = static_cast<int>(static_cast<int64_t>(tiles) * blockIdx.z / gridDim.z);
  const int last = static_cast<int>(static_cast<int64_t>(tiles) * (blockIdx.z + 1) / gridDim.z);
  const word_t* base = w.tile<Bits>(tile_n, 0);
  const T* mine = x + static_cast<int64_t>(b_col(lane)) * w.k + 4 * slot(lane);
  const int64_t stride = static_cast<int64_t>(kColumns) * w.k;

  const auto load_b = [&](int b, int k) {
    const quad_t zero = {{0u, 0u}};
    return b * kColumns + b_col(lane) < rows
               ? load_nc(reinterpret_cast<const quad_t*>(mine + b * stride + k))
               : zero;
  };
  mma::C total[kB], part[kB], xsum[Min ? kB : 1];
  QRT_UNROLL
  for (int b = 0; b < kB; ++b) {
    zero(total[b]), zero(part[b]);
    if constexpr (Min) zero(xsum[b]);
  }
  const auto flush = [&](const Rows<Bits, Min>& r) {
    QRT_UNROLL
    for (int b = 0; b < kB; ++b) {
      add_group(total[b], part[b], xsum[Min ? b : 0], r);
      if constexpr (Min) zero(xsum[b]);
    }
  };
  const auto step = [&](const Words& q, int s, int k, const Zeros<Bits>& z) {
    const mma::A<T> a = make_a<T, Bits>(q, s, z);
    QRT_UNROLL
    for (int b = 0; b < kB; ++b) {
      const mma::B<T> xb = make_b<T>(load_b(b, k));
      mma::run(part[b], a, xb);
      if constexpr (Min) mma::run(xsum[b], ones<T>(), xb);
    }
  };

  if (w.whole_tiles<Bits>()) {
    for (int at = first + warp; at < last; at += kWarps * kFlight) {
      Words q[kFlight];
      Rows<Bits, Min> r[kFlight];
      QRT_UNROLL
      for (int f = 0; f < kFlight; ++f) {
        const int tile = min(at + f * kWarps, last - 1);
        q[f] = load_words(base + static_cast<int64_t>(tile) * kTileWords, lane);
        load_rows(r[f], w, tile_n, tile * kTileK / w.group, lane);
      }
      QRT_UNROLL
      for (int f = 0; f < kFlight; ++f) {
        const int tile = at + f * kWarps;
        if (tile < last) {
          const Zeros<Bits> z = make_zeros<T>(r[f]);
          QRT_UNROLL
          for (int s = 0; s < kSteps; ++s) step(q[f], s, tile * kTileK + 16 * s, z);
          flush(r[f]);
        }
      }
    }
  } else {
    for (int tile = first + warp; tile < last; tile += kWarps) {
      const Words q = load_words(base + static_cast<int64_t>(tile) * kTileWords, lane);
      int g = tile * kTileK / w.group, left = (g + 1) * w.group - tile * kTileK;  // inputs left of the group
      QRT_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        const int k = tile * kTileK + 16 * s;
        if (k < w.k) {
          Rows<Bits, Min> r;
          load_rows(r, w, tile_n, g, lane);
          step(q, s, k, make_zeros<T>(r));
          flush(r);
          left -= 16;
          if (left == 0) left = w.group, ++g;
        }
      }
    }
  }

  QRT_UNROLL
  for (int b = 0; b < kB; ++b) {
    QRT_UNROLL
    for (int i = 0; i < mma::NC; ++i) {
      sums[warp][b * kColumns + mma::c_col(lane, i)][mma::c_row(lane, i)] = total[b].v[i];
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < rows * kTileN; i += kThreads) {
    const int row = i / kTileN, m = i % kTileN, n = tile_n * kTileN + m;
    float sum = 0.f;
    QRT_UNROLL
    for (int v = 0; v < kWarps; ++v) sum += sums[v][row][m];
    if (n < w.n) put(y, partial, bias, rows, w.n, row, n, sum);
  }
}
#endif

#if QRT_LINEAR_SIMT
template <class T, int Bits, int MaxRows>
QRT_DEVICE void few_rows_simt(T* y, float* partial, const T* x, const Weight& w, const float* bias, int rows) {
  constexpr int kTileK = Packing<Bits>::kTileK, kSteps = Packing<Bits>::kSteps;
  __shared__ float sums[kWarps][MaxRows][kTileN + 1];
  const int lane = lane_id(), warp = warp_id(), tile_n = static_cast<int>(blockIdx.x), t = lane & 3;
  const int tiles = w.tiles_k<Bits>();
  const int first = static_cast<int>(static_cast<int64_t>(tiles) * blockIdx.z / gridDim.z);
  const int last = static_cast<int>(static_cast<int64_t>(tiles) * (blockIdx.z + 1) / gridDim.z);
  const word_t* base = w.tile<Bits>(tile_n, 0);
  const uint32_t one = from_float<T>(1.f).u, ones = twice(one);

  float total[kWordsPerLane][MaxRows];
  QRT_UNROLL
  for (int h = 0; h < kWordsPerLane; ++h) {
    QRT_UNROLL
    for (int r = 0; r < MaxRows; ++r) total[h][r] = 0.f;
  }
  for (int tile = first + warp; tile < last; tile += kWarps) {
    word_t q[kWordsPerLane];
    QRT_UNROLL
    for (int h = 0; h < kWordsPerLane; ++h) {
      q[h] = load_stream(base + static_cast<int64_t>(tile) * kTileWords + h * kWarp + lane);
    }
    int g = tile * kTileK / w.group, left = (g + 1) * w.group - tile * kTileK;
    float part[kWordsPerLane][MaxRows], xsum[MaxRows];
    Zero zero[kWordsPerLane];
    bool fresh = true;  // a group begins
    QRT_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const int k = tile * kTileK + 16 * s;
      if (k < w.k) {
        if (fresh) {
          fresh = false;
          QRT_UNROLL
          for (int r = 0; r < MaxRows; ++r) xsum[r] = 0.f;
          QRT_UNROLL
          for (int h = 0; h < kWordsPerLane; ++h) {
            zero[h] = Codes<T, Bits>::zero(w.zero<Bits>(g, tile_n * kTileN + (h * kWarp + lane) / 4));
            QRT_UNROLL
            for (int r = 0; r < MaxRows; ++r) part[h][r] = 0.f;
          }
        }
        quad_t xs[MaxRows];
        QRT_UNROLL
        for (int r = 0; r < MaxRows; ++r) {
          const quad_t none = {{0u, 0u}};
          const T* from = x + static_cast<int64_t>(r) * w.k + k + 4 * t;
          xs[r] = r < rows ? load_nc(reinterpret_cast<const quad_t*>(from)) : none;
          if (w.mins) xsum[r] = dot2<T>(xs[r][1], ones, dot2<T>(xs[r][0], ones, xsum[r]));
        }
        QRT_UNROLL
        for (int h = 0; h < kWordsPerLane; ++h) {
          uint32_t pair[2];
          Codes<T, Bits>::pairs(q[h], s, zero[h], pair);
          QRT_UNROLL
          for (int r = 0; r < MaxRows; ++r) {
            part[h][r] = dot2<T>(xs[r][1], pair[1], dot2<T>(xs[r][0], pair[0], part[h][r]));
          }
        }
        left -= 16;
        if (left == 0 || s == kSteps - 1 || k + 16 >= w.k) {
          QRT_UNROLL
          for (int h = 0; h < kWordsPerLane; ++h) {
            const int row = tile_n * kTileN + (h * kWarp + lane) / 4;
            const float scale = w.scale(g, row), offset = w.mins ? w.minimum(g, row) : 0.f;
            QRT_UNROLL
            for (int r = 0; r < MaxRows; ++r) {
              total[h][r] = fmaf(scale, part[h][r], total[h][r]);
              if (w.mins) total[h][r] = fmaf(offset, xsum[r], total[h][r]);
            }
          }
          fresh = true;
          if (left == 0) left = w.group, ++g;
        }
      }
    }
  }

  QRT_UNROLL
  for (int h = 0; h < kWordsPerLane; ++h) {
    QRT_UNROLL
    for (int r = 0; r < MaxRows; ++r) {
      float sum = total[h][r];
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      if (t == 0) sums[warp][r][(h * kWarp + lane) / 4] = sum;
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < rows * kTileN; i += kThreads) {
    const int row = i / kTileN, m = i % kTileN, n = tile_n * kTileN + m;
    float sum = 0.f;
    QRT_UNROLL
    for (int v = 0; v < kWarps; ++v) sum += sums[v][row][m];
    if (n < w.n) put(y, partial, bias, rows, w.n, row, n, sum);
  }
}
#endif

template <class T>
QRT_DEVICE void reduce(T* y, const float* partial, const float* bias, int rows, int n, int splits) {
  const int64_t size = static_cast<int64_t>(rows) * n;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = partial[i];
  for (int z = 1; z < splits; ++z) sum += partial[z * size + i];
  y[i] = from_float<T>(bias ? sum + bias[i % n] : sum);
}

}  // namespace linear
}  // namespace qrt

// rows <= the number at the end of the name. _min kernels are for weights with mins, the others for those without; the
// SIMT ones take either.
#define QRT_LINEAR_ROWS(bits, type, t, max)                                                                           \
  QRT_LINEAR_KERNEL(linear_rows_int##bits##_##t##_r##max, (qrt::linear::few_rows<qrt::type, bits, max, false>), type)
#define QRT_LINEAR_ROWS_MIN(bits, type, t, max)                                                                       \
  QRT_LINEAR_KERNEL(linear_rows_int##bits##_##t##_min_r##max, (qrt::linear::few_rows<qrt::type, bits, max, true>),    \
                    type)
#define QRT_LINEAR_ROWS_ALL(bits, type, t) \
  QRT_LINEAR_ROWS(bits, type, t, 8)        \
  QRT_LINEAR_ROWS(bits, type, t, 16)       \
  QRT_LINEAR_ROWS(bits, type, t, 32)       \
  QRT_LINEAR_ROWS_MIN(bits, type, t, 8)    \
  QRT_LINEAR_ROWS_MIN(bits, type, t, 32)
#if QRT_HAS_MMA
QRT_LINEAR_ROWS_ALL(4, half_t, f16)
QRT_LINEAR_ROWS_ALL(8, half_t, f16)
#if QRT_HAS_MMA_BF16
QRT_LINEAR_ROWS_ALL(4, bf16_t, bf16)
QRT_LINEAR_ROWS_ALL(8, bf16_t, bf16)
#endif
#endif

#if QRT_LINEAR_SIMT
#define QRT_LINEAR_ROWS_SIMT(bits, type, t, max)                                                                      \
  QRT_LINEAR_KERNEL(linear_rows_simt_int##bits##_##t##_r##max, (qrt::linear::few_rows_simt<qrt::type, bits, max>),    \
                    type)
#define QRT_LINEAR_ROWS_SIMT_ALL(bits, type, t) \
  QRT_LINEAR_ROWS_SIMT(bits, type, t, 1)        \
  QRT_LINEAR_ROWS_SIMT(bits, type, t, 2)        \
  QRT_LINEAR_ROWS_SIMT(bits, type, t, 4)        \
  QRT_LINEAR_ROWS_SIMT(bits, type, t, 8)
QRT_LINEAR_ROWS_SIMT_ALL(4, half_t, f16)
QRT_LINEAR_ROWS_SIMT_ALL(8, half_t, f16)
QRT_LINEAR_ROWS_SIMT_ALL(4, bf16_t, bf16)
QRT_LINEAR_ROWS_SIMT_ALL(8, bf16_t, bf16)
#endif

// y [rows, n] = sum over z < splits of partial [z][rows][n], in order, + bias; one thread an element.
QRT_KERNEL(256) linear_reduce_f16(qrt::half_t* y, const float* partial, const float* bias, int32_t rows, int32_t n,
                                  int32_t splits) {
  qrt::linear::reduce(y, partial, bias, rows, n, splits);
}
QRT_REGISTER(linear_reduce_f16);
QRT_KERNEL(256) linear_reduce_bf16(qrt::bf16_t* y, const float* partial, const float* bias, int32_t rows, int32_t n,
                                   int32_t splits) {
  qrt::linear::reduce(y, partial, bias, rows, n, splits);
}
QRT_REGISTER(linear_reduce_bf16);

// out [rows, k] = x[:, perm]: activations of an act-order weight, in the order its columns are stored in.
QRT_KERNEL(256) linear_gather(uint16_t* out, const uint16_t* x, const int32_t* perm, int32_t rows, int32_t k) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * qrt::linear::kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(rows) * k) return;
  out[i] = x[i / k * k + perm[i % k]];
}
QRT_REGISTER(linear_gather);
