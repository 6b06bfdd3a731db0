// y = x W^T + bias for many rows of x, and whole weights or single rows of them as 16-bit floats.
//
// linear_tile_{int4,int8}_{f16,bf16}[_min] (matrix units): a block owns 128 outputs x 64 rows (gridDim.x =
// ceil(N / 128), gridDim.y = ceil(rows / 64)), its warps 16 outputs each (wave64: 32) and all 64 rows. A warp reads its
// own packed tiles and makes the A operand in registers; x goes through shared memory, two buffers of one k tile (128 or
// 64 inputs), the next one on its way (cp_async) while the present one is used. One barrier a tile.
// linear_tile_simt_...: 64 outputs x 64 rows a block, float32 tiles of 32 (16) inputs in shared memory, 4 x 4 results a
// thread, for devices without matrix units.
// gridDim.z > 1 splits K as in linear_gemv.cu (partial, linear_reduce_*).
// linear_dequantize_...: the dense weight [N, K] in the 16-bit type, for a vendor's matrix product.
// packed_embedding_...: rows of the table.
//
// Arithmetic. linear_tile: as linear_gemv.cu (exact code - zero, float32 sums, scale applied to the sum of a group):
//     |error| <= (K + 8) u32 * sum_k |x_k| (scale |code - zero| or scale code + |min|)  +  u |y|
// linear_tile_simt: weights in float32 (two roundings), float32 FMA over k in order: the same bound.
// linear_dequantize, packed_embedding: weights in float32 (two roundings), then rounded once to the 16-bit type; a
// product with them costs u sum |x w| more than the above.
#include "linear_mma.cuh"

namespace qrt {
namespace linear {

constexpr int kTileRows = 64;  // rows of x in a block

#if QRT_HAS_MMA
constexpr int kBlockN = 128;
constexpr int kTilesOfWarp = kBlockN / kTileN / kWarps;  // 1 at warp 32, 2 at warp 64
constexpr int kPad = kWarp == 32 ? 16 : 8;  // elements: 8-byte reads of a B operand meet few bank conflicts

template <class T, int Bits, bool Min>
QRT_DEVICE void many_rows(T* y, float* partial, const T* x, const Weight& w, const float* bias, int rows) {
  constexpr int kB = kTileRows / kColumns;
  constexpr int kTileK = Packing<Bits>::kTileK, kSteps = Packing<Bits>::kSteps, kStride = kTileK + kPad;
  constexpr int kChunks = kTileRows * kTileK / 8;  // 16 bytes each
  constexpr int kXBytes = 2 * kTileRows * kStride * 2, kSumBytes = kBlockN / kTileN * kTileRows * (kTileN + 1) * 4;
  constexpr int kBytes = kXBytes > kSumBytes ? kXBytes : kSumBytes;
  static_assert(kBytes <= 48 << 10, "static shared memory");
  __shared__ word_t shared[kBytes / 16];
  T* xs = reinterpret_cast<T*>(shared);  // [2][kTileRows][kStride]
  float* sums = reinterpret_cast<float*>(shared);  // [kBlockN / 16][kTileRows][17], after the last product
  const int lane = lane_id(), warp = warp_id(), row0 = static_cast<int>(blockIdx.y) * kTileRows;
  const int tiles = w.tiles_k<Bits>(), tiles_n = w.padded_n() / kTileN;
  const int first = static_cast<int>(static_cast<int64_t>(tiles) * blockIdx.z / gridDim.z);
  const int last = static_cast<int>(static_cast<int64_t>(tiles) * (blockIdx.z + 1) / gridDim.z);
  const int tile_n0 = static_cast<int>(blockIdx.x) * (kBlockN / kTileN) + warp * kTilesOfWarp;

  const auto load_x = [&](int tile) {
    T* to = xs + (tile & 1) * kTileRows * kStride;
    QRT_UNROLL
    for (int i = 0; i < kChunks / kThreads; ++i) {
      const int chunk = static_cast<int>(threadIdx.x) + i * kThreads;
      const int row = chunk / (kTileK / 8), k = chunk % (kTileK / 8) * 8;
      const bool valid = row0 + row < rows && tile * kTileK + k < w.k;
      cp_async16(to + row * kStride + k,
                 valid ? x + static_cast<int64_t>(row0 + row) * w.k + tile * kTileK + k : x, valid);
    }
    cp_async_commit();
  };
  // Warps past the last output read the last tile and store nothing.
  const auto tile_of = [&](int m) { return min(tile_n0 + m, tiles_n - 1); };

  mma::C total[kTilesOfWarp][kB], part[kTilesOfWarp][kB], xsum[Min ? kB : 1];
  QRT_UNROLL
  for (int b = 0; b < kB; ++b) {
    QRT_UNROLL
    for (int m = 0; m < kTilesOfWarp; ++m) zero(total[m][b]), zero(part[m][b]);
    if constexpr (Min) zero(xsum[b]);
  }
  const auto flush = [&](const Rows<Bits, Min> (&r)[kTilesOfWarp]) {
    QRT_UNROLL
    for (int b = 0; b < kB; ++b) {
      QRT_UNROLL
      for (int m = 0; m < kTilesOfWarp; ++m) add_group(total[m][b], part[m][b], xsum[Min ? b : 0], r[m]);
      if constexpr (Min) zero(xsum[b]);
    }
  };
  const auto step = [&](const Words (&q)[kTilesOfWarp], int s, const T* from,
                        const Zeros<Bits> (&zeros)[kTilesOfWarp]) {
    mma::A<T> a[kTilesOfWarp];
    QRT_UNROLL
    for (int m = 0; m < kTilesOfWarp; ++m) a[m] = make_a<T, Bits>(q[m], s, zeros[m]);
    QRT_UNROLL
    for (int b = 0; b < kB; ++b) {
      const mma::B<T> xb = make_b<T>(load_vec<uint32_t, 2>(reinterpret_cast<const uint32_t*>(
          from + (b * kColumns + b_col(lane)) * kStride + 16 * s + 4 * slot(lane))));
      QRT_UNROLL
      for (int m = 0; m < kTilesOfWarp; ++m) mma::run(part[m][b], a[m], xb);
      if constexpr (Min) mma::run(xsum[b], ones<T>(), xb);
    }
  };
  const auto make_z = [](Zeros<Bits> (&z)[kTilesOfWarp], const Rows<Bits, Min> (&r)[kTilesOfWarp]) {
    QRT_UNROLL
    for (int m = 0; m < kTilesOfWarp; ++m) z[m] = make_zeros<T>(r[m]);
  };
  const auto load_w = [&](Words (&q)[kTilesOfWarp], int tile) {
    QRT_UNROLL
    for (int m = 0; m < kTilesOfWarp; ++m) q[m] = load_words(w.tile<Bits>(tile_of(m), tile), lane);
  };
  const auto load_r = [&](Rows<Bits, Min> (&r)[kTilesOfWarp], int g) {
    QRT_UNROLL
    for (int m = 0; m < kTilesOfWarp; ++m) load_rows(r[m], w, tile_of(m), g, lane);
  };

  Words q[kTilesOfWarp], ahead[kTilesOfWarp];
  Rows<Bits, Min> r[kTilesOfWarp], r_ahead[kTilesOfWarp];
  const bool whole = w.whole_tiles<Bits>();
  if (first < last) {
    load_x(first);
    load_w(ahead, first);
    if (whole) load_r(r_ahead, first * kTileK / w.group);
  }
  for (int tile = first; tile < last; ++tile) {
    cp_async_wait<0>();
    __syncthreads();
    QRT_UNROLL
    for (int m = 0; m < kTilesOfWarp; ++m) {
      q[m] = ahead[m];
      r[m] = r_ahead[m];
    }
    if (tile + 1 < last) {
      load_x(tile + 1);
      load_w(ahead, tile + 1);
      if (whole) load_r(r_ahead, (tile + 1) * kTileK / w.group);
    }
    const T* from = xs + (tile & 1) * kTileRows * kStride;
    Zeros<Bits> z[kTilesOfWarp];
    if (whole) {
      make_z(z, r);
      QRT_UNROLL
      for (int s = 0; s < kSteps; ++s) step(q, s, from, z);
      flush(r);
    } else {
      int g = tile * kTileK / w.group, left = (g + 1) * w.group - tile * kTileK;
      QRT_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        if (tile * kTileK + 16 * s < w.k) {
          load_r(r, g);
          make_z(z, r);
          step(q, s, from, z);
          flush(r);
          left -= 16;
          if (left == 0) left = w.group, ++g;
        }
      }
    }
  }
  __syncthreads();  // x is no longer read
  QRT_UNROLL
  for (int m = 0; m < kTilesOfWarp; ++m) {
    QRT_UNROLL
    for (int b = 0; b < kB; ++b) {
      QRT_UNROLL
      for (int i = 0; i < mma::NC; ++i) {
        const int at = (warp * kTilesOfWarp + m) * kTileRows + b * kColumns + mma::c_col(lane, i);
        sums[at * (kTileN + 1) + mma::c_row(lane, i)] = total[m][b].v[i];
      }
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kBlockN; i += kThreads) {
    const int row = i / kBlockN, c = i % kBlockN, n = static_cast<int>(blockIdx.x) * kBlockN + c;
    if (row0 + row < rows && n < w.n) {
      put(y, partial, bias, rows, w.n, row0 + row, n,
          sums[(c / kTileN * kTileRows + row) * (kTileN + 1) + c % kTileN]);
    }
  }
}
#endif

// ------------------------------------------------------------------------------------------------------------- SIMT
#if QRT_LINEAR_SIMT
constexpr int kSimtN = 64;
constexpr int kSimtStride = kSimtN + 4;

template <class T, int Bits>
QRT_DEVICE void many_rows_simt(T* y, float* partial, const T* x, const Weight& w, const float* bias, int rows) {
  constexpr int kTileK = Packing<Bits>::kTileK, kPart = kTileK / 4, kStepsOfPart = kPart / 16;  // a register's inputs
  using f4 = vec<float, 4>;
  __shared__ f4 ws[kPart * kSimtStride / 4], xs[kPart * kSimtStride / 4];  // [k][output], [k][row]
  float* wf = reinterpret_cast<float*>(ws);
  float* xf = reinterpret_cast<float*>(xs);
  const int thread = static_cast<int>(threadIdx.x), row0 = static_cast<int>(blockIdx.y) * kTileRows;
  const int tiles = w.tiles_k<Bits>(), tiles_n = w.padded_n() / kTileN;
  const int first = static_cast<int>(static_cast<int64_t>(tiles) * blockIdx.z / gridDim.z);
  const int last = static_cast<int>(static_cast<int64_t>(tiles) * (blockIdx.z + 1) / gridDim.z);
  // As loader: one word of a tile, a quarter of a part's inputs of one row of x. As worker: 4 outputs x 4 rows.
  const int tile_n = static_cast<int>(blockIdx.x) * (kSimtN / kTileN) + thread / kTileWords;
  const int word = thread % kTileWords, t = word & 3, out = thread / kTileWords * kTileN + word / 4;
  const int row_n = min(tile_n, tiles_n - 1) * kTileN + word / 4;
  const int x_row = thread / 4, x_k = thread % 4 * (kPart / 4);
  const int n4 = thread % 16 * 4, r4 = thread / 16 * 4;

  float sum[4][4];  // [row][output]
  QRT_UNROLL
  for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] = 0.f;
  for (int tile = first; tile < last; ++tile) {
    const word_t q = load_stream(w.tile<Bits>(min(tile_n, tiles_n - 1), tile) + word);
    QRT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int k0 = tile * kTileK + j * kPart;
      if (k0 < w.k) {
        __syncthreads();  // the last part was used
        QRT_UNROLL
        for (int h = 0; h < kStepsOfPart; ++h) {
          const int g = min(k0 + 16 * h, w.k - 1) / w.group;  // beyond K: x is zero there
          const float scale = w.scale(g, row_n), offset = w.mins ? w.minimum(g, row_n) : 0.f;
          const int zero = w.zero<Bits>(g, row_n);
          QRT_UNROLL
          for (int c = 0; c < 4; ++c) {
            const int value = code<Bits>(q, j * kStepsOfPart + h, c) - zero;
            wf[(16 * h + 4 * t + c) * kSimtStride + out] = fmaf(scale, static_cast<float>(value), offset);
          }
        }
        QRT_UNROLL
        for (int c = 0; c < kPart / 4; c += 4) {
          const int k = k0 + x_k + c;
          vec<T, 4> v;
          if (row0 + x_row < rows && k < w.k) {
            v = load_nc(reinterpret_cast<const vec<T, 4>*>(x + static_cast<int64_t>(row0 + x_row) * w.k + k));
          } else {
            QRT_UNROLL
            for (int e = 0; e < 4; ++e) v[e] = from_float<T>(0.f);
          }
          QRT_UNROLL
          for (int e = 0; e < 4; ++e) xf[(x_k + c + e) * kSimtStride + x_row] = to_float(v[e]);
        }
        __syncthreads();
        for (int k = 0; k < kPart; ++k) {
          const f4 a = *reinterpret_cast<const f4*>(xf + k * kSimtStride + r4);
          const f4 b = *reinterpret_cast<const f4*>(wf + k * kSimtStride + n4);
          QRT_UNROLL
          for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] = fmaf(a[i / 4], b[i % 4], sum[i / 4][i % 4]);
        }
      }
    }
  }
  QRT_UNROLL
  for (int i = 0; i < 16; ++i) {
    const int row = row0 + r4 + i / 4, n = static_cast<int>(blockIdx.x) * kSimtN + n4 + i % 4;
    if (row < rows && n < w.n) put(y, partial, bias, rows, w.n, row, n, sum[i / 4][i % 4]);
  }
}
#endif

// ------------------------------------------------------------------------------------------------- weights as floats
// One thread a word: its codes of every step as T. out: the row's first element; to(k) says where input k goes.
template <class T, int Bits, class Place>
QRT_DEVICE void expand(const Weight& w, int tile_n, int tile, int word, const Place& place) {
  const word_t q = load_stream(w.tile<Bits>(tile_n, tile) + word);
  const int row = tile_n * kTileN + word / 4;
  QRT_UNROLL
  for (int s = 0; s < Packing<Bits>::kSteps; ++s) {
    const int k = tile * Packing<Bits>::kTileK + 16 * s;
    if (k < w.k) {
      const int g = k / w.group, zero = w.zero<Bits>(g, row);
      const float scale = w.scale(g, row), offset = w.mins ? w.minimum(g, row) : 0.f;
      vec<T, 4> v;
      QRT_UNROLL
      for (int c = 0; c < 4; ++c) {
        v[c] = from_float<T>(fmaf(scale, static_cast<float>(code<Bits>(q, s, c) - zero), offset));
      }
      place(k + 4 * (word & 3), v);
    }
  }
}

template <class T, int Bits>
QRT_DEVICE void dequantize(T* out, const Weight& w, int n0, int n1) {
  const int tile_n = n0 / kTileN + static_cast<int>(blockIdx.y);
  const int at = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int tile = at / kTileWords, word = at % kTileWords, row = tile_n * kTileN + word / 4;
  if (tile >= w.tiles_k<Bits>() || row >= n1) return;
  T* to = out + static_cast<int64_t>(row - n0) * w.k;
  expand<T, Bits>(w, tile_n, tile, word, [&](int k, const vec<T, 4>& v) { store_vec<T, 4>(to + k, v); });
}

template <class T, int Bits>
QRT_DEVICE void embedding(T* out, const int64_t* ids, const Weight& w, const int32_t* perm) {
  const int at = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int tile = at / 4;
  const int64_t id = ids[blockIdx.y];
  if (tile >= w.tiles_k<Bits>()) return;
  T* to = out + static_cast<int64_t>(blockIdx.y) * w.k;
  const bool inside = id >= 0 && id < w.n;
  const int row = inside ? static_cast<int>(id) : 0;
  expand<T, Bits>(w, row / kTileN, tile, row % kTileN * 4 + at % 4, [&](int k, vec<T, 4> v) {
    QRT_UNROLL
    for (int c = 0; c < 4; ++c) {
      if (!inside) v[c] = from_float<T>(bits_float(0x7fc00000u));
      if (perm) to[perm[k + c]] = v[c];
    }
    if (!perm) store_vec<T, 4>(to + k, v);
  });
}

}  // namespace linear
}  // namespace qrt

#if QRT_HAS_MMA
#define QRT_LINEAR_TILE(bits, type, t)                                                                     \
  QRT_LINEAR_KERNEL(linear_tile_int##bits##_##t, (qrt::linear::many_rows<qrt::type, bits, false>), type)     \
  QRT_LINEAR_KERNEL(linear_tile_int##bits##_##t##_min, (qrt::linear::many_rows<qrt::type, bits, true>), type)
QRT_LINEAR_TILE(4, half_t, f16)
QRT_LINEAR_TILE(8, half_t, f16)
#if QRT_HAS_MMA_BF16
QRT_LINEAR_TILE(4, bf16_t, bf16)
QRT_LINEAR_TILE(8, bf16_t, bf16)
#endif
#endif

#if QRT_LINEAR_SIMT
QRT_LINEAR_KERNEL(linear_tile_simt_int4_f16, (qrt::linear::many_rows_simt<qrt::half_t, 4>), half_t)
QRT_LINEAR_KERNEL(linear_tile_simt_int8_f16, (qrt::linear::many_rows_simt<qrt::half_t, 8>), half_t)
QRT_LINEAR_KERNEL(linear_tile_simt_int4_bf16, (qrt::linear::many_rows_simt<qrt::bf16_t, 4>), bf16_t)
QRT_LINEAR_KERNEL(linear_tile_simt_int8_bf16, (qrt::linear::many_rows_simt<qrt::bf16_t, 8>), bf16_t)
#endif

// linear_dequantize: out [n1 - n0, k], rows n0 .. n1 - 1 in stored column order; n0 a multiple of 16;
// gridDim (ceil(K tiles * 64 / 256), ceil((n1 - n0) / 16)).
// packed_embedding: out [gridDim.y, k] = rows ids[i], perm (or null) undone; an id outside the table gives NaN;
// gridDim (ceil(K tiles * 4 / 256), ids).
#define QRT_LINEAR_EXPAND(bits, type, t)                                                                              \
  QRT_KERNEL(256) linear_dequantize_int##bits##_##t(                                                                  \
      qrt::type* out, const qrt::linear::word_t* words, const qrt::half_t* scales, const uint8_t* zeros,              \
      const qrt::half_t* mins, int32_t n, int32_t k, int32_t group, int32_t n0, int32_t n1) {                         \
    qrt::linear::dequantize<qrt::type, bits>(out, {words, scales, zeros, mins, n, k, group}, n0, n1);                 \
  }                                                                                                                   \
  QRT_REGISTER(linear_dequantize_int##bits##_##t);                                                                     \
  QRT_KERNEL(256) packed_embedding_int##bits##_##t(                                                                   \
      qrt::type* out, const int64_t* ids, const qrt::linear::word_t* words, const qrt::half_t* scales,                \
      const uint8_t* zeros, const qrt::half_t* mins, const int32_t* perm, int32_t n, int32_t k, int32_t group) {      \
    qrt::linear::embedding<qrt::type, bits>(out, ids, {words, scales, zeros, mins, n, k, group}, perm);               \
  }                                                                                                                   \
  QRT_REGISTER(packed_embedding_int##bits##_##t);
QRT_LINEAR_EXPAND(4, half_t, f16)
QRT_LINEAR_EXPAND(8, half_t, f16)
QRT_LINEAR_EXPAND(4, bf16_t, bf16)
QRT_LINEAR_EXPAND(8, bf16_t, bf16)
