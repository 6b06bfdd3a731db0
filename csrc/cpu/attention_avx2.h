// What the AVX2 attention kernels share: a tile of the cache, a transpose, powers of two.
#pragma once

#include <math.h>

#include "attention_x86.h"
#include "simd_avx2.h"

namespace qwen_rt {
namespace {

constexpr int kBlock = 6;
constexpr int64_t kFewRows = 24;  // up to here transposing a tile costs more than it saves

// --- formats: eight elements to float32; int8 as codes ---------------------------------------------------------------

struct Float32 {
  using T = float;
  static constexpr bool kCoded = false;
  static __m256 load(const T* p) { return _mm256_loadu_ps(p); }
};

struct Float16 {
  using T = uint16_t;
  static constexpr bool kCoded = false;
  static __m256 load(const T* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
};

struct BFloat16 {
  using T = uint16_t;
  static constexpr bool kCoded = false;
  static __m256 load(const T* p) {
    const __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
  }
};

struct Int8 {
  using T = uint8_t;
  static constexpr bool kCoded = true;
  static __m256 load(const T* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
};

// --- a tile of keys or values in the cache ---------------------------------------------------------------------------

template <class F>
struct CacheTile {
  const typename F::T* row[kTile];  // past the tile's end: a row of zeros
  float scale[kTile], min[kTile];   // coded formats

  void locate(const AttentionTile& t, const KvPages& pages, int64_t begin, int64_t n) {
    const KvLayer& kv = *t.kv;
    int64_t i = 0;
    for (int64_t block = begin / kv.block, offset = begin % kv.block; i < n; ++block, offset = 0) {
      int64_t index = kv.row(t.table[block], t.head, offset);
      for (; offset < kv.block && i < n; ++offset, ++index, ++i) {
        row[i] = static_cast<const typename F::T*>(pages.data) + index * kv.size;
        if (F::kCoded) {
          scale[i] = pages.scale[index];
          min[i] = pages.min[index];
        }
      }
    }
    for (; i < kTile; ++i) {
      row[i] = reinterpret_cast<const typename F::T*>(t.scratch);
      scale[i] = min[i] = 0.0f;
    }
    if (F::kCoded) prefetch_scales(t, pages, begin + kTile);
  }

  void prefetch(int64_t begin, int64_t n, int64_t size) const { prefetch_rows(row, begin, n, size); }

  // Elements [d, d + 8) of row i as float32; zeros (coded: min) from `size` on.
  __m256 read(int64_t i, int64_t d, int64_t size) const {
    __m256 x;
    if (d + 8 <= size) {
      x = F::load(row[i] + d);
    } else {
      typename F::T part[8] = {};
      if (d < size) std::memcpy(part, row[i] + d, static_cast<size_t>(size - d) * sizeof(part[0]));
      x = F::load(part);
    }
    return F::kCoded ? _mm256_fmadd_ps(x, _mm256_set1_ps(scale[i]), _mm256_set1_ps(min[i])) : x;
  }
};

inline void transpose(__m256 (&r)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

// 2^x for x <= 100 within 3 * 2^-24 of itself; below -126 (no normal floats any more) it is 0. NaN stays NaN.
// x = n + f, |f| <= 1/2.
inline __m256 exp2_near(__m256 x) {
  const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm256_sub_ps(x, n);
  __m256 p = _mm256_set1_ps(kExp2[0]);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2[1]));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2[2]));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2[3]));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2[4]));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_LT_OQ), p);
}

}  // namespace

// At most kFewRows rows, heads of a multiple of 16.
void attend_few_avx2(const AttentionTile& tile);
void attend_words_avx2(const AttentionTile& tile);

}  // namespace qwen_rt
