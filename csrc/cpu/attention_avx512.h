// What the AVX-512 attention kernels share: a tile of the cache, its keys transposed, powers of two, visible keys.
#pragma once

#include <math.h>

#include <cstring>

#include "attention_x86.h"
#include "linear.h"
#include "simd_avx512.h"

namespace qwen_rt {
namespace {

constexpr int kBlock = kAttentionBlock;

// --- formats: 16 elements to float32, the last few by a mask; kUnit of them in the 4 bytes that move together --------

struct Float32 {
  using T = float;
  static constexpr int kUnit = 1;
  static __m512 load(const T* p) { return _mm512_loadu_ps(p); }
  static __m512 load(const T* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
};

struct Float16 {
  using T = uint16_t;
  static constexpr int kUnit = 2;
  static __m512 load(const T* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static __m512 load(const T* p, __mmask16 m) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
};

struct BFloat16 {
  using T = uint16_t;
  static constexpr int kUnit = 2;
  static __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static __m512 load(const T* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static __m512 load(const T* p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
};

struct Int8 {
  using T = uint8_t;
  static constexpr int kUnit = 4;
  static __m512 widen(__m128i x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_xor_si128(x, _mm_set1_epi8(-128))));
  }
  static __m512 load(const T* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static __m512 load(const T* p, __mmask16 m) { return widen(_mm_maskz_loadu_epi8(m, p)); }
};

template <class F>
constexpr bool kCoded = F::kUnit == 4;

__mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }

// --- a tile of keys or values in the cache ---------------------------------------------------------------------------

template <class F>
struct CacheTile {
  const typename F::T* row[kTile];  // past the tile's end: a row of zeros
  float scale[kTile], mid[kTile];   // coded formats: element = (code - 128) * scale + mid

  void locate(const AttentionTile& t, const KvPages& pages, int64_t begin, const void* zeros) {
    const KvLayer& kv = *t.kv;
    const int64_t n = larger(0, smaller(kTile, t.end - begin));
    int64_t i = 0;
    for (int64_t block = begin / kv.block, offset = begin % kv.block; i < n; ++block, offset = 0) {
      const int64_t index = kv.row(t.table[block], t.head, offset);
      const int64_t count = smaller(kv.block - offset, n - i);
      const auto* first = static_cast<const typename F::T*>(pages.data) + index * kv.size;
      for (int64_t c = 0; c < count; ++c) row[i + c] = first + c * kv.size;
      if (kCoded<F>) {
        for (int64_t c = 0; c < count; c += 16) {
          const __mmask16 m = first_lanes(count - c);
          const __m512 step = _mm512_maskz_loadu_ps(m, pages.scale + index + c);
          const __m512 low = _mm512_maskz_loadu_ps(m, pages.min + index + c);
          _mm512_mask_storeu_ps(scale + i + c, m, step);
          _mm512_mask_storeu_ps(mid + i + c, m, _mm512_fmadd_ps(step, _mm512_set1_ps(128.0f), low));
        }
      }
      i += count;
    }
    for (; i < kTile; ++i) {
      row[i] = static_cast<const typename F::T*>(zeros);
      scale[i] = mid[i] = 0.0f;
    }
    if (kCoded<F>) prefetch_scales(t, pages, begin + kTile);
  }

  void prefetch(int64_t begin, int64_t n, int64_t size) const { prefetch_rows(row, begin, n, size); }
};

// --- keys ------------------------------------------------------------------------------------------------------------

// 16 x 16 units of 4 bytes.
inline __attribute__((always_inline)) void transpose(__m512i (&r)[16]) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

template <class F>
int64_t steps_of(int64_t size) {
  return (size + F::kUnit - 1) / F::kUnit;
}

// 16 keys from j on to a panel [step][16 keys] of units.
template <class F>
void pack_keys(const CacheTile<F>& tile, int64_t j, int64_t size, char* panel) {
  const int64_t bytes = size * static_cast<int64_t>(sizeof(typename F::T));
  for (int64_t at = 0; at < bytes; at += 64) {
    __m512i x[16];
    if (at + 64 <= bytes) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(reinterpret_cast<const char*>(tile.row[j + i]) + at);
    } else {
      const __mmask64 m = (uint64_t{1} << (bytes - at)) - 1;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        x[i] = _mm512_maskz_loadu_epi8(m, reinterpret_cast<const char*>(tile.row[j + i]) + at);
      }
    }
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(panel + (at / 4 + i) * 64, x[i]);
  }
}

// --- softmax ---------------------------------------------------------------------------------------------------------

// 2^x for x <= 0 within 3 * 2^-24 of itself; 2^-inf = 0, NaN stays NaN. x = n + f, |f| <= 1/2.
__m512 exp2_nonpositive(__m512 x) {
  const __m512 round = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: a sum's lowest bits are the nearest integer
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 n = _mm512_sub_ps(_mm512_add_ps(x, round), round), f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(kExp2[0]);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[1]));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[2]));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[3]));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[4]));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Bits of the keys [low, high) of a tile.
uint64_t tile_bits(int64_t low, int64_t high) {
  if (high <= low || high <= 0 || low >= 64) return 0;
  const uint64_t below = high >= 64 ? ~uint64_t{0} : (uint64_t{1} << high) - 1;
  return low <= 0 ? below : below & ~((uint64_t{1} << low) - 1);
}

// What m rows of a block see of a tile of n keys; row r sits at key position(r) of the tile.
struct Sight {
  int64_t high;              // no row sees keys from here on; 0: none sees any
  bool all;                  // every row sees every key of a full tile
  uint64_t visible[kBlock];  // else bit j: key j is visible to row r

  template <class Position>
  Sight(int64_t window, int64_t n, int64_t m, const Position& position) {
    const int64_t first = position(0), last = position(m - 1), low = window > 0 ? first - window + 1 : 0;
    high = low >= n ? 0 : larger(0, smaller(n, last + 1));
    all = first >= kTile - 1 && n == kTile && (window == 0 || last - window < 0);
    for (int64_t r = 0; r < m && !all; ++r) {
      const int64_t pos = position(r);
      visible[r] = tile_bits(window > 0 ? pos - window + 1 : 0, smaller(n, pos + 1));
    }
  }
  const uint64_t* bits() const { return all ? nullptr : visible; }
};

// Scores of m rows and 64 keys: finish(row, vector, stored) is what they come to, hidden ones -infinity. The largest of
// each row.
template <class Finish>
__m512 settle(int m, float* scores, const uint64_t* visible, const Finish& finish) {
  constexpr int kVectors = kTile / 16;
  const __m512 hidden = _mm512_set1_ps(-INFINITY);
  alignas(64) float top[16] = {};
  for (int r = 0; r < m; ++r) {
    __m512 x[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      float* at = scores + r * kTile + 16 * i;
      x[i] = finish(r, i, _mm512_loadu_ps(at));
      if (visible) x[i] = _mm512_mask_mov_ps(hidden, static_cast<__mmask16>(visible[r] >> (16 * i)), x[i]);
      _mm512_storeu_ps(at, x[i]);
    }
    top[r] = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3])));
  }
  return _mm512_load_ps(top);
}

// The running maxima of m rows meet those of a tile: what to subtract from scores (0 while nothing is visible), and
// the factor of what was summed before.
__m512 raise(int m, __m512 here, float* max, float* factor) {
  const __mmask16 rows = first_lanes(m);
  const __m512 before = _mm512_maskz_loadu_ps(rows, max), now = _mm512_max_ps(here, before);
  const __m512 base = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(now, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ), now);
  _mm512_mask_storeu_ps(max, rows, now);
  _mm512_mask_storeu_ps(factor, rows, exp2_nonpositive(_mm512_sub_ps(before, base)));
  return base;
}

// A tile's numbers are integers times a key's step, and its mid where there are mids.
struct Affine {
  const float *step, *mid;  // [64]; mid may be null
};

// Integers of `steps` steps for weights times their value's step, none of a row above unit times that: store(row,
// vector, integers). Of m rows also the sum of the weights and, with mids, offset[r] = sum_j weight * mid.
template <class Store>
void weigh(int m, const float* scores, __m512 here, __m512 base, const Affine& values, float steps, const float* factor,
           float* sum, float* unit, float* offset, const Store& store) {
  constexpr int kVectors = kTile / 16;
  // By their bits, so that NaN is the widest.
  __m512i widest = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    widest = _mm512_max_epi32(widest, _mm512_loadu_si512(values.step + 16 * i));
  }
  const __m512 most = _mm512_mul_ps(exp2_nonpositive(_mm512_sub_ps(here, base)),
                                    _mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(widest))));
  const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_set1_ps(kTiny), _CMP_GT_OQ);
  alignas(64) float inverse[16], subtract[16];
  _mm512_mask_storeu_ps(unit, first_lanes(m), _mm512_mul_ps(most, _mm512_set1_ps(1.0f / steps)));
  _mm512_store_ps(inverse, _mm512_maskz_div_ps(some, _mm512_set1_ps(steps), most));
  _mm512_store_ps(subtract, base);
  for (int r = 0; r < m; ++r) {
    __m512 total = _mm512_mul_ps(_mm512_set1_ps(factor[r]), _mm512_loadu_ps(sum + 16 * r));
    __m512 low = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const __m512 score = _mm512_loadu_ps(scores + r * kTile + 16 * i);
      const __m512 e = exp2_nonpositive(_mm512_sub_ps(score, _mm512_set1_ps(subtract[r])));
      total = _mm512_add_ps(total, e);
      if (values.mid) low = _mm512_fmadd_ps(e, _mm512_loadu_ps(values.mid + 16 * i), low);
      const __m512 w = _mm512_mul_ps(_mm512_mul_ps(e, _mm512_loadu_ps(values.step + 16 * i)), _mm512_set1_ps(inverse[r]));
      store(r, i, _mm512_cvtps_epi32(w));
    }
    _mm512_storeu_ps(sum + 16 * r, total);
    offset[r] = values.mid ? _mm512_reduce_add_ps(low) : 0.0f;
  }
}

}  // namespace
}  // namespace qwen_rt
