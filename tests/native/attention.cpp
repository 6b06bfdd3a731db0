// The paged cache and attention over it: whole steps of mixed batches, and single tiles in exactly the scratch that
// attention.h grants them.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "pool.h"

namespace check {
namespace {

using qwen_rt::KvLayer;
using qwen_rt::KvType;

constexpr const char* kTypes[] = {"float32", "float16", "bfloat16", "int8"};

// Pages whose unused places hold the bytes of Buffer (NaN, or a code), and scattered block tables for sequences.
struct Cache {
  KvLayer kv;
  Buffer<uint8_t> data[2];
  Buffer<float> scale[2], min[2];
  std::vector<int64_t> kv_lens;
  int64_t table_stride;
  Buffer<int32_t> table;  // [sequences, table_stride]; entries past a sequence's end are no block's

  Cache(Random& random, KvType type, int64_t heads, int64_t block, int64_t size, const std::vector<int64_t>& lens)
      : Cache(random, type, heads, block, size, lens, blocks_of(lens, block) + random.between(0, 3)) {}

  int64_t slot(int64_t sequence, int64_t position) const {
    return table[sequence * table_stride + position / kv.block] * kv.block + position % kv.block;
  }
  static int64_t rows(const KvLayer& kv) { return rows(kv.num_blocks, kv.heads, kv.block, kv.block_rows); }
  int64_t row(int64_t slot, int64_t head) const { return kv.row(slot / kv.block, head, slot % kv.block); }

  // The largest step of int8 codes among a sequence's keys (0) or values (1) of a head.
  double step(int which, int64_t sequence, int64_t head) const {
    double largest = 0.0;
    for (int64_t j = 0; j < kv_lens[static_cast<size_t>(sequence)]; ++j) {
      largest = std::max(largest, static_cast<double>(scale[which][row(slot(sequence, j), head)]));
    }
    return largest;
  }

  // What element d of a row reads as; `size` gets what float32 may round on the way.
  double read(int which, int64_t row, int64_t d, double* size = nullptr) const {
    const int64_t i = row * kv.size + d;
    double x = 0.0;
    if (kv.type == KvType::kFloat32) {
      x = reinterpret_cast<const float*>(data[which].data())[i];
    } else if (kv.type == KvType::kInt8) {
      const double code = data[which][i] * static_cast<double>(scale[which][row]);
      if (size) *size = code + std::fabs(min[which][row]);
      return code + min[which][row];
    } else {
      const uint16_t bits = reinterpret_cast<const uint16_t*>(data[which].data())[i];
      x = kv.type == KvType::kFloat16 ? f16_value(bits) : bf16_value(bits);
    }
    if (size) *size = std::fabs(x);
    return x;
  }

 private:
  static int64_t blocks_of(const std::vector<int64_t>& lens, int64_t block) {
    int64_t n = 0;
    for (int64_t len : lens) n += (len + block - 1) / block;
    return n;
  }

  Cache(Random& random, KvType type, int64_t heads, int64_t block, int64_t size, const std::vector<int64_t>& lens,
        int64_t blocks)
      : Cache(random, type, heads, block, size, lens, blocks, heads * block + random.pick<int64_t>({0, 0, 1, 7 * block})) {}

  Cache(Random& random, KvType type, int64_t heads, int64_t block, int64_t size, const std::vector<int64_t>& lens,
        int64_t blocks, int64_t block_rows)
      : data{pages(random, type, rows(blocks, heads, block, block_rows) * size),
             pages(random, type, rows(blocks, heads, block, block_rows) * size)},
        scale{affine(random, type, rows(blocks, heads, block, block_rows)),
              affine(random, type, rows(blocks, heads, block, block_rows))},
        min{affine(random, type, rows(blocks, heads, block, block_rows)),
            affine(random, type, rows(blocks, heads, block, block_rows))},
        kv_lens(lens),
        table_stride((*std::max_element(lens.begin(), lens.end()) + block - 1) / block),
        table(random, static_cast<int64_t>(lens.size()) * table_stride) {
    kv = {type, blocks, heads, block, size, block_rows, {}, {}};
    for (int i = 0; i < 2; ++i) {
      const bool coded = type == KvType::kInt8;
      (i ? kv.v : kv.k) = {data[i].data(), coded ? scale[i].data() : nullptr, coded ? min[i].data() : nullptr};
    }
    std::vector<int32_t> ids(static_cast<size_t>(blocks));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
    for (size_t i = ids.size() - 1; i > 0; --i)
      std::swap(ids[i], ids[static_cast<size_t>(random.between(0, static_cast<int64_t>(i)))]);
    for (size_t b = 0; b < lens.size(); ++b) {
      for (int64_t i = 0; i * block < lens[b]; ++i) {
        table[static_cast<int64_t>(b) * table_stride + i] = ids.back();
        ids.pop_back();
      }
    }
  }

  // No more than the last block needs, so that reading past it is seen.
  static int64_t rows(int64_t blocks, int64_t heads, int64_t block, int64_t block_rows) {
    return (blocks - 1) * block_rows + heads * block;
  }

  static Buffer<uint8_t> pages(Random& random, KvType type, int64_t n) {
    return {random, n * qwen_rt::kv_element_bytes(type)};
  }
  static Buffer<float> affine(Random& random, KvType type, int64_t n) {
    return {random, type == KvType::kInt8 ? n : 0};
  }
};

// A [tokens, heads, size] part of a fused row, as q, k and v are of one matrix product.
struct Fused {
  int64_t tokens, heads, size, head_stride, token_stride;
  Buffer<float> data;

  Fused(Random& random, int64_t tokens_, int64_t heads_, int64_t size_)
      : Fused(random, tokens_, heads_, size_, size_ + random.pick<int64_t>({0, 0, 3}),
              random.pick<int64_t>({0, 0, 17})) {}
  float& at(int64_t t, int64_t h, int64_t d) const { return data[t * token_stride + h * head_stride + d]; }
  void fill(Random& random, float spread) const {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < size; ++d) at(t, h, d) = random.normal() * spread;
      }
    }
  }
  void check_gaps(const Case& c) const {
    std::vector<char> inside(static_cast<size_t>(data.size()));
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        std::fill_n(inside.begin() + t * token_stride + h * head_stride, size, char{1});
      }
    }
    for (int64_t i = 0; i < data.size(); ++i) {
      if (!inside[static_cast<size_t>(i)]) c.expect(data.untouched(i), "a gap was written", i);
    }
  }

 private:
  Fused(Random& random, int64_t tokens_, int64_t heads_, int64_t size_, int64_t head_stride_, int64_t gap)
      : tokens(tokens_),
        heads(heads_),
        size(size_),
        head_stride(head_stride_),
        token_stride(heads_ * head_stride_ + gap),
        data(random, (tokens_ - 1) * token_stride + (heads_ - 1) * head_stride_ + size_) {}
};

void store(const Cache& cache, const Fused& k, const Fused& v, const Buffer<int64_t>& slots) {
  qwen_rt::store_kv(cache.kv, k.data.data(), k.token_stride, k.head_stride, v.data.data(), v.token_stride,
                    v.head_stride, slots.data(), slots.size());
}

// One row of queries over keys [low, high) of its sequence, by the definition.
struct Expected {
  std::vector<double> out;
  double bound;
  double integers;  // what products of integers may add
};

Expected attend(const Cache& cache, int64_t sequence, int64_t kv_head, const float* q, double scale, int64_t low,
                int64_t high, bool words) {
  const int64_t size = cache.kv.size;
  std::vector<double> scores;
  double largest = 0.0, value = 0.0, top = -INFINITY, sum = 0.0, q_sum = 0.0, q_most = 0.0, rounded = 0.0;
  for (int64_t d = 0; d < size; ++d) {
    q_sum += std::fabs(static_cast<double>(q[d]));
    q_most = std::max(q_most, std::fabs(static_cast<double>(q[d])));
  }
  for (int64_t j = low; j < high; ++j) {
    const int64_t row = cache.row(cache.slot(sequence, j), kv_head);
    double s = 0.0, magnitude = 0.0, key_sum = 0.0, key_most = 0.0;
    for (int64_t d = 0; d < size; ++d) {
      double part;
      s += q[d] * cache.read(0, row, d, &part);
      magnitude += std::fabs(q[d]) * part;
      key_sum += part;
      key_most = std::max(key_most, part);
    }
    rounded = std::max(rounded, q_sum * key_most / 16382 + q_most * static_cast<double>(size) / 262144 * key_sum);
    scores.push_back(s * scale);
    top = std::max(top, s * scale);
    largest = std::max(largest, magnitude * scale);
  }
  Expected e{std::vector<double>(static_cast<size_t>(size)), 0.0, 0.0};
  for (double& s : scores) sum += s = std::exp(s - top);
  for (int64_t j = low; j < high; ++j) {
    const int64_t row = cache.row(cache.slot(sequence, j), kv_head);
    for (int64_t d = 0; d < size; ++d) {
      double part;
      e.out[static_cast<size_t>(d)] += scores[static_cast<size_t>(j - low)] / sum * cache.read(1, row, d, &part);
      value = std::max(value, part);
    }
  }
  // attention.h; for int8 the sizes of code * scale and min take the place of |k| and |v|, which may be far smaller.
  e.bound = (2 * static_cast<double>(size + 2) * largest + static_cast<double>(high - low) / 8 + 32) * kEps * value;
  if (cache.kv.type == KvType::kInt8 && size % 64 == 0) {
    const double score_error = scale * q_most / 65024 * 128 * static_cast<double>(size) * cache.step(0, sequence, kv_head);
    e.integers = std::expm1(2 * score_error) * value + cache.step(1, sequence, kv_head) / 16;
  } else if (words && size % 32 == 0 && (cache.kv.type == KvType::kFloat16 || cache.kv.type == KvType::kBFloat16)) {
    e.integers = (std::expm1(2 * 1.01 * scale * rounded) + 1.0 / 2046 + 64.0 / 65534) * value;
  }
  return e;
}

double bound_of(const Expected& e, Isa isa, KvType type) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512 || (isa == Isa::kAvx2 && type != KvType::kInt8)) return e.bound + e.integers;
#endif
  return e.bound;
}

}  // namespace

void check_kv(Case& c) {
  Random& random = c.random;
  const KvType type = static_cast<KvType>(random.between(0, 3));
  const int64_t heads = random.between(1, 4), block = random.between(1, 20), tokens = random.between(1, 40);
  const int64_t size = random.pick<int64_t>({64, 128, random.between(1, 40), random.between(1, 160)});
  c.describe("%s, %lld tokens, %lld heads of %lld, pages of %lld", kTypes[static_cast<int>(type)],
             static_cast<long long>(tokens), static_cast<long long>(heads), static_cast<long long>(size),
             static_cast<long long>(block));
  const Fused in[2] = {Fused(random, tokens, heads, size), Fused(random, tokens, heads, size)};
  std::vector<int64_t> bad;  // a token whose vectors are not finite
  for (const Fused& x : in) {
    x.fill(random, 1.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      const float spread = std::ldexp(1.0f, static_cast<int>(random.between(-24, 18)));
      const bool constant = random.chance(0.1);
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < size; ++d) x.at(t, h, d) = constant ? spread : x.at(t, h, d) * spread;
      }
    }
  }
  if (random.chance(0.3)) {
    bad.push_back(random.between(0, tokens - 1));
    for (const Fused& x : in) x.at(bad[0], 0, random.between(0, size - 1)) = random.pick({NAN, INFINITY, -INFINITY});
  }
  for (Isa isa : Case::isas()) {
    c.use(isa);
    const Cache cache(random, type, heads, block, size, {tokens});
    Buffer<int64_t> slots(random, tokens);
    for (int64_t t = 0; t < tokens; ++t) slots[t] = cache.slot(0, t);
    store(cache, in[0], in[1], slots);
    std::vector<char> used(static_cast<size_t>(Cache::rows(cache.kv)));
    for (int which = 0; which < 2; ++which) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t row = cache.row(slots[t], h);
          used[static_cast<size_t>(row)] = 1;
          const float* x = &in[which].at(t, h, 0);
          const bool finite = std::all_of(x, x + size, [](float v) { return std::isfinite(v); });
          const float low = *std::min_element(x, x + size), high = *std::max_element(x, x + size);
          const double step = (static_cast<double>(high) - low) / 255;
          for (int64_t d = 0; d < size; ++d) {
            const double got = cache.read(which, row, d);
            if (type == KvType::kInt8 && !finite) {
              c.expect(std::isnan(got), "a vector that is not finite", t, d);
            } else if (type == KvType::kInt8) {
              // Half a step, the step's and the sums' rounding; a constant vector exactly.
              const double most = std::max(std::fabs(low), std::fabs(high));
              c.near(got, x[d], low == high ? 0.0 : step / 2 + 4 * kEps * most + 256 * 0x1p-149, "int8", t, d);
            } else {
              const double want = type == KvType::kFloat16    ? f16_nearest(x[d])
                                  : type == KvType::kBFloat16 ? bf16_nearest(x[d])
                                                              : x[d];
              c.expect(std::isnan(want) ? std::isnan(got) : got == want, "stored", t, d);
            }
          }
        }
      }
      const int64_t width = size * qwen_rt::kv_element_bytes(type);
      for (size_t row = 0; row < used.size(); ++row) {
        if (used[row]) continue;
        const auto r = static_cast<int64_t>(row);
        for (int64_t i = 0; i < width; ++i)
          c.expect(cache.data[which].untouched(r * width + i), "another page's row", r, i);
        if (type == KvType::kInt8) {
          c.expect(cache.scale[which].untouched(r) && cache.min[which].untouched(r), "another row's scale", r);
        }
      }
    }
  }
}

void check_attention(Case& c) {
  Random& random = c.random;
  const KvType type = static_cast<KvType>(random.between(0, 3));
  const int64_t kv_heads = random.between(1, 2), block = random.pick<int64_t>({16, random.between(1, 40)});
  const int64_t group = random.pick<int64_t>({1, random.between(1, 8), random.between(1, 17)}),
                heads = kv_heads * group;
  const int64_t size = random.pick<int64_t>({64, 128, 32 * random.between(1, 8), random.between(1, 40), random.between(1, 160)});
  const int64_t window = random.pick<int64_t>({0, 0, random.between(1, 90)});
  const int64_t batch = random.between(1, 3);
  std::vector<int64_t> q_lens, kv_lens;
  int64_t budget = 1500000 / (heads * size);  // products of a query with a key, of the batch
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t keys = std::max<int64_t>(
        1, std::min(random.pick<int64_t>({random.between(1, 70), random.between(1, 700)}), budget / batch));
    const int64_t most = std::max<int64_t>(1, std::min(keys, budget / batch / keys));
    kv_lens.push_back(keys);
    q_lens.push_back(random.chance(0.4) ? 1 : random.between(1, most));
  }
  const float spread = random.pick({0.5f, 2.0f, 6.0f});
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
  const int64_t poisoned = random.chance(0.15) ? random.between(0, batch - 1) : -1;
  c.describe(
      "%s, %lld heads to %lld of %lld, pages of %lld, window %lld, rows %lld.. of %lld.. keys, %lld sequences, "
      "poison %lld, %d threads",
      kTypes[static_cast<int>(type)], static_cast<long long>(heads), static_cast<long long>(kv_heads),
      static_cast<long long>(size), static_cast<long long>(block), static_cast<long long>(window),
      static_cast<long long>(q_lens[0]), static_cast<long long>(kv_lens[0]), static_cast<long long>(batch),
      static_cast<long long>(poisoned), qwen_rt::num_threads());

  c.use(Case::isas()[0]);  // one cache for all: check_kv compares how they write it
  const Cache cache(random, type, kv_heads, block, size, kv_lens);
  for (int64_t b = 0; b < batch; ++b) {
    const auto at = static_cast<size_t>(b);
    const Fused k(random, kv_lens[at], kv_heads, size), v(random, kv_lens[at], kv_heads, size);
    k.fill(random, spread);
    v.fill(random, spread);
    if (b == poisoned) {
      k.at(random.between(0, kv_lens[at] - 1), 0, 0) = random.pick({NAN, INFINITY});
      v.at(random.between(0, kv_lens[at] - 1), 0, 0) = random.pick({NAN, INFINITY});
    }
    Buffer<int64_t> slots(random, kv_lens[at]);
    for (int64_t t = 0; t < kv_lens[at]; ++t) slots[t] = cache.slot(b, t);
    store(cache, k, v, slots);
  }
  Buffer<int64_t> q_start(random, batch + 1), lens(random, batch);
  q_start[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    q_start[b + 1] = q_start[b] + q_lens[static_cast<size_t>(b)];
    lens[b] = kv_lens[static_cast<size_t>(b)];
  }
  const Fused q(random, q_start[batch], heads, size);
  q.fill(random, spread);
  std::vector<Expected> want;  // by row and head
  const auto visible = [&](int64_t position) { return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0; };
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = q_start[b]; t < q_start[b + 1]; ++t) {
      const int64_t position = lens[b] - q_start[b + 1] + t;
      for (int64_t h = 0; h < heads; ++h) {
        want.push_back(b == poisoned
                           ? Expected{}
                           : attend(cache, b, h / group, &q.at(t, h, 0), scale, visible(position), position + 1,
                                    (q_start[b + 1] - q_start[b]) * group > qwen_rt::kAttentionBlock));
      }
    }
  }

  // A tile: some rows of one sequence and key head against a range of keys, not all of which every row may see.
  const int64_t b = random.between(0, batch - 1), rows_of = q_lens[static_cast<size_t>(b)],
                kv_head = random.between(0, kv_heads - 1);
  const int64_t token = random.between(0, rows_of - 1),
                tokens = random.between(1, std::min<int64_t>(rows_of - token, 40));
  const int64_t first = lens[b] - rows_of + token, tile = qwen_rt::kAttentionTile;
  int64_t begin = visible(first);
  begin += random.between(0, (first + tokens - 1 - begin) / tile) * tile;
  const int64_t end =
      random.chance(0.5) ? first + tokens : std::min(first + tokens, begin + random.between(1, 4) * tile);

  for (Isa isa : Case::isas()) {
    c.use(isa);
    const Fused out(random, q.tokens, heads, size);
    qwen_rt::attention({q.data.data(), q.token_stride, q.head_stride, out.data.data(), out.token_stride,
                        out.head_stride, heads, &cache.kv, batch, q_start.data(), lens.data(), cache.table.data(),
                        cache.table_stride, scale, window});
    size_t i = 0;
    for (int64_t t = 0; t < q.tokens; ++t) {
      for (int64_t h = 0; h < heads; ++h, ++i) {
        if (want[i].out.empty()) continue;
        for (int64_t d = 0; d < size; ++d) {
          c.near(out.at(t, h, d), want[i].out[static_cast<size_t>(d)], bound_of(want[i], isa, type), "attention",
                 t * heads + h, d);
        }
      }
    }
    out.check_gaps(c);

    const int64_t stride = (size + 15) / 16 * 16, rows = tokens * group;
    Buffer<float> queries(random, rows * stride), result(random, rows * stride), max(random, rows), sum(random, rows);
    const auto row_of = [&](int64_t r) {
      return &q.at(q_start[b] + token + r / group, kv_head * group + r % group, 0);
    };
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < stride; ++d) {
        queries[r * stride + d] = d < size ? row_of(r)[d] * static_cast<float>(scale * 1.4426950408889634) : 0.0f;
      }
    }
    const Buffer<float> scratch(random, qwen_rt::attention_scratch_floats(stride, rows));
    auto kernel = qwen_rt::attend_scalar;
#if defined(__x86_64__)
    if (isa == Isa::kAvx2) kernel = qwen_rt::attend_avx2;
    if (isa == Isa::kAvx512) kernel = qwen_rt::attend_avx512;
#elif defined(__aarch64__)
    if (isa == Isa::kNeon) kernel = qwen_rt::attend_neon;
#endif
    kernel({&cache.kv, kv_head, cache.table.data() + b * cache.table_stride, queries.data(), stride, rows, group, first,
            begin, end, window, scratch.data(), result.data(), max.data(), sum.data()});
    if (b == poisoned) continue;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = first + r / group, low = std::max(begin, visible(position)),
                    high = std::min(end, position + 1);
      if (low >= high) {
        c.expect(max[r] == -INFINITY && sum[r] == 0.0f, "a row that sees no key", r);
        for (int64_t d = 0; d < size; ++d)
          c.expect(std::isfinite(result[r * stride + d]), "a row that sees no key", r, d);
        continue;
      }
      const Expected e = attend(cache, b, kv_head, row_of(r), scale, low, high, rows > qwen_rt::kAttentionBlock);
      for (int64_t d = 0; d < size; ++d) {
        c.near(static_cast<double>(result[r * stride + d]) / sum[r], e.out[static_cast<size_t>(d)], bound_of(e, isa, type), "tile",
               r, d);
      }
    }
  }
}

}  // namespace check
