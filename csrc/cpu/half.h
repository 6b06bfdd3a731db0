// Scalar conversions between float and its 16-bit formats (round to nearest even), and finiteness of either.
#pragma once

#include <cstdint>
#include <cstring>

namespace qwen_rt {

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

inline uint16_t float_to_bf16(float f) {
  uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x0400u) return bits_to_float(sign | ((rest + 0x1c000u) << 13));
  const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;  // subnormal: rest * 2^-24
  return bits_to_float(sign | float_to_bits(magnitude));
}

inline uint16_t float_to_f16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return sign | 0x7e00u;
  if (a >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (a < 0x38800000u) {                        // subnormal or zero: let float addition round at 2^-24
    const float shifted = bits_to_float(a) + 0.5f;
    return sign | static_cast<uint16_t>(float_to_bits(shifted) - 0x3f000000u);
  }
  const uint32_t rounded = a + 0xfffu + ((a >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

// Whether no value has all its exponent bits set, as infinities and NaN have.
template <class T>
bool all_finite(const T* values, int64_t n, T exponent) {
  int good = 1;
  for (int64_t i = 0; i < n; ++i) good &= (values[i] & exponent) != exponent;
  return good;
}

}  // namespace qwen_rt
