// The choice of a byte tile for a weight, where an instruction set has one for every kind, any rows, and with a minimum
// (or a zero point as one) or without.
#pragma once

#include "linear.h"

namespace qwen_rt {

using ByteTile = void (*)(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, ByteRows in, const float* sums,
                          float* y, int64_t ldy);

// Tile<kind, min, rows>::run is a ByteTile; Tile has internal linkage, and with it what is compiled of this.
template <template <WeightKind, bool, int> class Tile>
struct TileTable {
  template <WeightKind kKind, bool kMin>
  static ByteTile of_rows(int rows) {
    static constexpr ByteTile table[kByteTileRows] = {
        Tile<kKind, kMin, 1>::run, Tile<kKind, kMin, 2>::run,  Tile<kKind, kMin, 3>::run,  Tile<kKind, kMin, 4>::run,
        Tile<kKind, kMin, 5>::run, Tile<kKind, kMin, 6>::run,  Tile<kKind, kMin, 7>::run,  Tile<kKind, kMin, 8>::run,
        Tile<kKind, kMin, 9>::run, Tile<kKind, kMin, 10>::run, Tile<kKind, kMin, 11>::run, Tile<kKind, kMin, 12>::run};
    return table[rows - 1];
  }

  template <WeightKind kKind>
  static ByteTile of_aux(Aux aux, int rows) {
    return aux == Aux::kNone ? of_rows<kKind, false>(rows) : of_rows<kKind, true>(rows);
  }

  static ByteTile of(const PackedLinear& w, int rows) {
    switch (w.kind) {
      case WeightKind::kInt4:
        return of_aux<WeightKind::kInt4>(w.aux, rows);
      case WeightKind::kInt5:
        return of_aux<WeightKind::kInt5>(w.aux, rows);
      case WeightKind::kInt6:
        return of_aux<WeightKind::kInt6>(w.aux, rows);
      default:
        return of_aux<WeightKind::kInt8>(w.aux, rows);
    }
  }

  // ByteKernels::serves and ByteKernels::tile.
  static bool serves(const PackedLinear& w, int, int64_t) { return w.grouped(); }
  static void run(const PackedLinear& w, int64_t panel, int64_t g0, int64_t g1, const ByteRows& in, int rows,
                  const float* sums, float* y, int64_t ldy) {
    of(w, rows)(w, panel, g0, g1, in, sums, y, ldy);
  }
};

}  // namespace qwen_rt
