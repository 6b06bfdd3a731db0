// Which merges of a byte-level BPE vocabulary can ever fire, and the bytes its tokens stand for: _live_merges and
// token_bytes of qwen_rt/tokenizer/vocab.py, which defines both and says what is wrong with what is refused here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace qwen_rt {

// tokens: UTF-8, all different; those of one character are the single bytes. merges: lines "a b", by priority. True: `live` has the numbers of the tokens that merging can make, in the order of their merges.
// False: a merge is malformed, repeated, makes or uses what is no token, or comes too early; or so many tokens collide
// in the hash table that they were chosen to.
bool live_merges(const std::vector<std::string_view>& tokens, std::string_view merges, std::vector<int32_t>* live);

// The bytes that the characters of a token stand for, put at the end of `bytes`. False: one stands for none.
bool byte_level(std::string_view token, std::string* bytes);

}  // namespace qwen_rt
