#include "merges.h"

#include <algorithm>

namespace qwen_rt {
namespace {

constexpr int kProbes = 256;  // a table two thirds full of honest keys needs some dozens at worst
constexpr int64_t kMost = 1 << 28;  // tokens, and merges
constexpr int32_t kAbsent = -1;
constexpr int32_t kSingle = -1, kUnmade = -2;  // instead of the rank of the merge that makes a token

// Open addressing: numbers found by their keys, of which a slot has 32 bits of the hash.
class Slots {
 public:
  struct Slot {
    uint32_t tag = 0;
    int32_t value = kAbsent;
  };

  explicit Slots(int64_t keys) {
    while ((int64_t{2} << bits_) < 3 * keys) ++bits_;
    slots_.resize(size_t{1} << bits_);
  }
  // The slot whose value has the key, which same(value) decides, or one that is free for it; null after kProbes others.
  template <class Same>
  Slot* find(uint64_t hash, const Same& same) {
    hash *= 0x9e3779b97f4a7c15u;
    const uint32_t tag = static_cast<uint32_t>(hash);
    uint64_t at = hash >> (64 - bits_);
    for (int i = 0; i < kProbes; ++i, at = (at + 1) & (slots_.size() - 1)) {
      Slot& slot = slots_[at];
      if (slot.value == kAbsent) slot.tag = tag;
      if (slot.value == kAbsent || (slot.tag == tag && same(slot.value))) return &slot;
    }
    return nullptr;
  }

 private:
  int bits_ = 4;
  std::vector<Slot> slots_;
};

uint64_t hash_of(std::string_view text, uint64_t h = 0xcbf29ce484222325u) {
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return h;
}

class Tokens {
 public:
  explicit Tokens(const Strings& text) : slots_(text.n), text_(text) {}
  // False: one is empty or there twice, or too many collide.
  bool index() {
    for (int64_t at = 0; at < text_.n; ++at) {
      const std::string_view token = text_[at];
      auto* slot = slots_.find(hash_of(token), [&](int32_t i) { return text_[i] == token; });
      if (!slot || slot->value != kAbsent || token.empty()) return false;
      slot->value = static_cast<int32_t>(at);
    }
    return true;
  }
  // The number of the token a + b; below 0: there is none. `likely` is looked at first.
  int32_t find(std::string_view a, std::string_view b, int32_t likely = kAbsent) {
    const auto same = [&](int32_t i) {
      const std::string_view t = text_[i];
      return t.size() == a.size() + b.size() && t.substr(0, a.size()) == a && t.substr(a.size()) == b;
    };
    if (likely >= 0 && likely < text_.n && same(likely)) return likely;
    const auto* slot = slots_.find(hash_of(b, hash_of(a)), same);
    return slot ? slot->value : kAbsent;
  }

 private:
  Slots slots_;
  const Strings& text_;
};

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

// Bytes of both halves of a merge, one after the other in `bytes`, and of the left one; below 0: malformed.
int64_t read_merge(std::string_view merge, std::string* bytes) {
  bytes->clear();
  const size_t space = merge.find(' ');
  if (space == std::string_view::npos || !byte_level(merge.substr(0, space), bytes)) return -1;
  const int64_t left = static_cast<int64_t>(bytes->size());
  return byte_level(merge.substr(space + 1), bytes) ? left : -1;  // a second space stands for no byte
}

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

bool live_merges(const Strings& tokens, const Strings& merges, std::vector<int32_t>* live) {
  struct Pair {
    int32_t left, right;
  };
  if (tokens.n >= kMost || merges.n >= kMost) return false;
  Tokens vocab(tokens);
  if (!vocab.index()) return false;
  std::vector<int32_t> made(tokens.n);  // rank of the merge that makes a token, kSingle or kUnmade
  for (int64_t i = 0; i < tokens.n; ++i) made[i] = tokens[i].size() == 1 ? kSingle : kUnmade;
  std::vector<Pair> parts(tokens.n);   // of made tokens
  std::vector<bool> unmade(tokens.n);  // halves that no merge so far had made
  std::vector<Pair> pairs;             // by rank
  pairs.reserve(merges.n);
  Slots ranks(merges.n);
  const auto rank_of = [&](Pair pair) {
    const uint64_t key = static_cast<uint64_t>(pair.left) << 32 | static_cast<uint32_t>(pair.right);
    return ranks.find((key ^ key >> 29) * 0xbf58476d1ce4e5b9u,
                      [&](int32_t i) { return pairs[i].left == pair.left && pairs[i].right == pair.right; });
  };
  live->clear();
  live->reserve(merges.n);
  int32_t token = kAbsent;
  std::string bytes;
  for (int32_t rank = 0; rank < merges.n; ++rank) {
    const int64_t split = read_merge(merges[rank], &bytes);
    if (split < 0) return false;
    const std::string_view both = bytes, a = both.substr(0, split), b = both.substr(split);
    const Pair pair{vocab.find(a, {}), vocab.find(b, {})};
    token = vocab.find(a, b, token + 1);  // most vocabularies list tokens in the order of their merges
    if (pair.left < 0 || pair.right < 0 || token < 0) return false;
    auto* slot = rank_of(pair);
    if (!slot || slot->value != kAbsent) return false;
    slot->value = rank;
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
      const auto* other = rank_of(seam);
      if (!other) return false;
      if (other->value != kAbsent && other->value < limit) break;
    }
  }
  for (int64_t i = 0; i < tokens.n; ++i) {
    if (unmade[i] && made[i] != kUnmade) return false;
  }
  return true;
}

bool Vocabulary::read(const Strings& tokens, const int64_t* ids, const Strings& merges, int64_t longest,
                      int64_t end_of_ids) {
  if (tokens.n >= kMost) return false;
  std::vector<bool> taken(static_cast<size_t>(end_of_ids));
  std::vector<int32_t> live;
  order.clear();
  bytes_.clear();
  ends_.clear();
  bytes_.reserve(tokens.n ? static_cast<size_t>(tokens.ends[tokens.n - 1]) : 0);
  ends_.reserve(static_cast<size_t>(tokens.n));
  for (int64_t i = 0; i < tokens.n; ++i) {
    const int64_t start = static_cast<int64_t>(bytes_.size());
    if (!byte_level(tokens[i], &bytes_)) return false;
    ends_.push_back(static_cast<int64_t>(bytes_.size()));
    if (ends_.back() - start > longest || ids[i] < 0 || ids[i] >= end_of_ids || taken[ids[i]]) return false;
    taken[ids[i]] = true;
    if (ends_.back() - start == 1) order.push_back(static_cast<int32_t>(i));
  }
  if (order.size() != 256 || !live_merges(this->tokens(), merges, &live)) return false;
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return ids[a] < ids[b]; });
  order.insert(order.end(), live.begin(), live.end());
  ranked = static_cast<int64_t>(order.size());
  std::vector<bool> has_rank(static_cast<size_t>(tokens.n));
  ids_are_ranks = true;
  for (int64_t rank = 0; rank < ranked; ++rank) {
    has_rank[order[rank]] = true;
    ids_are_ranks = ids_are_ranks && ids[order[rank]] == rank;
  }
  for (int64_t i = 0; i < tokens.n; ++i) {
    if (!has_rank[i]) order.push_back(static_cast<int32_t>(i));
  }
  return true;
}

}  // namespace qwen_rt
