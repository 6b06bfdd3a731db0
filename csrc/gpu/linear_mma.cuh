// Packed weights (linear.cuh) as the A operand of 16x16x16 matrix products: A = 16 outputs, B = rows of x, C = y^T.
#pragma once

#include "linear.cuh"
#include "mma.h"

// The kernels for devices without matrix units; -DQRT_LINEAR_SIMT=1 compiles them elsewhere too.
#ifndef QRT_LINEAR_SIMT
#if !QRT_HAS_MMA || defined(QRT_EMU)
#define QRT_LINEAR_SIMT 1
#else
#define QRT_LINEAR_SIMT 0
#endif
#endif

#if QRT_HAS_MMA
namespace qrt {
namespace linear {

constexpr int kColumns = mma::N;                      // rows of x in one product: 8 at warp 32, 16 at warp 64
constexpr int kRowHalves = kWordsPerLane;              // outputs a lane holds of A
#if QRT_UNIT_MMAC
constexpr int kScaleRows = 1;                          // distinct outputs among a lane's four elements of C
#else
constexpr int kScaleRows = kRowHalves == 2 ? 2 : 4;
#endif

static_assert(mma::M == 16 && mma::K == 16, "packing is made for 16x16 operands");

// Where a lane's slots are: output a_row(lane, half) of A, column b_col(lane) of B, both with inputs 4 slot(lane) + c.
QRT_DEVICE int a_row(int lane, int half) { return mma::a_row(lane, 2 * half); }
QRT_DEVICE int b_col(int lane) { return mma::b_col(lane, 0); }
QRT_DEVICE int slot(int lane) { return kRowHalves == 2 ? lane & 3 : lane >> 4; }
// Which of a lane's scales element i of C takes, and the output that scale is of.
QRT_DEVICE int scale_of(int i) { return i * kScaleRows / mma::NC; }
QRT_DEVICE int scale_row(int lane, int s) { return mma::c_row(lane, s * mma::NC / kScaleRows); }

// Codes (or activations) c = 2p and 2p + 1 of a lane's four: neighbouring elements of the operand. At warp 32 A's eight
// elements are (half 0, p 0), (half 1, p 0), (half 0, p 1), (half 1, p 1).
template <class T>
QRT_DEVICE void set_pair(mma::A<T>& a, int half, int p, uint32_t pair) {
  const int i = kRowHalves == 2 ? 2 * half + 4 * p : 2 * p;
  a.v[i] = unpack_lo<T>(pair);
  a.v[i + 1] = unpack_hi<T>(pair);
}
template <class T>
QRT_DEVICE mma::B<T> make_b(const quad_t& q) {
  mma::B<T> b;
  QRT_UNROLL
  for (int p = 0; p < 2; ++p) {
    b.v[2 * p] = unpack_lo<T>(q[p]);
    b.v[2 * p + 1] = unpack_hi<T>(q[p]);
  }
  return b;
}

// A lane's words of a tile, and what belongs to its rows in one group (as stored: registers are dear).
struct Words {
  word_t w[kRowHalves];
};
template <int Bits, bool Min>
struct Rows {
  int zero[kRowHalves];
  half_t scale[kScaleRows], min[Min ? kScaleRows : 1];
};

QRT_DEVICE Words load_words(const word_t* tile, int lane) {
  Words r;
  QRT_UNROLL
  for (int h = 0; h < kRowHalves; ++h) r.w[h] = load_stream(tile + a_row(lane, h) * 4 + slot(lane));
  return r;
}

template <int Bits, bool Min>
QRT_DEVICE void load_rows(Rows<Bits, Min>& r, const Weight& w, int tile_n, int g, int lane) {
  const int64_t at = w.at(g, tile_n * kTileN);
  QRT_UNROLL
  for (int h = 0; h < kRowHalves; ++h) {
    r.zero[h] = Min ? 0 : w.zeros ? static_cast<int>(load_nc(w.zeros + at + a_row(lane, h))) : 1 << (Bits - 1);
  }
  QRT_UNROLL
  for (int s = 0; s < kScaleRows; ++s) {
    r.scale[s] = load_nc(w.scales + at + scale_row(lane, s));
    if constexpr (Min) r.min[s] = load_nc(w.mins + at + scale_row(lane, s));
  }
}

// What is subtracted from the codes of each of a lane's rows.
template <int Bits>
struct Zeros {
  Zero of[kRowHalves];
};
template <class T, int Bits, bool Min>
QRT_DEVICE Zeros<Bits> make_zeros(const Rows<Bits, Min>& r) {
  Zeros<Bits> z;
  QRT_UNROLL
  for (int h = 0; h < kRowHalves; ++h) z.of[h] = Codes<T, Bits>::zero(r.zero[h]);
  return z;
}

// part (and xsum): a group's sums of (code - zero) x (and of x); added to total, cleared.
template <int Bits, bool Min>
QRT_DEVICE void add_group(mma::C& total, mma::C& part, const mma::C& xsum, const Rows<Bits, Min>& r) {
  QRT_UNROLL
  for (int i = 0; i < mma::NC; ++i) {
    total.v[i] = fmaf(to_float(r.scale[scale_of(i)]), part.v[i], total.v[i]);
    if constexpr (Min) total.v[i] = fmaf(to_float(r.min[scale_of(i)]), xsum.v[i], total.v[i]);
    part.v[i] = 0.f;
  }
}

// The A operand of ones: its product with x is the sum of x in every row.
template <class T>
QRT_DEVICE mma::A<T> ones() {
  mma::A<T> a;
  QRT_UNROLL
  for (int i = 0; i < mma::NA; ++i) a.v[i] = from_float<T>(1.f);
  return a;
}

template <class T, int Bits>
QRT_DEVICE mma::A<T> make_a(const Words& words, int step, const Zeros<Bits>& zeros) {
  mma::A<T> a;
  QRT_UNROLL
  for (int h = 0; h < kRowHalves; ++h) {
    uint32_t pair[2];
    Codes<T, Bits>::pairs(words.w[h], step, zeros.of[h], pair);
    set_pair(a, h, 0, pair[0]);
    set_pair(a, h, 1, pair[1]);
  }
  return a;
}
}  // namespace linear
}  // namespace qrt
#endif
