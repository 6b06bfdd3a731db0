// The tiles of prompts on AVX2: linear_prompt_avx2.cpp.
#pragma once

#include "linear.h"

namespace qwen_rt {

constexpr int kPromptRows = 6;
static_assert(kPromptRows == kGroupedRows);

// Quads (4 k) of byte products whose 16-bit sums cannot overflow: each adds at most 2 * 128 * code.
constexpr int quads_that_fit(WeightKind kind) {
  return kind == WeightKind::kInt4 ? 8 : kind == WeightKind::kInt5 ? 4 : 2;
}

// `count` unpacked groups (ByteKernels::unpack) of a weight of at most 6 bits times kPromptRows rows of a tile of `stride`
// rows of one plane, added to y [kPromptRows][16].
void prompt_rows_avx2(const PackedLinear& w, const uint8_t* unpacked, int64_t count, const ByteRows& in, int64_t stride,
                      float* y);

// LinearKernels::grouped_tile.
void grouped_tile_avx2(const GroupedTile& tile, float* y);

}  // namespace qwen_rt
