// Packed weights: grouped integers of 4 or 8 bits, one layout for the matrix units, the SIMT kernels and row gathers.
//
// w[n, k] = scale[n, g] * (code[n, k] - zero[n, g])   or   scale * code + min;   g = k / group, group a multiple of 16.
//
// Layout. Outputs n are cut into tiles of 16, inputs k into tiles of kTileK = 128 (int4) or 64 (int8), N and K padded
// with code 0 (padded outputs have scale 0, padded inputs are never multiplied). A tile is 1024 contiguous bytes, tiles
// of one 16 outputs follow each other over k:
//     tile [n / 16][k / kTileK], in it 16-byte words [row n % 16][t = 0..3], in a word four 32-bit registers j = 0..3.
// A tile's k is steps of 16 (8 at int4, 4 at int8); word t holds inputs 16 * step + 4t + c, c = 0..3, of every step:
//     int4    register j holds steps 2j + h, h = 0, 1; code (h, c) is nibble 2h + c/2 + 4 (c % 2)
//     int8    register j holds step j; code c is byte c/2 + 2 (c % 2)
// so that (register >> shift) & 0x000f000f (0x00ff00ff) is the pair c = 0, 1 or c = 2, 3 as two 16-bit integers, and
// the four codes of a step are just the slots (row, 4 k) that a lane holds of a 16x16 matrix-unit operand: m16n8k16
// gives lane (g, t) of 32 the rows g and g + 8, 16x16x16 gives lane (r, t) of 64 the row r. The slots' own k numbers differ
// from ours, but a product may sum its k in any order, and the activations are loaded in the same one. A warp therefore
// reads a tile as two (of 64 lanes: one) contiguous 16-byte words a lane, and multiplies without any shuffle.
//     scales  float16 [K / group][N padded to 16];  zeros uint8, mins float16 alike, either absent.
//
// Integers become 16-bit floats exactly. float16: 0x6400 | q is 1024 + q, 0x6400 | q << 4 is 1024 + 16 q; one packed
// subtraction (fma) leaves q - zero, |q - zero| <= 255 < 2^11. bfloat16: 0x4300 | q is 128 + q for q < 128; at 8 bits
// the top bit chooses what is subtracted (128 or 256), then zero - 128 is: q - 128, zero - 128 and q - zero are all at
// most 255 < 2^8 in magnitude.
#pragma once

#include "compat.h"

namespace qrt {
namespace linear {

constexpr int kTileN = 16;
constexpr int kTileWords = 64;  // 16-byte words of a tile
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWordsPerLane = kTileWords / kWarp;  // 2 at warp 32, 1 at warp 64

using word_t = vec<uint32_t, 4>;
using quad_t = vec<uint32_t, 2>;  // four 16-bit floats

template <int Bits>
struct Packing {
  static constexpr int kTileK = 512 / Bits;
  static constexpr int kSteps = kTileK / 16;
};

QRT_DEVICE uint32_t twice(uint32_t half) { return half | half << 16; }

// The code of slot c of a step, as stored.
template <int Bits>
QRT_DEVICE int code(const word_t& w, int step, int c) {
  const int slot = 16 * (c & 1) + Bits * (c >> 1);
  if constexpr (Bits == 4) return static_cast<int>(w[step >> 1] >> (8 * (step & 1) + slot)) & 15;
  return static_cast<int>(w[step] >> slot) & 255;
}

// What make_pairs subtracts for a zero point (0 .. 16 at 4 bits, 0 .. 255 at 8).
struct Zero {
  uint32_t a, b;
};
template <class T, int Bits>
struct Codes;

template <>
struct Codes<half_t, 4> {
  static QRT_DEVICE Zero zero(int z) { return {twice(0x6400u + z), twice(0xd400u + 16u * z)}; }  // 1024 + z, -(64 + z)
  static QRT_DEVICE void pairs(const word_t& w, int step, const Zero& z, uint32_t out[2]) {
    const uint32_t r = w[step >> 1] >> (8 * (step & 1));
    out[0] = sub2<half_t>((r & 0x000f000fu) | 0x64006400u, z.a);
    out[1] = fma2<half_t>((r & 0x00f000f0u) | 0x64006400u, 0x2c002c00u, z.b);  // (1024 + 16 q) / 16 - (64 + z)
  }
};
template <>
struct Codes<half_t, 8> {
  static QRT_DEVICE Zero zero(int z) { return {twice(0x6400u + z), 0u}; }
  static QRT_DEVICE void pairs(const word_t& w, int step, const Zero& z, uint32_t out[2]) {
    const uint32_t r = w[step];
    out[0] = sub2<half_t>((r & 0x00ff00ffu) | 0x64006400u, z.a);
    out[1] = sub2<half_t>(((r >> 8) & 0x00ff00ffu) | 0x64006400u, z.a);
  }
};
template <>
struct Codes<bf16_t, 4> {
  static QRT_DEVICE Zero zero(int z) { return {twice(0x4300u + z), 0u}; }  // 128 + z
  static QRT_DEVICE void pairs(const word_t& w, int step, const Zero& z, uint32_t out[2]) {
    const uint32_t r = w[step >> 1] >> (8 * (step & 1));
    out[0] = sub2<bf16_t>((r & 0x000f000fu) | 0x43004300u, z.a);
    out[1] = sub2<bf16_t>(((r >> 4) & 0x000f000fu) | 0x43004300u, z.a);
  }
};
template <>
struct Codes<bf16_t, 8> {
  static QRT_DEVICE Zero zero(int z) { return {twice(from_float<bf16_t>(static_cast<float>(z - 128)).u), 0u}; }
  static QRT_DEVICE uint32_t pair(uint32_t q, const Zero& z) {
    // 128 + q % 128, less 256 (q < 128) or 128 (q >= 128: 0x4380 with the exponent's last bit cleared): q - 128
    const uint32_t centred = sub2<bf16_t>((q & 0x007f007fu) | 0x43004300u, (q & 0x00800080u) ^ 0x43804380u);
    return z.a == 0u ? centred : sub2<bf16_t>(centred, z.a);
  }
  static QRT_DEVICE void pairs(const word_t& w, int step, const Zero& z, uint32_t out[2]) {
    const uint32_t r = w[step];
    out[0] = pair(r, z);
    out[1] = pair(r >> 8, z);
  }
};

// c + a.lo * b.lo + a.hi * b.hi, float32.
template <class T>
QRT_DEVICE float dot2(uint32_t a, uint32_t b, float c) {
  c = fmaf(to_float(unpack_lo<T>(a)), to_float(unpack_lo<T>(b)), c);
  return fmaf(to_float(unpack_hi<T>(a)), to_float(unpack_hi<T>(b)), c);
}
#if QRT_HIP && QRT_GFX_DOT
template <>
QRT_DEVICE float dot2<half_t>(uint32_t a, uint32_t b, float c) {
  return __builtin_amdgcn_fdot2(as_half2(a), as_half2(b), c, false);
}
#endif

// A packed weight as a kernel sees it.
struct Weight {
  const word_t* words;
  const half_t* scales;
  const uint8_t* zeros;  // or null
  const half_t* mins;    // or null; then no zeros
  int n, k, group;

  QRT_DEVICE int padded_n() const { return ceil_div(n, kTileN) * kTileN; }
  template <int Bits>
  QRT_DEVICE int tiles_k() const {
    return ceil_div(k, Packing<Bits>::kTileK);
  }
  // First word of a tile.
  template <int Bits>
  QRT_DEVICE const word_t* tile(int tile_n, int tile_k) const {
    return words + (static_cast<int64_t>(tile_n) * tiles_k<Bits>() + tile_k) * kTileWords;
  }
  QRT_DEVICE int64_t at(int g, int row) const { return static_cast<int64_t>(g) * padded_n() + row; }
  QRT_DEVICE float scale(int g, int row) const { return to_float(load_nc(scales + at(g, row))); }
  QRT_DEVICE float minimum(int g, int row) const { return to_float(load_nc(mins + at(g, row))); }
  // The zero point that codes of (group, row) are relative to; 0 where mins hold the offset.
  template <int Bits>
  QRT_DEVICE int zero(int g, int row) const {
    return mins ? 0 : zeros ? static_cast<int>(load_nc(zeros + at(g, row))) : 1 << (Bits - 1);
  }
  // One group, or several whole tiles of one, in every tile: what the fast loops ask for.
  template <int Bits>
  QRT_DEVICE bool whole_tiles() const {
    return group % Packing<Bits>::kTileK == 0;
  }
  // The weight of a code as float32.
  template <int Bits>
  QRT_DEVICE float value(int q, int g, int row) const {
    const float s = scale(g, row);
    return mins ? fmaf(s, static_cast<float>(q), minimum(g, row)) : s * static_cast<float>(q - zero<Bits>(g, row));
  }
};

// y[row, n] = value + bias, or this split's float32 partial sum of it.
template <class T>
QRT_DEVICE void put(T* y, float* partial, const float* bias, int rows, int n, int row, int col, float value) {
  const int64_t at = static_cast<int64_t>(row) * n + col;
  if (partial) {
    partial[static_cast<int64_t>(blockIdx.z) * rows * n + at] = value;
  } else {
    y[at] = from_float<T>(bias ? value + bias[col] : value);
  }
}

}  // namespace linear
}  // namespace qrt

// A kernel y = x W^T + bias over `function`: x [rows, k] and y [rows, n] contiguous and 16-byte aligned, one of zeros
// and mins or neither, partial null when gridDim.z = 1 (else float32 [gridDim.z][rows][n]), bias null or float32 [n].
#define QRT_LINEAR_KERNEL(name, function, type)                                                                      \
  QRT_KERNEL(256) name(qrt::type* y, float* partial, const qrt::type* x, const qrt::linear::word_t* words,           \
                       const qrt::half_t* scales, const uint8_t* zeros, const qrt::half_t* mins, const float* bias,  \
                       int32_t rows, int32_t n, int32_t k, int32_t group) {                                          \
    function(y, partial, x, {words, scales, zeros, mins, n, k, group}, bias, rows);                                  \
  }                                                                                                                  \
  QRT_REGISTER(name);
