// The tiles of prompts on AVX2: linear_prompt_avx2.cpp.
#pragma once

#include "linear.h"

namespace qwen_rt {

constexpr int kPromptRows = 6;
static_assert(kPromptRows == kGroupedRows);

// Whole tiles (linear.h) are computed a unit at a time: a group, or two of at most 32 inputs, which then share a step of
// their activations. Of two groups each word of four codes holds two of either: its two 16-bit sums are one of each, and
// widening multiplies them by their scales and joins them.
//
// Scales are integers there, multiples of a step of each column: its largest is `limit` steps. A unit is cut into parts of `quads` quads (words of 4 k) whose products, less the zero point's, fit 16 bits: at most
// 2 * quads * 127 * (implied zero) <= 32512; and 2 * 32512 * limit * parts < 2^31.
struct Unit {
  int64_t groups, quads, parts;

  constexpr Unit(WeightKind kind, int64_t group, int64_t all_groups)
      : groups(group <= 32 && all_groups % 2 == 0 ? 2 : 1),
        quads(kind == WeightKind::kInt6 ? 4 : kind == WeightKind::kInt4 && groups * group % 64 == 0 ? 16 : 8),
        parts(groups * group / (4 * quads)) {}
  constexpr int64_t limit() const { return 32767 / parts; }
};

inline Unit unit_of(const PackedLinear& w) { return {w.kind, w.group, w.groups()}; }

// WholeTiles::parts.
inline int64_t whole_parts_avx2(const PackedLinear& w) {
  const Unit unit = unit_of(w);
  return (unit.parts + unit.groups - 1) / unit.groups;
}

// Bytes of an unpacked unit before its codes: integer scales in pairs, [16][2], and with zeros or minimums those of each
// group in steps of the scales, 16 floats. Before the first unit: the steps, 16 floats.
constexpr int64_t kStepBytes = 64;
inline int64_t unit_header(const PackedLinear& w, const Unit& unit) {
  return 64 + (w.aux == Aux::kNone ? 0 : 64 * unit.groups);
}

// `count` unpacked units of a weight of at most 6 bits times kPromptRows rows of a tile of `stride` rows, added to
// y [kPromptRows][16], which is in steps of the scales.
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
