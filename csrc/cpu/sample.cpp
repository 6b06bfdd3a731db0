#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_features.h"

namespace qwen_rt {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Token {
  double logit;
  int64_t id;
  double weight;
};

// The order tokens are considered in: falling probability, ties by lower id.
bool before(const Token& a, const Token& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// Tokens whose logit bias or penalties changed, taken out of the row (which holds -inf in their place).
std::vector<Token> take_changed(float* logits, int64_t vocab, const SampleArgs& a) {
  std::vector<Token> changed;
  thread_local std::vector<int32_t> place;  // 1 + index into `changed`; all zero between calls
  if (static_cast<int64_t>(place.size()) < vocab) place.resize(vocab);
  const auto change = [&](int64_t id) -> double& {
    if (place[id] == 0) {
      changed.push_back({logits[id], id, 0.0});
      place[id] = static_cast<int32_t>(changed.size());
    }
    return changed[place[id] - 1].logit;
  };
  for (int64_t i = 0; i < a.num_bias; ++i) change(a.bias_ids[i]) += a.bias_values[i];
  if (a.repetition_penalty != 1.0) {
    std::vector<char> done;
    const auto penalize = [&](const int64_t* ids, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        double& x = change(ids[i]);
        done.resize(changed.size());
        char& seen = done[place[ids[i]] - 1];
        if (!seen) x = x > 0.0 ? x / a.repetition_penalty : x * a.repetition_penalty;
        seen = 1;
      }
    };
    penalize(a.prompt_ids, a.num_prompt);
    penalize(a.output_ids, a.num_output);
  }
  if (a.presence_penalty != 0.0 || a.frequency_penalty != 0.0) {
    std::vector<int64_t> count;
    for (int64_t i = 0; i < a.num_output; ++i) {
      change(a.output_ids[i]);
      count.resize(changed.size());
      ++count[place[a.output_ids[i]] - 1];
    }
    for (size_t i = 0; i < count.size(); ++i) {
      if (count[i] > 0) changed[i].logit -= a.presence_penalty + a.frequency_penalty * static_cast<double>(count[i]);
    }
  }
  for (int64_t i = 0; i < a.num_banned; ++i) change(a.banned[i]) = -kInfinity;
  for (const Token& t : changed) {
    place[t.id] = 0;
    logits[t.id] = -std::numeric_limits<float>::infinity();
  }
  return changed;
}

// Moves to the front the shortest prefix (in the order of `before`) whose weights add up to at least `target` (with
// `past`: to more than it); returns its length, and in `mass` its sum. All of the tokens when they do not reach it.
size_t heaviest(std::vector<Token>& tokens, double target, bool past, double* mass) {
  const auto reached = [&](double sum) { return past ? sum > target : sum >= target; };
  size_t begin = 0, end = tokens.size();  // the prefix ends in [begin, end]; `sum` is the weight of [0, begin)
  double sum = 0.0;
  while (begin < end) {
    const size_t n = end - begin;
    Token candidates[3] = {tokens[begin], tokens[begin + n / 2], tokens[end - 1]};
    std::sort(candidates, candidates + 3, before);
    const Token pivot = candidates[1];
    const auto middle =
        std::partition(tokens.begin() + begin, tokens.begin() + end, [&](const Token& t) { return before(t, pivot); });
    double ahead = sum;
    for (auto t = tokens.begin() + begin; t != middle; ++t) ahead += t->weight;
    const size_t split = middle - tokens.begin();
    if (split > begin && reached(ahead)) {
      end = split;
      continue;
    }
    std::iter_swap(middle,
                   std::find_if(middle, tokens.begin() + end, [&](const Token& t) { return t.id == pivot.id; }));
    sum = ahead + pivot.weight;
    begin = split + 1;
    if (reached(sum)) break;
  }
  *mass = sum;
  return begin;
}

}  // namespace

void block_maxima_scalar(const float* x, int64_t n, float* highs) {
  for (int64_t begin = 0; begin < n; begin += kSampleBlock) {
    float high = x[begin];
    for (int64_t i = begin; i < std::min(n, begin + kSampleBlock); ++i) {
      if (!(x[i] <= high)) high = x[i];
      if (std::isnan(high)) break;
    }
    *highs++ = high;
  }
}

double sum_weights_scalar(const float* x, int64_t n, double top, double inverse) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp((x[i] - top) * inverse);
  return sum;
}

int64_t sample_row(float* logits, int64_t vocab, const SampleArgs& a) {
  auto block_maxima = block_maxima_scalar;
  auto sum_weights = sum_weights_scalar;
#if defined(__x86_64__)
  if (active_isa() >= Isa::kAvx2) {
    block_maxima = block_maxima_avx2;
    sum_weights = sum_weights_avx2;
  }
#endif
  const int64_t blocks = (vocab + kSampleBlock - 1) / kSampleBlock;
  thread_local std::vector<float> highs, ranked;
  thread_local std::vector<Token> tokens;
  tokens = take_changed(logits, vocab, a);
  highs.resize(blocks);
  block_maxima(logits, vocab, highs.data());

  double top = -kInfinity;
  bool usable = true;
  const auto look = [&](double x) {
    usable &= x < kInfinity;  // false for NaN
    top = std::max(top, x);
  };
  for (float high : highs) look(high);
  for (const Token& t : tokens) look(t.logit);
  if (!usable || top == -kInfinity) return -1;

  // Tokens below `cut` cannot be chosen.
  double cut = top;
  const double temperature = std::max(a.temperature, 1e-290);  // so that the inverse is finite
  double total = 0.0;
  if (a.temperature > 0.0 && a.top_k > 0) {
    // The k-th largest block maximum is at most the k-th largest logit.
    cut = -kInfinity;
    if (a.top_k <= blocks) {
      ranked = highs;
      std::nth_element(ranked.begin(), ranked.begin() + (a.top_k - 1), ranked.end(), std::greater<float>());
      cut = ranked[a.top_k - 1];
    }
  } else if (a.temperature > 0.0) {
    total = sum_weights(logits, vocab, top, 1.0 / temperature);
    for (const Token& t : tokens) total += std::exp((t.logit - top) / temperature);
    // What lies below weight w adds up to at most vocab * w; half of that keeps clear of rounding.
    double least = a.min_p * (1.0 - 1e-12);
    if (a.top_p < 1.0) {
      least = std::max(least, 0.5 * (1.0 - a.top_p) * total / static_cast<double>(vocab));
    } else if (a.min_p <= 0.0) {
      least = 0.5 * (1.0 - a.uniform) * total / static_cast<double>(vocab);
    }
    cut = top + temperature * std::log(least) - 1e-9 * temperature;
  }

  tokens.erase(std::remove_if(tokens.begin(), tokens.end(), [&](const Token& t) { return !(t.logit >= cut); }),
               tokens.end());
  for (int64_t b = 0; b < blocks; ++b) {
    if (!(highs[b] >= cut) || highs[b] == -kInfinity) continue;
    for (int64_t i = b * kSampleBlock; i < std::min(vocab, (b + 1) * kSampleBlock); ++i) {
      if (logits[i] >= cut && logits[i] > -kInfinity) tokens.push_back({logits[i], i, 0.0});
    }
  }
  if (a.temperature == 0.0) return std::min_element(tokens.begin(), tokens.end(), before)->id;

  if (a.top_k > 0 && a.top_k < static_cast<int64_t>(tokens.size())) {
    std::nth_element(tokens.begin(), tokens.begin() + (a.top_k - 1), tokens.end(), before);
    tokens.resize(a.top_k);
  }
  for (Token& t : tokens) {
    t.weight = std::exp((t.logit - top) / temperature);
    if (a.top_k > 0) total += t.weight;
  }
  double mass = total;
  if (a.top_p < 1.0) tokens.resize(std::max<size_t>(1, heaviest(tokens, a.top_p * total, false, &mass)));
  if (a.min_p > 0.0) {
    tokens.erase(std::remove_if(tokens.begin(), tokens.end(), [&](const Token& t) { return t.weight < a.min_p; }),
                 tokens.end());
    mass = 0.0;
    for (const Token& t : tokens) mass += t.weight;
  }
  const size_t chosen = heaviest(tokens, a.uniform * mass, true, &total);
  if (total > a.uniform * mass) return tokens[chosen - 1].id;
  // `uniform` within rounding of 1: the last token with any weight.
  const auto last = std::max_element(tokens.begin(), tokens.end(), [](const Token& x, const Token& y) {
    return (x.weight > 0.0) != (y.weight > 0.0) ? y.weight > 0.0 : before(x, y);
  });
  return last->id;
}

}  // namespace qwen_rt
