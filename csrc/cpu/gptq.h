// AutoGPTQ's words straight into packed panels: what pack_grouped makes of their codes, without the codes.
#pragma once

#include <cstdint>

#include "linear.h"

namespace qwen_rt {

// Consecutive outputs of a matrix as the file has them, a column each. The strides, in elements, are those of rows.
struct GptqWords {
  const uint32_t* codes;   // [k * bits / 32][outputs]: consecutive k, the lowest bits first
  const uint16_t* scales;  // [stored groups][outputs] float16
  const uint8_t* zeros;    // alike, or null
  const int64_t* source;   // [groups of the packed weight]: which stored group each one is; in range
  int64_t codes_stride, scales_stride, zeros_stride;
};

// Whether a weight is made of such words: 4 or 8 bits with zero points or without, k a multiple of its group.
bool gptq_fits(const PackedLinear& w, bool zeros);

// Packs outputs [start, start + count) of a weight that they fit; start a multiple of 16, count too unless they end at n.
// False: a scale is not finite.
bool gptq_pack(PackedLinear& w, int64_t start, int64_t count, const GptqWords& words);

}  // namespace qwen_rt
