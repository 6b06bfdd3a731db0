// Loads and stores shared by the element-wise kernels: N consecutive values of any float type, as float32.
#pragma once

#include "compat.h"

namespace qrt {

// True when every address `base + i * stride` (stride in elements of `size` bytes) is a multiple of `bytes`.
QRT_DEVICE bool is_aligned(const void* base, int64_t stride, int size, int bytes) {
  return ((reinterpret_cast<unsigned long long>(base) | static_cast<unsigned long long>(stride * size)) %
          static_cast<unsigned long long>(bytes)) == 0;
}

// The widest piece of N values of T that one load moves: at most 16 bytes.
template <class T, int N>
struct Piece {
  static constexpr int kMost = 16 / static_cast<int>(sizeof(T));
  static constexpr int kSize = N < kMost ? N : kMost;
};

// p aligned to min(16, N * sizeof(T)) bytes.
template <class T, int N>
QRT_DEVICE void load_floats(const T* p, float (&out)[N]) {
  constexpr int kPiece = Piece<T, N>::kSize;
#pragma unroll
  for (int i = 0; i < N; i += kPiece) {
    const vec<T, kPiece> part = load_vec<T, kPiece>(p + i);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) out[i + j] = to_float(part.v[j]);
  }
}

// Rounds to T, to nearest even; p aligned as for load_floats.
template <class T, int N>
QRT_DEVICE void store_floats(T* p, const float (&in)[N]) {
  constexpr int kPiece = Piece<T, N>::kSize;
#pragma unroll
  for (int i = 0; i < N; i += kPiece) {
    vec<T, kPiece> part;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) part.v[j] = from_float<T>(in[i + j]);
    store_vec<T, kPiece>(p + i, part);
  }
}

// v as T would hold it.
template <class T>
QRT_DEVICE float rounded_to(float v) {
  return to_float(from_float<T>(v));
}

}  // namespace qrt
