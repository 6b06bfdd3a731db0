// Sampling against a sort of all tokens; where the uniform number or a limit falls within rounding of a border between
// two tokens, either is right (sample.h).
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "check.h"

namespace check {
namespace {

struct Token {
  double logit;
  int64_t id;
};

// Tokens that can be chosen, likeliest first; empty when no choice can be made.
std::vector<Token> sorted_tokens(const std::vector<float>& logits, const qwen_rt::SampleArgs& a) {
  std::vector<double> x(logits.begin(), logits.end());
  const auto at = [&](int64_t id) -> double& { return x[static_cast<size_t>(id)]; };
  for (int64_t i = 0; i < a.num_bias; ++i) at(a.bias_ids[i]) += a.bias_values[i];
  if (a.repetition_penalty != 1.0) {
    std::set<int64_t> seen(a.prompt_ids, a.prompt_ids + a.num_prompt);
    seen.insert(a.output_ids, a.output_ids + a.num_output);
    for (int64_t id : seen) at(id) = at(id) > 0 ? at(id) / a.repetition_penalty : at(id) * a.repetition_penalty;
  }
  std::vector<int64_t> count(x.size());
  for (int64_t i = 0; i < a.num_output; ++i) ++count[static_cast<size_t>(a.output_ids[i])];
  for (size_t i = 0; i < x.size(); ++i) {
    if (count[i] > 0) x[i] -= a.presence_penalty + a.frequency_penalty * static_cast<double>(count[i]);
  }
  for (int64_t i = 0; i < a.num_banned; ++i) at(a.banned[i]) = -INFINITY;
  std::vector<Token> tokens;
  for (size_t i = 0; i < x.size(); ++i) {
    if (!(x[i] < INFINITY)) return {};
    if (x[i] > -INFINITY) tokens.push_back({x[i], static_cast<int64_t>(i)});
  }
  std::stable_sort(tokens.begin(), tokens.end(), [](const Token& p, const Token& q) { return p.logit > q.logit; });
  return tokens;
}

// Which of them the uniform number picks, with every limit moved by a relative `shift`.
size_t choice(const std::vector<Token>& tokens, const qwen_rt::SampleArgs& a, double shift) {
  if (a.temperature == 0.0) return 0;
  std::vector<double> weight;
  for (const Token& t : tokens) weight.push_back(std::exp((t.logit - tokens[0].logit) / a.temperature));
  if (a.top_k > 0 && a.top_k < static_cast<int64_t>(weight.size())) weight.resize(static_cast<size_t>(a.top_k));
  double total = 0.0, sum = 0.0;
  for (double v : weight) total += v;
  if (a.top_p < 1.0) {
    size_t kept = 0;
    while (kept < weight.size() && sum < a.top_p * total * (1 + shift)) sum += weight[kept++];
    weight.resize(std::max<size_t>(1, kept));
  }
  while (weight.back() < a.min_p * (1 - shift) && weight.size() > 1) weight.pop_back();  // they fall
  total = sum = 0.0;
  for (double v : weight) total += v;
  size_t last = 0;
  for (size_t i = 0; i < weight.size(); ++i) {
    if (weight[i] > 0.0) last = i;
    sum += weight[i];
    if (sum > a.uniform * total * (1 + shift)) return i;
  }
  return last;
}

}  // namespace

void check_sample(Case& c) {
  Random& random = c.random;
  const int64_t vocab = random.pick<int64_t>({random.between(1, 70), random.between(1, 1000), 4096});
  std::vector<float> logits(static_cast<size_t>(vocab));
  const float spread = random.pick({0.0f, 1.0f, 4.0f, 30.0f});
  for (float& v : logits) v = random.chance(0.02) ? -INFINITY : random.normal() * spread;
  if (random.chance(0.3)) {  // ties
    for (float& v : logits) v = std::nearbyint(v);
  }
  if (random.chance(0.08)) logits[static_cast<size_t>(random.between(0, vocab - 1))] = random.pick({NAN, INFINITY});
  const auto ids = [&](int64_t most) {
    Buffer<int64_t> out(random, random.between(0, most));
    for (int64_t i = 0; i < out.size(); ++i) out[i] = random.between(0, vocab - 1);
    return out;
  };
  const Buffer<int64_t> banned = ids(4), prompt = ids(8), output = ids(12);
  const Buffer<int64_t> biased(random, random.between(0, std::min<int64_t>(3, vocab)));  // distinct: keys of a dict
  for (int64_t i = 0, id = random.between(0, vocab - biased.size()); i < biased.size(); ++i) biased[i] = id + i;
  Buffer<double> bias(random, biased.size());
  for (int64_t i = 0; i < bias.size(); ++i) bias[i] = random.pick({-100.0, -1.5, 2.25});
  qwen_rt::SampleArgs a;
  a.temperature = random.chance(0.2) ? 0.0 : random.pick({0.05, 0.3, 0.8, 1.0, 1.7, 20.0});
  a.top_k =
      random.chance(0.5) ? 0 : random.pick<int64_t>({1, 2, 5, 40, vocab, 2 * vocab, std::max<int64_t>(1, vocab - 1)});
  a.top_p = random.chance(0.5) ? 1.0 : random.pick({0.0, 1e-9, 0.1, 0.5, 0.9, 0.999});
  a.min_p = random.chance(0.7) ? 0.0 : random.pick({1e-6, 0.01, 0.3, 1.0});
  a.repetition_penalty = random.chance(0.6) ? 1.0 : random.pick({0.7, 1.1, 2.0});
  a.presence_penalty = random.chance(0.6) ? 0.0 : random.pick({-0.5, 0.5, 1.5});
  a.frequency_penalty = random.chance(0.6) ? 0.0 : random.pick({-0.25, 0.25});
  a.uniform = random.pick({random.uniform(), random.uniform(), 0.0, 1 - 0x1p-30, 1 - 0x1p-53});
  a.bias_ids = biased.data();
  a.bias_values = bias.data();
  a.num_bias = biased.size();
  a.banned = banned.data();
  a.num_banned = banned.size();
  a.prompt_ids = prompt.data();
  a.num_prompt = prompt.size();
  a.output_ids = output.data();
  a.num_output = output.size();
  c.describe("vocab %lld temperature %g top_k %lld top_p %g min_p %g uniform %.17g, penalties %g %g %g, %lld biased",
             static_cast<long long>(vocab), a.temperature, static_cast<long long>(a.top_k), a.top_p, a.min_p, a.uniform,
             a.repetition_penalty, a.presence_penalty, a.frequency_penalty, static_cast<long long>(a.num_bias));
  const std::vector<Token> tokens = sorted_tokens(logits, a);
  size_t first = 0, last = 0;
  if (!tokens.empty()) {
    first = choice(tokens, a, -1e-11);
    last = choice(tokens, a, 1e-11);
  }
  for (Isa isa : Case::isas()) {
    c.use(isa);
    Buffer<float> row(random, vocab);
    std::copy(logits.begin(), logits.end(), row.data());
    const int64_t got = qwen_rt::sample_row(row.data(), vocab, a);
    if (tokens.empty()) {
      c.expect(got == -1, "a choice among no tokens", got);
      continue;
    }
    const bool right =
        std::any_of(tokens.begin() + static_cast<int64_t>(first), tokens.begin() + static_cast<int64_t>(last) + 1,
                    [&](const Token& t) { return t.id == got; });
    c.expect(right, "chosen and expected", got, tokens[first].id);
  }
}

}  // namespace check
