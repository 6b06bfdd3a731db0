#pragma once

#include "attention.h"

namespace qwen_rt {

// Whether the kernel over bytes, or that over words, is made for this cache.
bool attend_int8_serves(const AttentionTile& tile);
bool attend_words_serves(const AttentionTile& tile);

void attend_int8_avx512(const AttentionTile& tile);
void attend_words_avx512(const AttentionTile& tile);

}  // namespace qwen_rt
