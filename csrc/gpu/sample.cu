// Choosing one token from each row of float32 logits; the processing order and definitions are those of SampleRow
// (backends/base.py), the oracle is backends/reference.py's sample_row. Only ids leave the device.
//
//   sample_adjust     bias, penalties and bans, at the (row, id) pairs that have any
//   sample_top        the largest logit of each chunk of a row; clears the row's histogram
//   sample_histogram  weight and number of tokens by distance from the largest: kBuckets buckets of 1/32 in y
//   sample_pick       one block a row: finds the border tokens of top-k, top-p and min-p, and the token at `uniform`
//
// Nothing is sorted. Tokens are ordered by falling logit, ties by lower id, as one 64-bit number each (`rank`). Every
// question is "which token makes the running sum of counts (top-k) or weights (top-p, uniform) pass a target?": the
// histogram says in which bucket; if that holds more than kList tokens it is divided by rank, kBuckets ways a time; the
// rest, usually a few hundred, is ordered in shared memory. A row is read three to five times, by one block after the
// histogram.
//
// How exact: an adjusted logit is computed in float64 and rounded once to float32; weights are integers
// (sample_weight.cuh), their sums exact. A border between two tokens therefore lies within V (2^-F / 2 + 2^-46) / total
// of the reference's in `uniform` (total: the sum of weights, where the heaviest is 1; at V = 2^18, F = 45, that is at
// worst 2^-27, for independent roundings about 2^-36), plus |x| 2^-24 p / temperature for an adjusted token of
// probability p; only a `uniform`, or a top_p, that near to a border may choose the neighbour. Greedy, top-k and ties
// are exact but for adjusted logits that float32 cannot tell apart. Tokens below 2^-F / 2 of the heaviest count nothing.
#include "sample_weight.cuh"

namespace qrt {
namespace {

constexpr int kBuckets = 2048;
constexpr float kBucketsPerUnit = kBuckets / kFar;
constexpr int kList = 1024;
constexpr int kSettings = 5;  // scale = log2(e) / temperature (0: greedy), top_k, top_p, -log2(min_p), uniform
constexpr u64 kUnusable = 0;  // rank of NaN and +infinity, before all others

// Rises as x falls: the complement of the order-preserving bits of a float. -0 and +0 are the same.
QRT_DEVICE uint32_t falling_bits(float x) {
  const uint32_t b = float_bits(x) == 0x80000000u ? 0u : float_bits(x);
  return b & 0x80000000u ? b : ~(b | 0x80000000u);
}
QRT_DEVICE float logit_of(u64 rank) {
  const uint32_t b = static_cast<uint32_t>(rank >> 32);
  return bits_float(b & 0x80000000u ? b : ~b & 0x7fffffffu);
}
QRT_DEVICE u64 rank_of(float x, int id) {
  return static_cast<u64>(falling_bits(x)) << 32 | static_cast<uint32_t>(id);
}
QRT_DEVICE int id_of(u64 rank) { return static_cast<int>(rank & 0xffffffffu); }

// Sum of v over the threads before this one; *total the sum over all. shared: 32 words.
QRT_DEVICE u64 block_scan(u64 v, u64* shared, u64* total) {
  u64 through = v;
  for (int d = 1; d < kWarp; d <<= 1) {
    const u64 up = shfl_up(through, d);
    if (lane_id() >= d) through += up;
  }
  __syncthreads();  // the last call's readers are done
  if (lane_id() == kWarp - 1) shared[warp_id()] = through;
  __syncthreads();
  u64 before = 0, all = 0;
  for (int w = 0; w < num_warps(); ++w) {
    if (w < warp_id()) before += shared[w];
    all += shared[w];
  }
  *total = all;
  return before + through - v;
}

QRT_DEVICE u64 block_min(u64 v, u64* shared) {
  for (int m = kWarp / 2; m > 0; m >>= 1) v = min(v, shfl_xor(v, m));
  __syncthreads();
  if (lane_id() == 0) shared[warp_id()] = v;
  __syncthreads();
  v = shared[0];
  for (int w = 1; w < num_warps(); ++w) v = min(v, shared[w]);
  return v;
}

// Shared memory of sample_pick.
struct Workspace {
  union {
    struct {
      u64 mass[kBuckets];
      uint32_t count[kBuckets];
    } histogram;
    struct {
      u64 rank[kList], mass[kList];
    } list;
  };
  u64 table[64];
  u64 scan[32];
  int found, size;
  u64 found_mass, found_count;
};

// One row of logits and how its tokens are weighed.
struct Row {
  const float* logits;
  int vocab, fraction;
  float top;
  Scale scale;
  const u64* table;

  QRT_DEVICE u64 weigh(float x) const { return weight(exponent(top, x, scale), fraction, table); }
  // The bucket of a token, or -1 when it counts nothing.
  QRT_DEVICE int bucket(float x) const {
    const float y = rough_exponent(top, x, scale);
    return y < kFar ? static_cast<int>(y * kBucketsPerUnit) : -1;
  }
  // Calls f(id, logit) for this thread's share of the tokens in buckets [first, last].
  template <class F>
  QRT_DEVICE void for_buckets(int first, int last, const F& f) const {
#pragma unroll 4
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
      const float x = logits[i];
      const int b = bucket(x);
      if (b >= first && b <= last) f(i, x);
    }
  }
};

// Where a running sum passes a target: cell `index` (-1: nowhere), and the sums before it.
struct Cell {
  int index;
  u64 mass, count;
};

// The first of n cells at which the running count (by_count) or mass exceeds `target`; the same in every thread.
template <class Mass, class Count>
QRT_DEVICE Cell find_cell(Workspace& ws, int n, bool by_count, u64 target, const Mass& mass, const Count& count) {
  const int each = ceil_div(n, static_cast<int>(blockDim.x)), begin = min(n, each * static_cast<int>(threadIdx.x));
  const int end = min(n, begin + each);
  u64 m = 0, c = 0, total;
  for (int i = begin; i < end; ++i) {
    m += mass(i);
    c += count(i);
  }
  if (threadIdx.x == 0) ws.found = -1;  // block_scan has a barrier before anyone writes it below
  u64 m_before = block_scan(m, ws.scan, &total), c_before = block_scan(c, ws.scan, &total);
  const u64 before = by_count ? c_before : m_before;
  if (target >= before && target - before < (by_count ? c : m)) {  // one thread
    int i = begin;
    for (;; ++i) {
      const u64 mi = mass(i), ci = count(i);
      if (target < (by_count ? c_before + ci : m_before + mi)) break;
      m_before += mi;
      c_before += ci;
    }
    ws.found = i;
    ws.found_mass = m_before;
    ws.found_count = c_before;
  }
  __syncthreads();
  return {ws.found, ws.found_mass, ws.found_count};
}

// Sorts list.rank[0, n), n <= kList, ascending (bitonic, padded to a power of two).
QRT_DEVICE void sort_list(Workspace& ws, int n) {
  int padded = 1;
  while (padded < n) padded <<= 1;
  for (int i = n + static_cast<int>(threadIdx.x); i < padded; i += blockDim.x) ws.list.rank[i] = ~0ull;
  __syncthreads();
  for (int run = 2; run <= padded; run <<= 1) {
    for (int apart = run >> 1; apart > 0; apart >>= 1) {
      for (int i = threadIdx.x; i < padded; i += blockDim.x) {
        const int j = i ^ apart;
        if (j <= i) continue;
        const u64 a = ws.list.rank[i], b = ws.list.rank[j];
        if ((a > b) == ((i & run) == 0)) {
          ws.list.rank[i] = b;
          ws.list.rank[j] = a;
        }
      }
      __syncthreads();
    }
  }
}

// A token, and the mass of all tokens up to and including it.
struct Token {
  u64 rank, mass;
};

// The token at which the running count or mass over the whole row exceeds `target`; rank ~0 when none does.
QRT_DEVICE Token locate(Workspace& ws, const Row& row, const u64* masses, const uint32_t* counts, bool by_count,
                        u64 target) {
  Cell cell = find_cell(
      ws, kBuckets, by_count, target, [&](int i) { return masses[i]; },
      [&](int i) { return static_cast<u64>(counts[i]); });
  if (cell.index < 0) return {~0ull, 0};
  const int bucket = cell.index;
  u64 mass = cell.mass, low = 0, high = ~0ull;
  int n = static_cast<int>(counts[bucket]);
  target -= by_count ? cell.count : cell.mass;

  if (n > kList) {
    u64 first = ~0ull, last = 0;
    row.for_buckets(bucket, bucket, [&](int i, float x) {
      first = min(first, rank_of(x, i));
      last = max(last, rank_of(x, i));
    });
    low = block_min(first, ws.scan);
    high = ~block_min(~last, ws.scan);
    while (n > kList) {  // ranks are distinct: each turn takes 11 bits off their range
      int shift = 0;
      while ((high - low) >> shift >= kBuckets) ++shift;
      __syncthreads();
      for (int i = threadIdx.x; i < kBuckets; i += blockDim.x) ws.histogram.mass[i] = ws.histogram.count[i] = 0;
      __syncthreads();
      row.for_buckets(bucket, bucket, [&](int i, float x) {
        const u64 rank = rank_of(x, i);
        if (rank < low || rank > high) return;
        const int d = static_cast<int>((rank - low) >> shift);
        atomicAdd(&ws.histogram.count[d], 1u);
        atomicAdd(&ws.histogram.mass[d], row.weigh(x));
      });
      __syncthreads();
      cell = find_cell(
          ws, kBuckets, by_count, target, [&](int i) { return ws.histogram.mass[i]; },
          [&](int i) { return static_cast<u64>(ws.histogram.count[i]); });
      n = static_cast<int>(ws.histogram.count[cell.index]);
      mass += cell.mass;
      target -= by_count ? cell.count : cell.mass;
      low += static_cast<u64>(cell.index) << shift;
      high = min(high, low + ((1ull << shift) - 1));
    }
  }

  __syncthreads();
  if (threadIdx.x == 0) ws.size = 0;
  __syncthreads();
  row.for_buckets(bucket, bucket, [&](int i, float x) {
    const u64 rank = rank_of(x, i);
    if (rank >= low && rank <= high) ws.list.rank[atomicAdd(&ws.size, 1)] = rank;
  });
  __syncthreads();
  sort_list(ws, n);
  for (int i = threadIdx.x; i < n; i += blockDim.x) ws.list.mass[i] = row.weigh(logit_of(ws.list.rank[i]));
  __syncthreads();
  cell = find_cell(
      ws, n, by_count, target, [&](int i) { return ws.list.mass[i]; }, [](int) { return 1ull; });
  const Token token{ws.list.rank[cell.index], mass + cell.mass + ws.list.mass[cell.index]};
  __syncthreads();  // before the list is written again
  return token;
}

// Mass of the tokens with y <= `most` (units of 1), a prefix of the order.
QRT_DEVICE u64 mass_within(Workspace& ws, const Row& row, const u64* masses, double most) {
  const u64 limit = static_cast<u64>(most * 281474976710656.0);
  const int at = static_cast<int>(most * static_cast<double>(kBucketsPerUnit));
  const int first = max(0, at - 1);  // rough exponents may be one bucket off
  u64 mass = 0, total;
  for (int i = threadIdx.x; i < first; i += blockDim.x) mass += masses[i];
  row.for_buckets(first, at + 1, [&](int, float x) {
    const u64 y = exponent(row.top, x, row.scale);
    if (y <= limit) mass += weight(y, row.fraction, row.table);
  });
  block_scan(mass, ws.scan, &total);
  return total;
}

// The rank of the row's first token (kUnusable: the row has NaN or +infinity).
QRT_DEVICE u64 first_rank(const u64* tops, int chunks, u64* shared) {
  u64 best = ~0ull;
  for (int i = threadIdx.x; i < chunks; i += blockDim.x) best = min(best, tops[i]);
  return block_min(best, shared);
}

QRT_DEVICE bool usable(u64 rank) { return rank != kUnusable && is_finite(logit_of(rank)); }

QRT_DEVICE int pick(Workspace& ws, const float* logits, const u64* tops, const u64* masses, const uint32_t* counts,
                    const double* settings, int vocab, int chunks) {
  const u64 best = first_rank(tops, chunks, ws.scan);
  if (!usable(best)) return -1;
  if (settings[0] == 0.0) return id_of(best);
  for (int i = threadIdx.x; i < 64; i += blockDim.x) ws.table[i] = kExp2Table[i];
  __syncthreads();
  const Row row{logits, vocab, fraction_bits(vocab), logit_of(best), Scale::of(settings[0]), ws.table};

  u64 mass = 0, part = 0;
  for (int i = threadIdx.x; i < kBuckets; i += blockDim.x) part += masses[i];
  block_scan(part, ws.scan, &mass);
  const double top_k = settings[1], top_p = settings[2], farthest = settings[3], uniform = settings[4];
  if (top_k >= 1.0 && top_k < static_cast<double>(vocab)) {
    const Token last = locate(ws, row, masses, counts, true, static_cast<u64>(top_k) - 1);
    if (last.rank != ~0ull) mass = last.mass;  // else all that weighs anything is among the k
  }
  if (top_p < 1.0) {
    const double target = ceil(top_p * static_cast<double>(mass));
    const u64 reach = target >= 1.0 ? min(mass, static_cast<u64>(target)) : 1;
    mass = locate(ws, row, masses, counts, false, reach - 1).mass;
  }
  if (farthest < static_cast<double>(kFar)) mass = min(mass, mass_within(ws, row, masses, farthest));
  const u64 target = min(mass - 1, static_cast<u64>(uniform * static_cast<double>(mass)));
  return id_of(locate(ws, row, masses, counts, false, target).rank);
}

}  // namespace
}  // namespace qrt

// Logits [rows, vocab] float32 with a row stride in elements; vocab < 2^31. `chunks` chunks of `chunk` tokens cover a row.

// Pair e of `pairs` changes the logit at (pair_rows[e], pair_ids[e]), each at most once:
//   x += bias[e];  seen: x = x > 0 ? x / repetition : x * repetition;  x -= presence + frequency * count, if count > 0;
//   banned: x = -infinity,  with flags[e] = count << 2 | banned << 1 | seen and penalties [rows, 3] float64 = repetition,
// presence, frequency of a row. float64, rounded once. Grid (ceil(pairs / block)), block 256 or fewer.
QRT_KERNEL(256)
sample_adjust(float* logits, const int32_t* pair_rows, const int32_t* pair_ids, const int32_t* flags,
              const double* bias, const double* penalties, int64_t stride, int32_t pairs) {
  const int e = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (e >= pairs) return;
  const double* penalty = penalties + 3 * static_cast<int64_t>(pair_rows[e]);
  float* logit = logits + pair_rows[e] * stride + pair_ids[e];
  const int flag = flags[e];
  double x = static_cast<double>(*logit) + bias[e];
  if (flag & 1) x = x > 0.0 ? x / penalty[0] : x * penalty[0];
  if (flag >> 2) x -= penalty[1] + penalty[2] * static_cast<double>(flag >> 2);
  *logit = flag & 2 ? -qrt::infinity() : static_cast<float>(x);
}
QRT_REGISTER(sample_adjust);

// tops [rows, chunks]; masses and counts [rows, 2048] are set to 0. Grid (chunks, rows), block 256 or fewer.
QRT_KERNEL(256)
sample_top(const float* logits, unsigned long long* tops, unsigned long long* masses, uint32_t* counts, int64_t stride,
           int32_t vocab, int32_t chunk) {
  __shared__ qrt::u64 shared[32];
  const int64_t row = blockIdx.y;
  const int threads = blockDim.x, part = blockIdx.x;
  logits += row * stride;
  qrt::u64 best = ~0ull;
  const int end = static_cast<int>(qrt::min<int64_t>(vocab, (part + 1ll) * chunk));
  for (int64_t i = static_cast<int64_t>(part) * chunk + threadIdx.x; i < end; i += threads) {
    const float x = logits[i];
    const bool bad = qrt::is_nan(x) || x == qrt::infinity();
    best = qrt::min(best, bad ? qrt::kUnusable : qrt::rank_of(x, static_cast<int>(i)));
  }
  for (int i = part * threads + threadIdx.x; i < qrt::kBuckets; i += static_cast<int>(gridDim.x) * threads) {
    masses[row * qrt::kBuckets + i] = 0;
    counts[row * qrt::kBuckets + i] = 0;
  }
  best = qrt::block_min(best, shared);
  if (threadIdx.x == 0) tops[row * gridDim.x + part] = best;
}
QRT_REGISTER(sample_top);

// After sample_top: adds up the chunks' tokens. settings [rows, 5] float64. Greedy and unusable rows are left out.
// Grid (chunks, rows), block 256 or fewer.
QRT_KERNEL(256)
sample_histogram(const float* logits, const unsigned long long* tops, unsigned long long* masses, uint32_t* counts,
                 const double* settings, int64_t stride, int32_t vocab, int32_t chunk) {
  __shared__ qrt::u64 mass[qrt::kBuckets], table[64], shared[32];
  __shared__ uint32_t count[qrt::kBuckets];
  const int64_t row = blockIdx.y;
  const int threads = blockDim.x, part = blockIdx.x;
  const double scale = settings[row * qrt::kSettings];
  const qrt::u64 best = qrt::first_rank(tops + row * gridDim.x, gridDim.x, shared);
  if (scale == 0.0 || !qrt::usable(best)) return;
  for (int i = threadIdx.x; i < qrt::kBuckets; i += threads) mass[i] = count[i] = 0;
  for (int i = threadIdx.x; i < 64; i += threads) table[i] = qrt::kExp2Table[i];
  __syncthreads();
  const qrt::Row r{logits + row * stride, vocab, qrt::fraction_bits(vocab), qrt::logit_of(best),
                   qrt::Scale::of(scale), table};
  const int end = static_cast<int>(qrt::min<int64_t>(vocab, (part + 1ll) * chunk));
  for (int64_t i = static_cast<int64_t>(part) * chunk + threadIdx.x; i < end; i += threads) {
    const float x = r.logits[i];
    const int b = r.bucket(x);
    if (b < 0) continue;
    atomicAdd(&count[b], 1u);
    atomicAdd(&mass[b], r.weigh(x));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < qrt::kBuckets; i += threads) {
    if (count[i] == 0) continue;
    atomicAdd(&counts[row * qrt::kBuckets + i], count[i]);
    atomicAdd(&masses[row * qrt::kBuckets + i], mass[i]);
  }
}
QRT_REGISTER(sample_histogram);

// After sample_histogram (which a batch of greedy rows does not need): ids [rows], -1 for a row with NaN or +infinity, or
// whose tokens are all -infinity. Grid (rows), block any multiple of a warp up to 512.
QRT_KERNEL(512)
sample_pick(int32_t* ids, const float* logits, const unsigned long long* tops, const unsigned long long* masses,
            const uint32_t* counts, const double* settings, int64_t stride, int32_t vocab, int32_t chunks) {
  __shared__ qrt::Workspace ws;
  const int64_t row = blockIdx.x;
  const int id = qrt::pick(ws, logits + row * stride, tops + row * chunks, masses + row * qrt::kBuckets,
                           counts + row * qrt::kBuckets, settings + row * qrt::kSettings, vocab, chunks);
  if (threadIdx.x == 0) ids[row] = id;
}
QRT_REGISTER(sample_pick);
