#include "merges.h"

#include <algorithm>

namespace qwen_rt {
namespace {

constexpr int kProbes = 256;  // a table half full of honest keys needs some dozens at worst
constexpr int64_t kMost = 1 << 28;  // tokens, and merges
constexpr int32_t kAbsent = -1;
constexpr int32_t kSingle = -1, kUnmade = -2;  // instead of the rank of the merge that makes a token

// The text up to the next newline, which is taken off `rest`; false at the end or when the last line has none.
bool next_line(std::string_view* rest, std::string_view* line) {
  const size_t end = rest->find('\n');
  if (end == std::string_view::npos) return false;
  *line = rest->substr(0, end);
  rest->remove_prefix(end + 1);
  return true;
}

// Lines of `text`, or -1 when it does not end with one or there are more than ids can count.
int64_t count_lines(std::string_view text) {
  if (!text.empty() && text.back() != '\n') return -1;
  const int64_t n = std::count(text.begin(), text.end(), '\n');
  return n < kMost ? n : -1;
}

// Open addressing over 2^bits slots, more than twice the keys; Same(value) says whether a slot's value has the key.
class Table {
 public:
  explicit Table(int64_t keys) {
    while ((int64_t{1} << bits_) < 2 * keys + 2) ++bits_;
    slots_.assign(size_t{1} << bits_, kAbsent);
  }
  // The slot that has the key or is free for it; null after kProbes others.
  template <class Same>
  int32_t* find(uint64_t hash, const Same& same) {
    uint64_t at = hash * 0x9e3779b97f4a7c15u >> (64 - bits_);
    for (int i = 0; i < kProbes; ++i, at = (at + 1) & (slots_.size() - 1)) {
      if (slots_[at] == kAbsent || same(slots_[at])) return &slots_[at];
    }
    return nullptr;
  }

 private:
  int bits_ = 4;
  std::vector<int32_t> slots_;
};

uint64_t hash_of(std::string_view text, uint64_t h = 0xcbf29ce484222325u) {
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return h;
}

class Tokens {
 public:
  explicit Tokens(const std::vector<std::string_view>& text) : table_(static_cast<int64_t>(text.size())), text_(text) {}
  // False: one is empty or there twice, or too many collide.
  bool index() {
    for (size_t at = 0; at < text_.size(); ++at) {
      int32_t* slot = table_.find(hash_of(text_[at]), [&](int32_t i) { return text_[i] == text_[at]; });
      if (!slot || *slot != kAbsent || text_[at].empty()) return false;
      *slot = static_cast<int32_t>(at);
    }
    return true;
  }
  // The number of the token a + b; below 0: there is none. `likely` is looked at first.
  int32_t find(std::string_view a, std::string_view b, int32_t likely = kAbsent) {
    const auto same = [&](int32_t i) {
      const std::string_view t = text_[i];
      return t.size() == a.size() + b.size() && t.substr(0, a.size()) == a && t.substr(a.size()) == b;
    };
    if (likely >= 0 && likely < static_cast<int64_t>(text_.size()) && same(likely)) return likely;
    const int32_t* slot = table_.find(hash_of(b, hash_of(a)), same);
    return slot ? *slot : kAbsent;
  }
  std::string_view operator[](int64_t i) const { return text_[i]; }

 private:
  Table table_;
  const std::vector<std::string_view>& text_;
};

bool one_character(std::string_view t) {
  const auto more = [&](size_t i) { return (static_cast<unsigned char>(t[i]) & 0xc0) == 0x80; };
  size_t n = 1;
  while (n < t.size() && more(n)) ++n;
  return n == t.size();
}

// Which byte each character of two bytes of UTF-8 or fewer stands for: printable Latin-1 for itself, U+0100 and up for
// the rest, in order. kAbsent: none.
struct Alphabet {
  int16_t byte_of[0x800];
  constexpr Alphabet() : byte_of() {
    for (int16_t& byte : byte_of) byte = kAbsent;
    int next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool shown = (b >= 0x21 && b < 0x7f) || (b >= 0xa1 && b < 0xad) || b >= 0xae;
      byte_of[shown ? b : next++] = static_cast<int16_t>(b);
    }
  }
};
constexpr Alphabet kAlphabet;

}  // namespace

bool byte_level(std::string_view token, std::string* bytes) {
  for (size_t i = 0; i < token.size(); ++i) {
    int c = static_cast<unsigned char>(token[i]);
    if (c >= 0x80) {
      if ((c & 0xe0) != 0xc0 || i + 1 == token.size() || (token[i + 1] & 0xc0) != 0x80) return false;
      c = (c & 0x1f) << 6 | (token[++i] & 0x3f);
    }
    if (kAlphabet.byte_of[c] == kAbsent) return false;
    bytes->push_back(static_cast<char>(kAlphabet.byte_of[c]));
  }
  return true;
}

bool live_merges(const std::vector<std::string_view>& tokens, std::string_view merges, std::vector<int32_t>* live) {
  struct Pair {
    int32_t left, right;
  };
  const int64_t count = static_cast<int64_t>(tokens.size()), num_merges = count_lines(merges);
  if (count >= kMost || num_merges < 0) return false;
  Tokens vocab(tokens);
  if (!vocab.index()) return false;
  std::vector<int32_t> made(count);  // rank of the merge that makes a token, kSingle or kUnmade
  for (int64_t i = 0; i < count; ++i) made[i] = one_character(vocab[i]) ? kSingle : kUnmade;
  std::vector<Pair> parts(count);   // of made tokens
  std::vector<bool> unmade(count);  // halves that no merge so far had made
  std::vector<Pair> pairs;          // by rank
  pairs.reserve(num_merges);
  Table ranks(num_merges);
  const auto rank_of = [&](Pair pair) {
    const uint64_t key = static_cast<uint64_t>(pair.left) << 32 | static_cast<uint32_t>(pair.right);
    return ranks.find((key ^ key >> 29) * 0xbf58476d1ce4e5b9u,
                      [&](int32_t i) { return pairs[i].left == pair.left && pairs[i].right == pair.right; });
  };
  live->clear();
  int32_t token = kAbsent;
  for (std::string_view line; next_line(&merges, &line);) {
    const size_t space = line.find(' ');
    if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos) return false;
    const std::string_view a = line.substr(0, space), b = line.substr(space + 1);
    const Pair pair{vocab.find(a, {}), vocab.find(b, {})};
    token = vocab.find(a, b, token + 1);  // most vocabularies list tokens in the order of their merges
    const int32_t rank = static_cast<int32_t>(pairs.size());
    if (pair.left < 0 || pair.right < 0 || token < 0) return false;
    int32_t* slot = rank_of(pair);
    if (!slot || *slot != kAbsent) return false;
    *slot = rank;
    pairs.push_back(pair);
    bool ready = true;
    for (const int32_t half : {pair.left, pair.right}) {
      if (made[half] == kUnmade) {
        unmade[half] = true;
        ready = false;
      }
    }
    if (!ready) continue;
    // Why this decides, and the same in Python: vocab.py.
    Pair seam = pair;
    for (int32_t limit = rank;;) {
      const int32_t made_left = made[seam.left], made_right = made[seam.right];
      if (made_left > made_right) {
        limit = made_left;
        seam.left = parts[seam.left].right;
      } else if (made_right >= 0) {
        limit = made_right + 1;
        seam.right = parts[seam.right].left;
      } else {
        if (made[token] == kUnmade) live->push_back(token);
        made[token] = rank;
        parts[token] = pair;
        break;
      }
      const int32_t* other = rank_of(seam);
      if (!other) return false;
      if (*other != kAbsent && *other < limit) break;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    if (unmade[i] && made[i] != kUnmade) return false;
  }
  return true;
}

}  // namespace qwen_rt
