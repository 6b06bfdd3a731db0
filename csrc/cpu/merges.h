// Which merges of a byte-level BPE vocabulary can ever fire: _live_merges of qwen_rt/tokenizer/vocab.py, which defines
// the result and says what is wrong with a list that is refused here.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace qwen_rt {

// tokens: UTF-8, each ended by a newline, all different; those of one character are the single bytes. merges: lines
// "a b", by priority. True: `live` has the numbers of the tokens that merging can make, in the order of their merges.
// False: a merge is malformed, repeated, makes or uses what is no token, or comes too early; or so many tokens collide
// in the hash table that they were chosen to.
bool live_merges(std::string_view tokens, std::string_view merges, std::vector<int32_t>* live);

}  // namespace qwen_rt
