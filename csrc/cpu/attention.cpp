#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_features.h"
#include "half.h"
#include "memory.h"
#include "pool.h"

namespace qwen_rt {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr double kLog2e = 1.4426950408889634;
constexpr int64_t kMinSplitKeys = 128;   // shorter parts are not worth a merge, whatever they balance
constexpr int64_t kLongSplitKeys = 2048;  // a merge of parts as long as this costs nothing
constexpr int64_t kTileRows = 384;       // query rows (tokens x heads of a group) that share one converted key tile

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Tokens [token, token + tokens) of a sequence, one key head, keys [begin, end).
struct Job {
  int64_t seq, head, token, tokens, begin, end;
  int64_t slot;   // of the partial result; -1: the whole range, written to `out` at once
  int64_t parts;  // of the range that this job belongs to
};

struct Partial {
  float *out, *max, *sum;
};

class Attention {
 public:
  explicit Attention(const AttentionArgs& args)
      : a_(args),
        size_(args.kv->size),
        stride_(round_up(size_, 16)),
        group_(args.num_heads / args.kv->heads),
        scale_(static_cast<float>(args.scale * kLog2e)) {
    max_rows_ = group_ * std::max<int64_t>(6, kTileRows / group_ / 6 * 6);
  }

  void run() {
    make_jobs();
    auto kernel = attend_scalar;
#if defined(__x86_64__)
    if (active_isa() >= Isa::kAvx2) kernel = attend_avx2;
    if (active_isa() >= Isa::kAvx512) kernel = attend_avx512;
#elif defined(__aarch64__)
    if (active_isa() == Isa::kNeon) kernel = attend_neon;
#endif
    const int64_t partial = round_up(max_rows_ * (stride_ + 2), 16);
    const int64_t own = round_up(max_rows_ * stride_ + attention_scratch_floats(stride_, max_rows_), 16) + partial;
    thread_local Scratch<float> scratch;
    float* const base = scratch.room(threads_ * own + num_slots_ * partial);
    float* const slots = base + threads_ * own;
    const auto partial_at = [&](float* p) {
      return Partial{p, p + max_rows_ * stride_, p + max_rows_ * (stride_ + 1)};
    };
    parallel_for(static_cast<int64_t>(jobs_.size()), [&](int64_t i, int thread) {
      const Job& job = jobs_[i];
      float* mine = base + thread * own;
      const Partial result = partial_at(job.slot < 0 ? mine : slots + job.slot * partial);
      float* q = mine + partial;
      load_queries(job, q);
      const int64_t first_pos = a_.kv_lens[job.seq] - rows_of(job.seq) + job.token;
      kernel({a_.kv, job.head, a_.block_table + job.seq * a_.table_stride, q, stride_, job.tokens * group_, group_,
              first_pos, job.begin, job.end, a_.window, q + max_rows_ * stride_, result.out, result.max, result.sum});
      if (job.slot < 0) write(job, &result, 1);
    });
    std::vector<Partial> parts;
    for (const Job& job : jobs_) {
      if (job.slot < 0 || job.begin != first_key(job)) continue;
      parts.clear();
      for (int64_t p = 0; p < job.parts; ++p) parts.push_back(partial_at(slots + (job.slot + p) * partial));
      write(job, parts.data(), job.parts);
    }
  }

 private:
  int64_t rows_of(int64_t seq) const { return a_.q_start[seq + 1] - a_.q_start[seq]; }

  int64_t first_key(const Job& job) const {
    const int64_t pos = a_.kv_lens[job.seq] - rows_of(job.seq) + job.token;
    return a_.window > 0 ? std::max<int64_t>(0, pos - a_.window + 1) : 0;
  }

  static int64_t work(const Job& job) { return job.tokens * (job.end - job.begin); }

  // Largest first, so that the last tasks taken are small ones.
  void make_jobs() {
    const int64_t tokens = max_rows_ / group_;
    int64_t total = 0;
    for (int64_t seq = 0; seq < a_.batch; ++seq) {
      for (int64_t token = 0; token < rows_of(seq); token += tokens) {
        Job job{seq, 0, token, std::min(tokens, rows_of(seq) - token), 0, 0, -1, 1};
        job.begin = first_key(job);
        job.end = a_.kv_lens[seq] - rows_of(seq) + token + job.tokens;
        for (job.head = 0; job.head < a_.kv->heads; ++job.head) jobs_.push_back(job);
        total += work(job) * a_.kv->heads;
      }
    }
    if (threads_ > 1) split(total / (2 * threads_), balanced(total) ? kLongSplitKeys : kMinSplitKeys);
    sort();
  }

  void sort() {
    std::stable_sort(jobs_.begin(), jobs_.end(), [](const Job& x, const Job& y) { return work(x) > work(y); });
  }

  // Whether the jobs as they are keep all threads busy but for a tenth of the time.
  bool balanced(int64_t total) {
    sort();
    std::vector<int64_t> load(threads_);
    for (const Job& job : jobs_) *std::min_element(load.begin(), load.end()) += work(job);
    return *std::max_element(load.begin(), load.end()) * threads_ * 10 <= total * 11;
  }

  // Cuts the contexts of jobs with more than `limit` work into parts of whole tiles, at least `min_keys` long.
  void split(int64_t limit, int64_t min_keys) {
    std::vector<Job> out;
    for (const Job& job : jobs_) {
      const int64_t keys = job.end - job.begin;
      const int64_t wanted = std::min((work(job) + limit - 1) / std::max<int64_t>(1, limit), keys / min_keys);
      if (wanted < 2) {
        out.push_back(job);
        continue;
      }
      const int64_t step = round_up((keys + wanted - 1) / wanted, kAttentionTile);
      const int64_t parts = (keys + step - 1) / step;
      for (int64_t p = 0; p < parts; ++p) {
        Job part = job;
        part.begin = job.begin + p * step;
        part.end = std::min(job.end, part.begin + step);
        part.slot = num_slots_++;
        part.parts = parts;
        out.push_back(part);
      }
    }
    jobs_ = std::move(out);
  }

  void load_queries(const Job& job, float* q) const {
    for (int64_t r = 0; r < job.tokens * group_; ++r, q += stride_) {
      const float* from = a_.q + (a_.q_start[job.seq] + job.token + r / group_) * a_.q_token_stride +
                          (job.head * group_ + r % group_) * a_.q_head_stride;
      for (int64_t d = 0; d < size_; ++d) q[d] = from[d] * scale_;
      std::fill(q + size_, q + stride_, 0.0f);
    }
  }

  // Merges the parts of a range and normalises: sum_p 2^(max_p - max) out_p / sum_p 2^(max_p - max) sum_p.
  void write(const Job& job, const Partial* parts, int64_t count) const {
    for (int64_t r = 0; r < job.tokens * group_; ++r) {
      float* to = a_.out + (a_.q_start[job.seq] + job.token + r / group_) * a_.out_token_stride +
                  (job.head * group_ + r % group_) * a_.out_head_stride;
      float top = parts[0].max[r], sum = 0.0f;
      for (int64_t p = 1; p < count; ++p) top = std::max(top, parts[p].max[r]);
      for (int64_t p = 0; p < count; ++p) sum += std::exp2(parts[p].max[r] - top) * parts[p].sum[r];
      for (int64_t p = 0; p < count; ++p) {
        const float weight = std::exp2(parts[p].max[r] - top) / sum;
        const float* from = parts[p].out + r * stride_;
        for (int64_t d = 0; d < size_; ++d) to[d] = (p == 0 ? 0.0f : to[d]) + weight * from[d];
      }
    }
  }

  const AttentionArgs& a_;
  const int64_t size_, stride_, group_, threads_ = num_threads();
  const float scale_;
  int64_t max_rows_;
  int64_t num_slots_ = 0;
  std::vector<Job> jobs_;
};

void read_row(const KvLayer& kv, const KvPages& pages, int64_t row, float* out) {
  for (int64_t d = 0; d < kv.size; ++d) {
    const int64_t i = row * kv.size + d;
    switch (kv.type) {
      case KvType::kFloat32:
        out[d] = static_cast<const float*>(pages.data)[i];
        break;
      case KvType::kFloat16:
        out[d] = f16_to_float(static_cast<const uint16_t*>(pages.data)[i]);
        break;
      case KvType::kBFloat16:
        out[d] = bf16_to_float(static_cast<const uint16_t*>(pages.data)[i]);
        break;
      case KvType::kInt8:
        out[d] = static_cast<float>(static_cast<const uint8_t*>(pages.data)[i]) * pages.scale[row] + pages.min[row];
        break;
    }
  }
}

}  // namespace

void attention(const AttentionArgs& args) { Attention(args).run(); }

void attend_scalar(const AttentionTile& t) {
  const KvLayer& kv = *t.kv;
  float* const keys = t.scratch;
  float* const values = keys + kAttentionTile * t.stride;
  float* const score = values + kAttentionTile * t.stride;
  std::fill(t.out, t.out + t.rows * t.stride, 0.0f);
  std::fill(t.max, t.max + t.rows, kMinusInfinity);
  std::fill(t.sum, t.sum + t.rows, 0.0f);
  for (int64_t begin = t.begin; begin < t.end; begin += kAttentionTile) {
    const int64_t end = std::min(t.end, begin + kAttentionTile);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t row = kv.row(t.table[j / kv.block], t.head, j % kv.block);
      read_row(kv, kv.k, row, keys + (j - begin) * t.stride);
      read_row(kv, kv.v, row, values + (j - begin) * t.stride);
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t pos = t.first_pos + r / t.group;
      const int64_t low = t.window > 0 ? std::max(begin, pos - t.window + 1) : begin, high = std::min(end, pos + 1);
      if (low >= high) continue;
      float top = t.max[r];
      for (int64_t j = low; j < high; ++j) {
        float s = 0.0f;
        for (int64_t d = 0; d < kv.size; ++d) s += t.q[r * t.stride + d] * keys[(j - begin) * t.stride + d];
        score[j - begin] = s;
        top = std::max(top, s);
      }
      const float factor = std::exp2(t.max[r] - top);
      float* out = t.out + r * t.stride;
      for (int64_t d = 0; d < kv.size; ++d) out[d] *= factor;
      t.max[r] = top;
      t.sum[r] *= factor;
      for (int64_t j = low; j < high; ++j) {
        const float weight = std::exp2(score[j - begin] - top);
        t.sum[r] += weight;
        for (int64_t d = 0; d < kv.size; ++d) out[d] += weight * values[(j - begin) * t.stride + d];
      }
    }
  }
}

}  // namespace qwen_rt
