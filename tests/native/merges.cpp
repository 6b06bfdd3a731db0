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

std::string lines(const std::vector<std::string>& of) {
  std::string text;
  for (const std::string& line : of) text += line + "\n";
  return text;
}

// Its lines, each a view; without an end the last one is no line.
std::vector<std::string_view> split(std::string_view text) {
  std::vector<std::string_view> found;
  for (size_t end; (end = text.find('\n')) != std::string_view::npos; text.remove_prefix(end + 1)) {
    found.push_back(text.substr(0, end));
  }
  return found;
}

// A copy that ends where memory does.
std::string_view copy(const Buffer<char>& to, const std::string& text) {
  std::copy(text.begin(), text.end(), to.data());
  return {to.data(), text.size()};
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
  std::string vocab_text = lines(tokens), merge_text = lines(listed);
  std::vector<int32_t> live;
  {
    Buffer<char> a(random, static_cast<int64_t>(vocab_text.size())), b(random, static_cast<int64_t>(merge_text.size()));
    const bool good = qwen_rt::live_merges(split(copy(a, vocab_text)), copy(b, merge_text), &live);
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
  for (int64_t i = random.between(1, 4); i > 0; --i) {
    std::string& text = random.chance(0.5) ? vocab_text : merge_text;
    if (text.empty()) continue;
    const size_t at = static_cast<size_t>(random.between(0, static_cast<int64_t>(text.size()) - 1));
    if (random.chance(0.2)) {
      text.resize(at);
    } else {
      text[at] = random.pick({'\n', ' ', 'a', 'b', '\xc4', '\x80', '\xff', '\0'});
    }
  }
  Buffer<char> a(random, static_cast<int64_t>(vocab_text.size())), b(random, static_cast<int64_t>(merge_text.size()));
  const std::vector<std::string_view> changed = split(copy(a, vocab_text));
  const int64_t count = static_cast<int64_t>(changed.size());
  for (const std::string_view token : changed) {
    std::string bytes;
    if (qwen_rt::byte_level(token, &bytes)) c.expect(bytes.size() <= token.size(), "bytes of a token");
  }
  if (!qwen_rt::live_merges(changed, copy(b, merge_text), &live)) return;
  for (const int32_t token : live) c.expect(token >= 0 && token < count, "a token of the list");
}

}  // namespace check
