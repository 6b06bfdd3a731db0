#pragma once

#include "attention.h"

namespace qwen_rt {

// Whether the kernel over bytes is made for this cache; words_serve for that over words.
bool attend_int8_serves(const AttentionTile& tile);

void attend_int8_avx512(const AttentionTile& tile);
void attend_words_avx512(const AttentionTile& tile);

}  // namespace qwen_rt
