// The tiles of prompts on AVX2: linear_prompt_avx2.cpp.
#pragma once

#include "linear.h"

namespace qwen_rt {

constexpr int kPromptRows = 6;
static_assert(kPromptRows == kGroupedRows);

// Quads (4 k) of a part of a group: their products, less the zero point's, are summed in 16 bits, two sums a column, each of
// at most 2 * quads * 127 * (implied zero) <= 32512.
constexpr int part_quads(WeightKind kind, int64_t group) {
  return kind == WeightKind::kInt6 ? 4 : kind == WeightKind::kInt4 && group % 64 == 0 ? 16 : 8;
}

// ByteKernels::parts.
inline int64_t parts_of(const PackedLinear& w) { return w.group / (4 * part_quads(w.kind, w.group)); }

// Whether the minimums of unpacked groups are those of codes less the implied zero point. Of 4 bits in groups of 32, sums
// fit as they are, which saves their starts.
inline bool centred(const PackedLinear& w) {
  return w.aux != Aux::kNone && !(w.kind == WeightKind::kInt4 && w.group == 32);
}

// `count` unpacked groups (ByteKernels::unpack) of a weight of at most 6 bits times kPromptRows rows of a tile of `stride`
// rows of one plane, added to y [kPromptRows][16].
void prompt_rows_avx2(const PackedLinear& w, const uint8_t* unpacked, int64_t count, const ByteRows& in, int64_t stride,
                      float* y);

// LinearKernels::grouped_tile.
void grouped_tile_avx2(const GroupedTile& tile, float* y);

// One group of k words (a multiple of 4, 8 at least): y [kPromptRows][16] becomes its product, or that is added to it. Rows
// x as GroupedTile has them, or kWordRow words apart: [kPromptRows][kWordRow].
constexpr int kWordRow = 64;
void word_products_avx2(const int16_t* x, const int16_t* codes, int64_t k, const float* x_scale, const float* w_scale,
                        float* y);
void add_word_products_avx2(const int16_t* x, const int16_t* codes, int64_t k, const float* x_scale, const float* w_scale,
                            float* y);

}  // namespace qwen_rt
