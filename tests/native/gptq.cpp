// GPTQ's words packed straight into panels, which gives what packing their codes gives.
#include "gptq.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"

namespace check {

void check_gptq(Case& c) {
  Random& random = c.random;
  const int bits = random.pick({4, 8});
  const int64_t per = 32 / bits, group = 16 * random.between(1, 8), groups = random.between(1, 6), k = group * groups;
  const int64_t n = random.chance(0.05) ? random.between(200, 700) : random.between(1, 150), stored = random.between(1, 7);
  const bool has_zeros = random.chance(0.5);
  c.describe("%d bits, %lld x %lld, groups of %lld, %lld stored", bits, static_cast<long long>(n),
             static_cast<long long>(k), static_cast<long long>(group), static_cast<long long>(stored));
  const qwen_rt::WeightKind kind = bits == 4 ? qwen_rt::WeightKind::kInt4 : qwen_rt::WeightKind::kInt8;
  const qwen_rt::Aux aux = has_zeros ? qwen_rt::Aux::kZeros : qwen_rt::Aux::kNone;
  qwen_rt::PackedLinear got(kind, aux, n, k, group), want(kind, aux, n, k, group);
  c.expect(qwen_rt::gptq_fits(got, has_zeros) && !qwen_rt::gptq_fits(got, !has_zeros), "fits");
  Buffer<int64_t> source(random, groups);
  for (int64_t g = 0; g < groups; ++g) source[g] = random.between(0, stored - 1);
  bool packed = true;
  for (int64_t start = 0; start < n;) {
    const int64_t count = std::min(n - start, 16 * random.between(1, 12)), pad = random.between(0, 3);
    const int64_t stride = count + pad;  // of rows, but the last one, which ends where its outputs do
    Buffer<uint32_t> words(random, (k / per - 1) * stride + count);
    Buffer<uint16_t> scales(random, (stored - 1) * stride + count), row_scales(random, count * groups);
    Buffer<uint8_t> zeros(random, (stored - 1) * stride + count), row_zeros(random, count * groups), codes(random, count * k);
    for (int64_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(random.next());
    for (int64_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<uint16_t>(random.next() & 0xbfff);
    for (int64_t i = 0; i < zeros.size(); ++i) zeros[i] = static_cast<uint8_t>(random.next());
    if (random.chance(0.1)) scales[random.between(0, scales.size() - 1)] = random.pick<uint16_t>({0x7c00, 0xfc00, 0x7e00});
    bool finite = true;
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t i = 0; i < k; ++i) {
        codes[row * k + i] = static_cast<uint8_t>(words[i / per * stride + row] >> bits * (i % per) & ((1u << bits) - 1));
      }
      for (int64_t g = 0; g < groups; ++g) {
        row_scales[row * groups + g] = scales[source[g] * stride + row];
        row_zeros[row * groups + g] = zeros[source[g] * stride + row];
        finite = finite && std::isfinite(f16_value(row_scales[row * groups + g]));
      }
    }
    std::vector<uint8_t> bytes(static_cast<size_t>(random.between(0, 9)));
    const auto offset = static_cast<int64_t>(bytes.size());
    const auto* first = reinterpret_cast<const uint8_t*>(words.data());
    bytes.insert(bytes.end(), first, first + 4 * words.size());
    const File file;
    c.expect(file.fd >= 0 && file.write(bytes), "a file to read");
    qwen_rt::PackedLinear cut(kind, aux, n, k, group);
    const qwen_rt::GptqWords part{&got, start, count, file.fd, offset, stride, scales.data(),
                                  has_zeros ? zeros.data() : nullptr, source.data(), stride, stride};
    qwen_rt::GptqWords bad = part;
    bad.w = &cut;
    ++bad.offset;
    c.expect(qwen_rt::gptq_pack({part, part}) == (finite ? 2 : 0), "finite");
    packed = packed && finite;
    c.expect(qwen_rt::gptq_pack({bad, part}) == 0 && (!finite || qwen_rt::gptq_pack({part, bad, bad}) == 1), "a file cut short");
    qwen_rt::pack_grouped(want, start, count, codes.data(), row_scales.data(), has_zeros ? row_zeros.data() : nullptr,
                          nullptr);
    start += count;
  }
  c.expect(!packed || !std::memcmp(got.data.get(), want.data.get(), static_cast<size_t>(want.nbytes())), "packed bytes");
}

}  // namespace check
