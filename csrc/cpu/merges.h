// Byte-level BPE vocabularies: the bytes that tokens stand for, and which merges can ever fire. As token_bytes and
// _by_definition of qwen_rt/tokenizer/vocab.py, which define both and say what is wrong with what is refused here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace qwen_rt {

// n strings one after the other, by where each ends; the ends lie in the text, in order.
struct Strings {
  const char* text = nullptr;
  const int64_t* ends = nullptr;
  int64_t n = 0;

  std::string_view operator[](int64_t i) const {
    const int64_t start = i ? ends[i - 1] : 0;
    return {text + start, static_cast<size_t>(ends[i] - start)};
  }
};

// The bytes that the characters of a token stand for, put at the end of `bytes`. False: one stands for none.
bool byte_level(std::string_view token, std::string* bytes);

// tokens: bytes; those of one are the single bytes. merges: "a b" in byte-level characters, by priority. True: `live` has
// the numbers of the tokens that merging can make, in the order of their merges.
// False: a token is empty or there twice; a merge is malformed, repeated, makes or uses what is no token, or comes too
// early; or so many tokens collide in the hash table that they were chosen to.
bool live_merges(const Strings& tokens, const Strings& merges, std::vector<int32_t>* live);

class Vocabulary {
 public:
  // Of byte-level tokens of at most `longest` characters, their ids in [0, end_of_ids), and merges. False: as
  // live_merges; or a token is not byte-level, an id is out of range or there twice, a single byte is missing.
  bool read(const Strings& tokens, const int64_t* ids, const Strings& merges, int64_t longest, int64_t end_of_ids);

  // Numbers of all tokens: the first `ranked` of them by rank, single bytes before what merging makes, then the others.
  std::vector<int32_t> order;
  int64_t ranked = 0;
  bool ids_are_ranks = false;  // of those
  Strings tokens() const { return {bytes_.data(), ends_.data(), static_cast<int64_t>(ends_.size())}; }

 private:
  std::string bytes_;
  std::vector<int64_t> ends_;
};

}  // namespace qwen_rt
