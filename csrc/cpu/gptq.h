// AutoGPTQ's words straight into packed panels: what pack_grouped makes of their codes, without the codes.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"

namespace qwen_rt {

// Outputs [start, start + count) of a weight: start a multiple of 16, count too unless they end at n. Strides are those of
// rows, in elements.
struct GptqWords {
  PackedLinear* w;
  int64_t start, count;
  int file;                // an open one, which has [k * bits / 32][outputs] words of codes: consecutive k, the lowest bits
  int64_t offset, stride;  // first; the first output's from `offset` bytes on
  const uint16_t* scales;  // [stored groups][count] float16
  const uint8_t* zeros;    // alike, or null
  const int64_t* source;   // [groups of the packed weight]: which stored group each one is; in range
  int64_t scales_stride, zeros_stride;
};

// Whether a weight is made of such words: 4 or 8 bits with zero points or without, k a multiple of its group.
bool gptq_fits(const PackedLinear& w, bool zeros);

// Packs each of them; threads read what they pack. The number of the first that cannot be read or has a scale that is not
// finite (what comes after it may be packed or not); their count where there is none.
int64_t gptq_pack(const std::vector<GptqWords>& parts);

}  // namespace qwen_rt
