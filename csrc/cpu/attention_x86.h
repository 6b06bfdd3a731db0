// What the AVX2 and AVX-512 attention kernels share. Everything is static: each instruction set has a copy of its own.
#pragma once

#include "attention.h"
#include "prefetch_x86.h"

namespace qwen_rt {
namespace {

constexpr int64_t kTile = kAttentionTile;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Asks for the scales and minimums of the tile at `begin`, which CacheTile::locate reads at once.
inline void prefetch_scales(const AttentionTile& t, const KvPages& pages, int64_t begin) {
  const KvLayer& kv = *t.kv;
  for (int64_t key = begin; key < smaller(begin + kTile, t.end); key += smaller(16, kv.block)) {
    const int64_t index = kv.row(t.table[key / kv.block], t.head, key % kv.block);
    prefetch_l1(pages.scale + index);
    prefetch_l1(pages.min + index);
  }
}

// Asks for rows [begin, begin + n) of a later tile: pages are too short for the hardware to guess.
template <class T>
void prefetch_rows(const T* const* row, int64_t begin, int64_t n, int64_t size) {
  for (int64_t i = begin; i < begin + n; ++i) {
    const char* line = reinterpret_cast<const char*>(row[i]);
    for (const char* end = line + size * sizeof(T); line < end; line += 64) prefetch_l2(line);
  }
}

}  // namespace
}  // namespace qwen_rt
