// A table in its file: rows are those that packing it gives, and a file that is cut short is an error.
#include "table.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"

namespace check {
namespace {

template <class F>
bool throws(const F& call) {
  try {
    call();
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

}  // namespace

void check_table(Case& c) {
  Random& random = c.random;
  const std::string kind = random.pick({"float32", "float16", "bfloat16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K",
                                        "Q3_K", "Q4_K", "Q5_K", "Q6_K"});
  const qwen_rt::GgufType* type = qwen_rt::gguf_type(kind.c_str());
  const int64_t n = random.chance(0.02) ? random.between(1000, 3000) : random.between(1, 60);
  const int64_t k = type ? type->block * random.between(1, type->block == 32 ? 12 : 2) : random.between(1, 300);
  const int64_t row_bytes = type ? k / type->block * type->bytes : k * (kind == "float32" ? 4 : 2);
  const int64_t offset = random.between(0, 100), groups = type ? k / type->group : 0;
  c.describe("%s, %lld x %lld at %lld", kind.c_str(), static_cast<long long>(n), static_cast<long long>(k),
             static_cast<long long>(offset));
  std::vector<uint8_t> bytes(offset + n * row_bytes);
  const bool wild = random.chance(0.3);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.next() % (wild ? 256 : 0x58));
  const File file;
  c.expect(file.fd >= 0 && file.write(bytes), "a file to read");
  const qwen_rt::Table table(file.path, offset, n, k, kind);

  std::vector<float> want(n * k), bound(n * k);
  bool finite = true;
  std::vector<uint8_t> codes(k);
  std::vector<uint16_t> scales(groups), mins(groups);
  for (int64_t row = 0; row < n; ++row) {
    const uint8_t* in = bytes.data() + offset + row * row_bytes;
    if (type) qwen_rt::gguf_decode(*type, in, k / type->block, codes.data(), scales.data(), type->has_mins ? mins.data() : nullptr);
    for (int64_t i = 0; i < k; ++i) {
      float& w = want[row * k + i];
      if (type) {
        const float scale = static_cast<float>(f16_value(scales[i / type->group]));
        const int zero = type->has_mins ? 0 : qwen_rt::implied_zero(type->kind);
        const float min = type->has_mins ? static_cast<float>(f16_value(mins[i / type->group])) : 0.0f;
        w = scale * static_cast<float>(codes[i] - zero);
        bound[row * k + i] = static_cast<float>(2 * kEps) * (std::fabs(w) + std::fabs(min)) * (min != 0.0f);
        w += min;
        finite = finite && std::isfinite(scale) && std::isfinite(min);
      } else if (kind == "float32") {
        std::memcpy(&w, in + 4 * i, 4);
        finite = finite && std::isfinite(w);
      } else {
        uint16_t half;
        std::memcpy(&half, in + 2 * i, 2);
        w = static_cast<float>(kind == "float16" ? f16_value(half) : bf16_value(half));
        finite = finite && std::isfinite(w);
      }
    }
  }
  c.expect(table.finite() == finite, "finite");
  const int64_t count = random.between(0, 70);
  Buffer<int64_t> ids(random, count);
  Buffer<float> got(random, count * k);
  for (int64_t i = 0; i < count; ++i) ids[i] = random.between(0, n - 1);
  table.rows(ids.data(), count, got.data());
  for (int64_t i = 0; i < count * k; ++i) {
    const int64_t at = ids[i / k] * k + i % k;
    if (std::isfinite(want[at])) c.near(got[i], want[at], bound[at], "value", i / k, i % k);
  }

  bytes.resize(bytes.size() - 1);
  c.expect(file.write(bytes), "a shorter file");
  const int64_t last = n - 1;
  std::vector<float> row(k);
  c.expect(throws([&] { table.rows(&last, 1, row.data()); }), "rows of a file cut short");
  c.expect(!finite || throws([&] { table.finite(); }), "reading a file cut short");
  c.expect(throws([&] { qwen_rt::Table("/nowhere/at/all", 0, n, k, kind); }), "no file");
}

}  // namespace check
