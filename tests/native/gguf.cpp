// GGUF blocks: each code, scale and minimum from the element's own bits, type by type, as gguf_dequant.py defines them.
// Then packing them, which gives what packing their codes gives, and strings with lengths that may lie.
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"

namespace check {
namespace {

struct Group {
  double scale, min;
};

double half_at(const uint8_t* p) { return f16_value(static_cast<uint16_t>(p[0] | p[1] << 8)); }

int nibble(const uint8_t* q, int64_t run, int64_t i) {  // of runs of `run` bytes: low nibbles, then high ones
  const int byte = q[i / (2 * run) * run + i % run];
  return i % (2 * run) < run ? byte & 15 : byte >> 4;
}

int crumb(const uint8_t* q, int64_t i) { return q[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3; }

int plane(const uint8_t* q, int64_t i) { return q[i % 32] >> (i / 32) & 1; }

int code_of(const std::string& type, const uint8_t* p, int64_t i) {
  if (type == "Q4_0") return nibble(p + 2, 16, i);
  if (type == "Q4_1") return nibble(p + 4, 16, i);
  if (type == "Q5_0") return nibble(p + 6, 16, i) | (p[2 + i / 8] >> (i % 8) & 1) << 4;
  if (type == "Q5_1") return nibble(p + 8, 16, i) | (p[4 + i / 8] >> (i % 8) & 1) << 4;
  if (type == "Q8_0") return static_cast<int8_t>(p[2 + i]) + 128;
  if (type == "Q2_K") return crumb(p + 16, i);
  if (type == "Q3_K") return crumb(p + 32, i) - (plane(p, i) ? 0 : 4) + 8;
  if (type == "Q4_K") return nibble(p + 16, 32, i);
  if (type == "Q5_K") return nibble(p + 48, 32, i) | plane(p + 16, i) << 4;
  const int64_t half = i / 128, j = i % 128;  // Q6_K
  return nibble(p + 64 * half, 64, j) | crumb(p + 128 + 32 * half, j) << 4;
}

Group group_of(const std::string& type, const uint8_t* p, int64_t g) {
  if (type == "Q4_0" || type == "Q5_0" || type == "Q8_0") return {half_at(p), 0};
  if (type == "Q4_1" || type == "Q5_1") return {half_at(p), half_at(p + 2)};
  if (type == "Q2_K") return {half_at(p + 80) * (p[g] & 15), half_at(p + 82) * -(p[g] >> 4)};
  if (type == "Q3_K") {
    const uint8_t* s = p + 96;
    const int six = (g < 8 ? s[g] & 15 : s[g - 8] >> 4) | (s[8 + g % 4] >> (g / 4 * 2) & 3) << 4;
    return {half_at(p + 108) * (six - 32), 0};
  }
  if (type == "Q6_K") return {half_at(p + 208) * static_cast<int8_t>(p[192 + g]), 0};
  const uint8_t* s = p + 4;
  const int64_t j = g % 4;
  const int scale = g < 4 ? s[j] & 63 : (s[8 + j] & 15) | (s[j] >> 6) << 4;
  const int min = g < 4 ? s[4 + j] & 63 : s[8 + j] >> 4 | (s[4 + j] >> 6) << 4;
  return {half_at(p) * scale, half_at(p + 2) * -min};
}

void same(const Case& c, uint16_t got, double want, const char* what, int64_t b, int64_t g) {
  const double nearest = f16_nearest(want), value = f16_value(got);
  c.expect(std::isnan(nearest) ? std::isnan(value) : value == nearest, what, b, g);
}

void check_pack(Case& c, const qwen_rt::GgufType& type) {
  Random& random = c.random;
  const int64_t n = random.between(1, 100), k = type.block * random.between(1, type.block == 32 ? 12 : 3);
  const int64_t blocks = k / type.block, groups = k / type.group, row_bytes = blocks * type.bytes;
  const qwen_rt::Aux aux = type.has_mins ? qwen_rt::Aux::kMins : qwen_rt::Aux::kNone;
  c.describe("packing %s, %lld x %lld", type.name, static_cast<long long>(n), static_cast<long long>(k));
  qwen_rt::PackedLinear got(type.kind, aux, n, k, type.group), want(type.kind, aux, n, k, type.group);
  c.expect(qwen_rt::gguf_fits(type, got), "the type fits");
  const qwen_rt::Aux wrong = type.has_mins ? qwen_rt::Aux::kZeros : qwen_rt::Aux::kMins;
  const qwen_rt::PackedLinear other(type.kind, wrong, n, k, type.group);
  c.expect(!qwen_rt::gguf_fits(type, other), "the type does not fit");
  const bool wild = random.chance(0.3);
  bool packed = true;
  for (int64_t start = 0; start < n;) {
    const int64_t rows = std::min(n - start, 16 * random.between(1, 4));
    Buffer<uint8_t> data(random, rows * row_bytes), codes(random, rows * k);
    Buffer<uint16_t> scales(random, rows * groups), mins(random, type.has_mins ? rows * groups : 0);
    // Bytes below 0x58 make float16 below 2^7, which stay finite times any byte.
    for (int64_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint8_t>(random.next() % (wild ? 256 : 0x58));
    uint16_t* m = type.has_mins ? mins.data() : nullptr;
    qwen_rt::gguf_decode(type, data.data(), rows * blocks, codes.data(), scales.data(), m);
    bool finite = true;
    for (const Buffer<uint16_t>* halves : {&scales, &mins}) {
      for (int64_t i = 0; i < halves->size(); ++i) finite = finite && std::isfinite(f16_value((*halves)[i]));
    }
    c.expect(wild || finite, "tame scales");
    std::vector<uint8_t> bytes(static_cast<size_t>(random.between(0, 9)));
    const auto offset = static_cast<int64_t>(bytes.size());
    bytes.insert(bytes.end(), data.data(), data.data() + data.size());
    const File file;
    c.expect(file.fd >= 0 && file.write(bytes), "a file to read");
    qwen_rt::PackedLinear cut(type.kind, aux, n, k, type.group);
    const qwen_rt::GgufRows good{&got, start, rows, &type, file.fd, offset};
    const qwen_rt::GgufRows bad{&cut, start, rows, &type, file.fd, offset + 1};
    c.expect(qwen_rt::gguf_pack({good, good}) == (finite ? 2 : 0), "finite");
    packed = packed && finite;
    c.expect(qwen_rt::gguf_pack({bad, good}) == 0 && (!finite || qwen_rt::gguf_pack({good, bad, bad}) == 1), "a file cut short");
    qwen_rt::pack_grouped(want, start, rows, codes.data(), scales.data(), nullptr, m);
    start += rows;
  }
  c.expect(!packed || !std::memcmp(got.data.get(), want.data.get(), static_cast<size_t>(want.nbytes())), "packed bytes");
}

void check_string(Case& c) {
  Random& random = c.random;
  Buffer<char> data(random, random.between(0, 40));
  for (int64_t i = 0; i < data.size(); ++i) data[i] = static_cast<char>(random.next());
  const uint64_t length =
      random.pick<uint64_t>({0, 1, 8, 31, 32, 33, UINT64_MAX, UINT64_MAX - 7, UINT64_MAX / 2, 1ull << 32});
  if (data.size() >= 8 && random.chance(0.9)) std::memcpy(data.data(), &length, 8);
  const std::string_view bytes(data.data(), static_cast<size_t>(data.size()));
  uint64_t said = 0;
  if (bytes.size() >= 8) std::memcpy(&said, bytes.data(), 8);
  std::string_view text;
  const bool whole = bytes.size() >= 8 && said <= bytes.size() - 8;
  c.expect(qwen_rt::gguf_string(bytes, &text) == whole, "string");
  if (whole) c.expect(text == bytes.substr(8, static_cast<size_t>(said)), "its text");
}

}  // namespace

void check_gguf(Case& c) {
  Random& random = c.random;
  const std::string name =
      random.pick({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"});
  const qwen_rt::GgufType* type = qwen_rt::gguf_type(name.c_str());
  c.expect(type != nullptr && qwen_rt::gguf_type("Q9_9") == nullptr, "the types");
  const int64_t elements = random.chance(0.05) ? random.between(60000, 140000) : random.between(0, 3000);
  const int64_t blocks = elements / type->block, groups = type->block / type->group;
  c.describe("%s, %lld blocks", name.c_str(), static_cast<long long>(blocks));
  Buffer<uint8_t> data(random, blocks * type->bytes), codes(random, blocks * type->block);
  Buffer<uint16_t> scales(random, blocks * groups), mins(random, type->has_mins ? blocks * groups : 0);
  for (int64_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint8_t>(random.next());
  qwen_rt::gguf_decode(*type, data.data(), blocks, codes.data(), scales.data(), type->has_mins ? mins.data() : nullptr);
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t* block = data.data() + b * type->bytes;
    for (int64_t i = 0; i < type->block; ++i) {
      c.expect(codes[b * type->block + i] == code_of(name, block, i), "code", b, i);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const Group want = group_of(name, block, g);
      same(c, scales[b * groups + g], want.scale, "scale", b, g);
      if (type->has_mins) same(c, mins[b * groups + g], want.min, "min", b, g);
    }
  }
  check_pack(c, *type);
  check_string(c);
}

}  // namespace check
