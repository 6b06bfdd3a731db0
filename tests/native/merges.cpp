// Live merges against plain byte-pair encoding of every token; then the same text with bytes changed.
#include "merges.h"

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "check.h"

namespace check {
namespace {

using Merge = std::pair<std::string, std::string>;

// The rank of the last merge that turns the characters of `token` into it; -1 when they become something else.
int made_by(const std::map<Merge, int>& ranks, const std::string& token) {
  std::vector<std::string> parts;
  for (char ch : token) parts.push_back(std::string(1, ch));
  int last = -1;
  while (parts.size() > 1) {
    int best = -1;
    size_t at = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto found = ranks.find({parts[i], parts[i + 1]});
      if (found != ranks.end() && (best < 0 || found->second < best)) {
        best = found->second;
        at = i;
      }
    }
    if (best < 0) return -1;
    last = best;
    parts[at] += parts[at + 1];
    parts.erase(parts.begin() + static_cast<int64_t>(at) + 1);
  }
  return last;
}

// Strings in memory that ends where they do.
struct Held {
  Held(Random& random, const std::vector<std::string>& strings)
      : text(random, total(strings)), ends(random, static_cast<int64_t>(strings.size())) {
    int64_t at = 0;
    for (size_t i = 0; i < strings.size(); ++i) {
      std::copy(strings[i].begin(), strings[i].end(), text.data() + at);
      ends[static_cast<int64_t>(i)] = at += static_cast<int64_t>(strings[i].size());
    }
  }
  static int64_t total(const std::vector<std::string>& strings) {
    int64_t n = 0;
    for (const std::string& s : strings) n += static_cast<int64_t>(s.size());
    return n;
  }
  qwen_rt::Strings of() const { return {text.data(), ends.data(), ends.size()}; }

  Buffer<char> text;
  Buffer<int64_t> ends;
};

// The character that stands for a byte, in UTF-8.
std::string character(int byte) {
  const auto shown = [](int b) { return (b > 0x20 && b < 0x7f) || (b > 0xa0 && b < 0xad) || b > 0xad; };
  int code = byte;
  if (!shown(byte)) {
    code = 0x100;
    for (int b = 0; b < byte; ++b) code += !shown(b);
  }
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
}

void check_vocabulary(Case& c, const std::vector<std::string>& made, const std::vector<std::string>& merges,
                      const std::vector<std::string>& changed, const std::vector<std::string>& changed_merges) {
  Random& random = c.random;
  std::vector<std::string> tokens;
  for (int b = 0; b < 256; ++b) tokens.push_back(character(b));
  tokens.insert(tokens.end(), made.begin() + 3, made.end());
  for (size_t i = tokens.size() - 1; i > 0; --i) std::swap(tokens[i], tokens[random.between(0, static_cast<int64_t>(i))]);
  const auto n = static_cast<int64_t>(tokens.size());
  const int64_t first = random.pick<int64_t>({0, 0, 5});
  Buffer<int64_t> ids(random, n);
  for (int64_t i = 0; i < n; ++i) ids[i] = first + n - 1 - i;
  const Held text(random, tokens), pairs(random, merges);
  qwen_rt::Vocabulary got;
  std::vector<int32_t> live;
  const bool good = got.read(text.of(), ids.data(), pairs.of(), 40, first + n);
  c.expect(good == qwen_rt::live_merges(got.tokens(), pairs.of(), &live), "merges of a vocabulary");
  if (good) {
    c.expect(got.ranked == 256 + static_cast<int64_t>(live.size()), "ranks");
    c.expect(std::equal(live.begin(), live.end(), got.order.begin() + 256), "order of merging");
    bool same = true;
    for (int64_t rank = 0; rank < got.ranked; ++rank) same = same && ids[got.order[rank]] == rank;
    c.expect(got.ids_are_ranks == same, "ids that are ranks");
    std::vector<int32_t> all = got.order;
    std::sort(all.begin(), all.end());
    for (int64_t i = 0; i < n; ++i) c.expect(all[i] == i, "every token once");
    for (int b = 0; b < 256; ++b) {
      c.expect(got.tokens()[got.order[b]].size() == 1 && (b == 0 || ids[got.order[b - 1]] < ids[got.order[b]]), "bytes");
    }
  }
  c.expect(!got.read(text.of(), ids.data(), pairs.of(), 0, first + n), "tokens that are too long");
  c.expect(!got.read(text.of(), ids.data(), pairs.of(), 40, first + n - 1), "an id that is too high");
  ids[random.between(0, n - 1)] = random.pick<int64_t>({-1, INT64_MIN, INT64_MAX, first + n});
  c.expect(!got.read(text.of(), ids.data(), pairs.of(), 40, first + n), "a wrong id");
  std::vector<std::string> some(tokens.begin(), tokens.begin() + random.between(0, n));
  some.insert(some.end(), changed.begin(), changed.end());
  Buffer<int64_t> order(random, static_cast<int64_t>(some.size()));
  for (int64_t i = 0; i < order.size(); ++i) order[i] = i;
  const Held any(random, some), any_merges(random, changed_merges);
  if (got.read(any.of(), order.data(), any_merges.of(), 40, order.size())) {
    c.expect(static_cast<int64_t>(got.order.size()) == order.size(), "every token");
  }
}

}  // namespace

void check_merges(Case& c) {
  Random& random = c.random;
  std::vector<std::string> tokens{"a", "b", "c"};
  std::vector<Merge> merges;
  std::map<Merge, int> ranks;
  const int64_t wanted = random.chance(0.02) ? 3000 : random.between(0, 14);
  for (int64_t i = 0; i < wanted; ++i) {
    const auto half = [&] { return tokens[random.between(0, static_cast<int64_t>(tokens.size()) - 1)]; };
    const Merge merge{half(), half()};
    const std::string token = merge.first + merge.second;
    if (token.size() > 40 || ranks.count(merge)) continue;
    ranks[merge] = 0;
    merges.push_back(merge);
    if (std::find(tokens.begin(), tokens.end(), token) == tokens.end()) tokens.push_back(token);
  }
  if (random.chance(0.2)) {
    for (int64_t i = static_cast<int64_t>(merges.size()) - 1; i > 0; --i) std::swap(merges[i], merges[random.between(0, i)]);
  }
  std::vector<std::string> listed;
  for (size_t i = 0; i < merges.size(); ++i) {
    ranks[merges[i]] = static_cast<int>(i);
    listed.push_back(merges[i].first + " " + merges[i].second);
  }
  c.describe("%zu tokens, %zu merges", tokens.size(), merges.size());
  std::vector<int32_t> live;
  {
    const Held vocab(random, tokens), pairs(random, listed);
    const bool good = qwen_rt::live_merges(vocab.of(), pairs.of(), &live);
    std::map<std::string, int> made{{"a", -1}, {"b", -1}, {"c", -1}};
    std::vector<std::pair<int, int32_t>> want;
    for (size_t i = 3; i < tokens.size(); ++i) {
      const int rank = made_by(ranks, tokens[i]);
      if (rank < 0) continue;
      made[tokens[i]] = rank;
      want.push_back({rank, static_cast<int32_t>(i)});
    }
    bool early = false;
    for (size_t i = 0; i < merges.size(); ++i) {
      for (const std::string& half : {merges[i].first, merges[i].second}) {
        const auto found = made.find(half);
        early = early || (found != made.end() && found->second > static_cast<int>(i));
      }
    }
    if (!early) c.expect(good, "accepted");
    if (good) {
      std::sort(want.begin(), want.end());
      c.expect(live.size() == want.size(), "number of live tokens");
      for (size_t i = 0; i < live.size(); ++i) c.expect(live[i] == want[i].second, "live token");
    }
  }
  std::vector<std::string> changed = tokens, changed_merges = listed;
  for (int64_t i = random.between(1, 4); i > 0; --i) {
    std::vector<std::string>& all = random.chance(0.5) ? changed : changed_merges;
    if (all.empty()) continue;
    std::string& text = all[random.between(0, static_cast<int64_t>(all.size()) - 1)];
    const size_t at = static_cast<size_t>(random.between(0, static_cast<int64_t>(text.size())));
    if (random.chance(0.2) || at == text.size()) {
      text.resize(at);
    } else {
      text[at] = random.pick({'\n', ' ', 'a', 'b', '\xc4', '\x80', '\xff', '\0'});
    }
  }
  for (const std::string& token : changed) {
    std::string bytes;
    if (qwen_rt::byte_level(token, &bytes)) c.expect(bytes.size() <= token.size(), "bytes of a token");
  }
  if (random.chance(0.3)) check_vocabulary(c, tokens, listed, changed, changed_merges);
  const Held vocab(random, changed), pairs(random, changed_merges);
  if (!qwen_rt::live_merges(vocab.of(), pairs.of(), &live)) return;
  for (const int32_t token : live) c.expect(token >= 0 && token < vocab.of().n, "a token of the list");
}

}  // namespace check
