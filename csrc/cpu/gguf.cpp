#include "gguf.h"

#include <algorithm>
#include <cstring>

#include "file.h"
#include "half.h"
#include "memory.h"
#include "parts.h"
#include "pool.h"

namespace qwen_rt {
namespace {

uint16_t half_at(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return h;
}

// d times an integer, rounded once: the product is exact in float32.
uint16_t product(uint16_t d, int factor) { return float_to_f16(f16_to_float(d) * static_cast<float>(factor)); }

// kWidth bytes -> their low nibbles, then their high ones.
template <int kWidth>
void nibbles(const uint8_t* q, uint8_t* out) {
  for (int i = 0; i < kWidth; ++i) {
    out[i] = q[i] & 15;
    out[kWidth + i] = q[i] >> 4;
  }
}

// 64 bytes -> of each half bits 0-1 of its bytes, then bits 2-3, 4-5, 6-7.
void crumbs(const uint8_t* q, uint8_t* out) {
  for (int half = 0; half < 2; ++half, q += 32) {
    for (int shift = 0; shift < 8; shift += 2, out += 32) {
      for (int i = 0; i < 32; ++i) out[i] = (q[i] >> shift) & 3;
    }
  }
}

// Adds `weight` to code 32 b + i where bit b of byte i is set.
void add_planes(const uint8_t* bits, int weight, uint8_t* out) {
  for (int b = 0; b < 8; ++b) {
    for (int i = 0; i < 32; ++i) out[32 * b + i] += static_cast<uint8_t>(((bits[i] >> b) & 1) * weight);
  }
}

void q4_0(const uint8_t* p, uint8_t* out, uint16_t* scales, uint16_t*) {
  *scales = half_at(p);
  nibbles<16>(p + 2, out);
}

void q4_1(const uint8_t* p, uint8_t* out, uint16_t* scales, uint16_t* mins) {
  *scales = half_at(p);
  *mins = half_at(p + 2);
  nibbles<16>(p + 4, out);
}

// The bits of each byte as bytes 0 or 16, the lowest first.
struct HighBits {
  uint64_t of[256];
  constexpr HighBits() : of() {
    for (uint64_t byte = 0; byte < 256; ++byte) {
      for (int i = 0; i < 8; ++i) of[byte] |= (byte >> i & 1) << (8 * i + 4);
    }
  }
};
constexpr HighBits kHighBits;

// Four bytes of which bit j of byte i is bit 4 of code 8 i + j, and nibbles.
void fives(const uint8_t* high, const uint8_t* q, uint8_t* out) {
  nibbles<16>(q, out);
  for (int i = 0; i < 4; ++i) {
    uint64_t codes;
    std::memcpy(&codes, out + 8 * i, 8);
    codes |= kHighBits.of[high[i]];
    std::memcpy(out + 8 * i, &codes, 8);
  }
}

void q5_0(const uint8_t* p, uint8_t* out, uint16_t* scales, uint16_t*) {
  *scales = half_at(p);
  fives(p + 2, p + 6, out);
}

void q5_1(const uint8_t* p, uint8_t* out, uint16_t* scales, uint16_t* mins) {
  *scales = half_at(p);
  *mins = half_at(p + 2);
  fives(p + 4, p + 8, out);
}

void q8_0(const uint8_t* p, uint8_t* out, uint16_t* scales, uint16_t*) {
  *scales = half_at(p);
  for (int i = 0; i < 32; ++i) out[i] = p[2 + i] ^ 128;
}

void q2_k(const uint8_t* p, uint8_t* out, uint16_t* scales, uint16_t* mins) {
  const uint16_t d = half_at(p + 80), dmin = half_at(p + 82);
  for (int g = 0; g < 16; ++g) {
    scales[g] = product(d, p[g] & 15);
    mins[g] = product(dmin, -(p[g] >> 4));
  }
  crumbs(p + 16, out);
}

void q3_k(const uint8_t* p, uint8_t* out, uint16_t* scales, uint16_t*) {
  const uint8_t* s = p + 96;
  const uint16_t d = half_at(p + 108);
  for (int g = 0; g < 16; ++g) {
    const int low = g < 8 ? s[g] & 15 : s[g - 8] >> 4, high = (s[8 + g % 4] >> (g / 4 * 2)) & 3;
    scales[g] = product(d, (low | high << 4) - 32);
  }
  crumbs(p + 32, out);
  add_planes(p, 4, out);
  for (int i = 0; i < 256; ++i) out[i] += 4;
}

// The first 16 bytes of a Q4_K or Q5_K block: d, dmin, and 8 scales and 8 minimums of 6 bits.
void six_bit(const uint8_t* p, uint16_t* scales, uint16_t* mins) {
  const uint16_t d = half_at(p), dmin = half_at(p + 2);
  const uint8_t *a = p + 4, *b = p + 8, *c = p + 12;
  for (int g = 0; g < 4; ++g) {
    scales[g] = product(d, a[g] & 63);
    scales[4 + g] = product(d, (c[g] & 15) | (a[g] >> 6) << 4);
    mins[g] = product(dmin, -(b[g] & 63));
    mins[4 + g] = product(dmin, -((c[g] >> 4) | (b[g] >> 6) << 4));
  }
}

void q4_k(const uint8_t* p, uint8_t* out, uint16_t* scales, uint16_t* mins) {
  six_bit(p, scales, mins);
  for (int run = 0; run < 4; ++run) nibbles<32>(p + 16 + 32 * run, out + 64 * run);
}

void q5_k(const uint8_t* p, uint8_t* out, uint16_t* scales, uint16_t* mins) {
  six_bit(p, scales, mins);
  for (int run = 0; run < 4; ++run) nibbles<32>(p + 48 + 32 * run, out + 64 * run);
  add_planes(p + 16, 16, out);
}

void q6_k(const uint8_t* p, uint8_t* out, uint16_t* scales, uint16_t*) {
  const uint16_t d = half_at(p + 208);
  for (int g = 0; g < 16; ++g) scales[g] = product(d, static_cast<int8_t>(p[192 + g]));
  crumbs(p + 128, out);
  for (int half = 0; half < 2; ++half, out += 128) {
    uint8_t low[128];
    nibbles<64>(p + 64 * half, low);
    for (int i = 0; i < 128; ++i) out[i] = static_cast<uint8_t>(out[i] << 4 | low[i]);
  }
}

using K = WeightKind;

constexpr GgufType kTypes[] = {
    {"Q4_0", 32, 18, 32, false, K::kInt4, q4_0},    {"Q4_1", 32, 20, 32, true, K::kInt4, q4_1},
    {"Q5_0", 32, 22, 32, false, K::kInt5, q5_0},    {"Q5_1", 32, 24, 32, true, K::kInt5, q5_1},
    {"Q8_0", 32, 34, 32, false, K::kInt8, q8_0},    {"Q2_K", 256, 84, 16, true, K::kInt4, q2_k},
    {"Q3_K", 256, 110, 16, false, K::kInt4, q3_k},  {"Q4_K", 256, 144, 32, true, K::kInt4, q4_k},
    {"Q5_K", 256, 176, 32, true, K::kInt5, q5_k},   {"Q6_K", 256, 210, 16, false, K::kInt6, q6_k},
};

}  // namespace

const GgufType* gguf_type(const char* name) {
  for (const GgufType& type : kTypes) {
    if (!std::strcmp(type.name, name)) return &type;
  }
  return nullptr;
}

void gguf_decode(const GgufType& type, const uint8_t* data, int64_t blocks, uint8_t* codes, uint16_t* scales,
                 uint16_t* mins) {
  constexpr int64_t kTaskElements = 1 << 16;
  const int64_t chunk = kTaskElements / type.block, groups = type.block / type.group;
  parallel_for((blocks + chunk - 1) / chunk, [&](int64_t task) {
    for (int64_t b = task * chunk; b < std::min(blocks, (task + 1) * chunk); ++b) {
      type.decode(data + b * type.bytes, codes + b * type.block, scales + b * groups, mins ? mins + b * groups : nullptr);
    }
  });
}

bool GgufDecoded::decode(const GgufType& type, const uint8_t* data, int64_t blocks) {
  const int64_t groups = type.block / type.group;
  codes.resize(blocks * type.block);
  scales.resize(blocks * groups);
  mins.resize(type.has_mins ? blocks * groups : 0);
  for (int64_t b = 0; b < blocks; ++b) {
    type.decode(data + b * type.bytes, codes.data() + b * type.block, scales.data() + b * groups,
                type.has_mins ? mins.data() + b * groups : nullptr);
  }
  bool finite = true;
  for (const auto* halves : {&scales, &mins}) {
    finite = finite && all_finite<uint16_t>(halves->data(), static_cast<int64_t>(halves->size()), 0x7c00);
  }
  return finite;
}

bool gguf_fits(const GgufType& type, const PackedLinear& w) {
  return w.kind == type.kind && w.group == type.group && w.aux == (type.has_mins ? Aux::kMins : Aux::kNone) &&
         w.k % type.block == 0;
}

int64_t gguf_pack(const std::vector<GgufRows>& parts) {
  constexpr int64_t kTaskBytes = 1 << 17;  // of the file, read at a time: they stay in a core's cache
  const auto row_bytes = [](const GgufRows& part) { return part.w->k / part.type->block * part.type->bytes; };
  const auto step = [&](const GgufRows& part) {
    return std::max<int64_t>(1, kTaskBytes / (row_bytes(part) * kPanel)) * kPanel;
  };
  std::vector<int64_t> tasks;
  for (const GgufRows& part : parts) tasks.push_back((part.rows + step(part) - 1) / step(part));
  return each_part(tasks, [&](int64_t at, int64_t task) {
    static thread_local GgufDecoded d;
    static thread_local Scratch<uint8_t> scratch;
    const auto& [w, start, rows, type, file, offset] = parts[at];
    const int64_t bytes = row_bytes(parts[at]), first = task * step(parts[at]), n = std::min(step(parts[at]), rows - first);
    uint8_t* data = scratch.room(n * bytes);
    if (!read_at(file, offset + first * bytes, n * bytes, data)) return false;
    for (int64_t row = 0; row < n; row += kPanel) {
      const int64_t here = std::min<int64_t>(kPanel, n - row);
      if (!d.decode(*type, data + row * bytes, here * (w->k / type->block))) return false;
      pack_panel(*w, (start + first + row) / kPanel, here, d.codes.data(), d.scales.data(), nullptr,
                 type->has_mins ? d.mins.data() : nullptr);
    }
    return true;
  });
}

bool gguf_string(std::string_view data, std::string_view* text) {
  uint64_t length;
  if (data.size() < sizeof(length)) return false;
  std::memcpy(&length, data.data(), sizeof(length));
  if (length > data.size() - sizeof(length)) return false;
  *text = data.substr(sizeof(length), length);
  return true;
}

}  // namespace qwen_rt
