// The self-test of mma.h on the card at hand: C[16 m, 16 n] = A B by fragments, one warp a tile of 16 x 16 x K.
// Compared with float64 by the caller; where QRT_HAS_MMA is 0 it computes the same with plain loops, so that the test
// can run everywhere. A [16 tiles_m, k] row-major; B as [16 tiles_n, k] (K contiguous); C float; k a multiple of 16.
// `rows` takes B transposed through [K][N] shared memory (load_b_rows), else through [N][K] (load_b).
#include "mma.h"

namespace qrt {

constexpr int kStride = 24;  // elements: 16 and 8 of padding

#if QRT_HAS_MMA
template <class T>
QRT_DEVICE void check_by_fragments(float* c, const T* a, const T* b, int n, int k, int rows) {
  __shared__ QRT_ALIGN(16) T sa[16 * kStride];
  __shared__ QRT_ALIGN(16) T sb[16 * kStride];
  const int lane = lane_id();
  const int m0 = static_cast<int>(blockIdx.y) * 16, n0 = static_cast<int>(blockIdx.x) * 16;
  constexpr int kTiles = 16 / mma::N;
  mma::C acc[kTiles];
  for (int j = 0; j < kTiles; ++j) mma::zero(acc[j]);
  for (int k0 = 0; k0 < k; k0 += 16) {
    for (int i = lane; i < 256; i += kWarp) {
      const int r = i / 16, x = i % 16;
      sa[r * kStride + x] = a[static_cast<int64_t>(m0 + r) * k + k0 + x];
      sb[(rows ? x : r) * kStride + (rows ? r : x)] = b[static_cast<int64_t>(n0 + r) * k + k0 + x];
    }
    warp_sync();
    mma::A<T> fa;
    mma::load_a(fa, sa, kStride);
    for (int j = 0; j < kTiles; ++j) {
      mma::B<T> fb;
      if (rows) {
        mma::load_b_rows(fb, sb + j * mma::N, kStride);
      } else {
        mma::load_b(fb, sb + j * mma::N * kStride, kStride);
      }
      mma::run(acc[j], fa, fb);
    }
    warp_sync();
  }
  for (int j = 0; j < kTiles; ++j) {
    for (int i = 0; i < mma::NC; ++i) {
      const int row = m0 + mma::c_row(lane, i), col = n0 + j * mma::N + mma::c_col(lane, i);
      c[static_cast<int64_t>(row) * n + col] = acc[j].v[i];
    }
  }
}
#endif

template <class T>
QRT_DEVICE void check_by_loops(float* c, const T* a, const T* b, int n, int k) {
  const int lane = lane_id();
  const int m0 = static_cast<int>(blockIdx.y) * 16, n0 = static_cast<int>(blockIdx.x) * 16;
  for (int i = lane; i < 256; i += kWarp) {
    float s = 0.f;
    for (int x = 0; x < k; ++x) {
      const float p = to_float(a[static_cast<int64_t>(m0 + i / 16) * k + x]);
      s += p * to_float(b[static_cast<int64_t>(n0 + i % 16) * k + x]);
    }
    c[static_cast<int64_t>(m0 + i / 16) * n + n0 + i % 16] = s;
  }
}

template <class T>
QRT_DEVICE void check_tile(float* c, const T* a, const T* b, int n, int k, int rows) {
#if QRT_HAS_MMA
  if constexpr (mma::Has<T>::value) {
    check_by_fragments(c, a, b, n, k, rows);
  } else {
    check_by_loops(c, a, b, n, k);
  }
#else
  (void)rows;
  check_by_loops(c, a, b, n, k);
#endif
}

}  // namespace qrt

QRT_KERNEL(64) mma_check_f16(float* c, const qrt::half_t* a, const qrt::half_t* b, int n, int k, int rows) {
  qrt::check_tile(c, a, b, n, k, rows);
}
QRT_KERNEL(64) mma_check_bf16(float* c, const qrt::bf16_t* a, const qrt::bf16_t* b, int n, int k, int rows) {
  qrt::check_tile(c, a, b, n, k, rows);
}

QRT_REGISTER(mma_check_f16);
QRT_REGISTER(mma_check_bf16);
