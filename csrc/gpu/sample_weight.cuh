// Weights of tokens as integers: 2^F * 2^-y, y = (top - x) * log2(e) / temperature, without float64 arithmetic, so that
// cards that have little of it are as fast, and integer sums, which come out the same in any order.
//
// y is found as an unevaluated sum of two float32 (top - x exactly, the scale in 48 bits), then as an integer of units
// 2^-48, within (y + 4) 2^-48 of exact. 2^-y comes from a table of 2^(-j/64) and a polynomial whose error is below
// 2^-52. A weight is therefore within 2^-F / 2 + 2^-46 of exact where the heaviest token's is 1, and that one's is exact.
// F = fraction_bits(vocab): 48, less where a sum of `vocab` weights would pass 2^63 (45 for 2^18 tokens).
#pragma once

#include "compat.h"

namespace qrt {

using u64 = unsigned long long;

constexpr int kExponentBits = 48;  // y is in units of 2^-48
constexpr float kFar = 64.0f;      // from this y on a weight is 0

// 2^(-j / 64) * 2^63.
__constant__ u64 kExp2Table[64] = {
    0x8000000000000000ull, 0x7e9f06067a4360baull, 0x7d41d96db915019dull, 0x7be86fb985689ddcull,
    0x7a92be8a92436616ull, 0x7940bb9e2cffd89dull, 0x77f25ccdee6d7ae6ull, 0x76a7980f6cca15c2ull,
    0x75606373ee921c97ull, 0x741cb5281e25ee34ull, 0x72dc8373be41a454ull, 0x719fc4b95f452d29ull,
    0x70666f76154a7089ull, 0x6f307a412f074892ull, 0x6dfddbcbed791babull, 0x6cce8ae13c57ebdbull,
    0x6ba27e656b4eb57aull, 0x6a79ad55e7f6fd10ull, 0x69540ec8f895722dull, 0x683199ed779592caull,
    0x6712460a8fc24072ull, 0x65f60a7f79393e2eull, 0x64dcdec3371793d1ull, 0x63c6ba6455dcd8aeull,
    0x62b39508aa836d6full, 0x61a3666d124bb204ull, 0x6096266533384a2bull, 0x5f8bccdb3d398841ull,
    0x5e8451cfac061b5full, 0x5d7fad59099f22feull, 0x5c7dd7a3b17dcf75ull, 0x5b7ec8f19468bbc9ull,
    0x5a827999fcef3242ull, 0x5988e20954889245ull, 0x5891fac0e95612c8ull, 0x579dbc56b48521baull,
    0x56ac1f752150a563ull, 0x55bd1cdad49f699cull, 0x54d0ad5a753e077cull, 0x53e6c9da74b29ab5ull,
    0x52ff6b54d8a89c75ull, 0x521a8ad704f3404full, 0x513821818624b40cull, 0x50582887dcb8a7e1ull,
    0x4f7a993048d088d7ull, 0x4e9f6cd3967fdba8ull, 0x4dc69cdceaa72a9cull, 0x4cf022c9905bfd32ull,
    0x4c1bf828c6dc54b8ull, 0x4b4a169b900c2d00ull, 0x4a7a77d47f7b84b1ull, 0x49ad159789f37496ull,
    0x48e1e9b9d588e19bull, 0x4818ee218a3358eeull, 0x47521cc5a2e6a9e0ull, 0x468d6fadbf2dd4f3ull,
    0x45cae0f1f545eb73ull, 0x450a6abaa4b77ecdull, 0x444c0740496d4294ull, 0x438fb0cb4f468808ull,
    0x42d561b3e6243d8aull, 0x421d1461d66f2023ull, 0x4166c34c5615d0ecull, 0x40b268f9de0183baull,
};

QRT_DEVICE u64 multiply_high(u64 a, u64 b) {
#if defined(QRT_EMU)
  return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64);
#else
  return __umul64hi(a, b);
#endif
}
QRT_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<u64>(a) * b >> 32);
}

QRT_DEVICE int fraction_bits(int vocab) {
  int bits = 0;
  while ((vocab - 1) >> bits) ++bits;
  return min(kExponentBits, 63 - bits);
}

// log2(e) / temperature in two floats.
struct Scale {
  float hi, lo;
  static QRT_DEVICE Scale of(double scale) {
    const float hi = static_cast<float>(scale);
    return {hi, static_cast<float>(scale - static_cast<double>(hi))};
  }
};

// y to float32, rounded so that a larger x never has a larger y: the order of buckets. Infinite for x = -infinity.
QRT_DEVICE float rough_exponent(float top, float x, Scale scale) { return (top - x) * scale.hi; }

// y in units of 2^-48, for x whose rough exponent is below kFar.
QRT_DEVICE u64 exponent(float top, float x, Scale scale) {
  const float d = top - x, back = d - top;
  const float e = (top - (d - back)) - (x + back);  // d + e is top - x exactly (Knuth's two-sum)
  const float p = d * scale.hi;
  const float q = fmaf(e, scale.hi, fmaf(d, scale.lo, fmaf(d, scale.hi, -p)));
  constexpr float kUnits = 281474976710656.0f;  // 2^48
  const long long y = static_cast<long long>(p * kUnits) + static_cast<long long>(q * kUnits);
  return y > 0 ? static_cast<u64>(y) : 0;
}

// 2^F 2^-y, rounded to nearest; `table` is kExp2Table or a copy of it.
QRT_DEVICE u64 weight(u64 y, int fraction, const u64* table) {
  const int shift = 62 - fraction + static_cast<int>(y >> kExponentBits);
  if (shift > 63) return 0;
  // y = whole + j / 64 + z / 64; 2^(-z/64) = 1 - z (b1 - z (b2 - ...)), b_n = (ln 2 / 64)^n / n!
  const u64 z = y << (64 - kExponentBits + 6);
  const uint32_t z32 = static_cast<uint32_t>(z >> 32);
  uint32_t tail = 22370u - multiply_high(z32, 40u);  // b5, b6 in units of 2^-54
  tail = 10327387u - multiply_high(z32, tail);
  tail = 3814213304u - multiply_high(z32, tail);
  u64 r = 540942003612761ull - multiply_high(z, static_cast<u64>(tail) << 9);  // units of 2^-63 from here on
  r = 99893036290645747ull - multiply_high(z, r);
  r = 0x8000000000000000ull - multiply_high(z, r);
  const u64 value = multiply_high(r, table[(y >> (kExponentBits - 6)) & 63]);  // units of 2^-62
  return (value + (1ull << (shift - 1))) >> shift;
}

}  // namespace qrt
