// Scores and weighted values of at most 6 query rows at a time, the tile of 64 keys in L1 or L2.
//   many rows  the tile is converted to float32 once, in panels of 16 columns (keys transposed), and both products are
//              6 x 16 register-blocked matrix multiplications over it;
//              Caches of 16-bit floats are met as integers instead (attention_words_avx2.cpp).
//   few rows   (decode) dot products of 8 (row, key) pairs at a time, values by rows: from the cache as it is or, where
//              rows take more than one pass over 16-bit floats, from a copy in float32.
#if defined(__x86_64__)

#include <type_traits>

#include "attention_avx2.h"
#include "attention_words.h"

namespace qwen_rt {
namespace {

constexpr int64_t kFewRows = 24;  // up to here transposing a tile costs more than it saves
constexpr int kPassRows = 4;      // query rows of a pass of dot products

// --- many rows: float32 panels ---------------------------------------------------------------------------------------

// keys: panels of 16 keys, [d][16] each, for the first n (a multiple of 16) keys.
template <class F>
void pack_keys(const CacheTile<F>& tile, int64_t size, int64_t stride, int64_t n, float* panels) {
  for (int64_t j = 0; j < n; j += 8) {
    float* panel = panels + j / 16 * stride * 16 + j % 16;
    for (int64_t d = 0; d < stride; d += 8) {
      __m256 x[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) x[i] = tile.read(j + i, d, size);
      transpose(x);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(panel + (d + i) * 16, x[i]);
    }
  }
}

// values: panels of 16 dims, [key][16] each.
template <class F>
void pack_values(const CacheTile<F>& tile, int64_t size, int64_t stride, int64_t n, float* panels) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t d = 0; d < stride; d += 8) {
      _mm256_storeu_ps(panels + d / 16 * kTile * 16 + j * 16 + d % 16, tile.read(j, d, size));
    }
  }
}

// c[i][0:16] = (factor ? factor[i] c[i][0:16] : 0) + sum_p a[i][p] b[p][0:16], i < M.
template <int M>
void multiply(const float* a, int64_t lda, const float* b, int64_t k, const float* factor, float* c, int64_t ldc) {
  __m256 acc[M][2];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    if (factor) {
      const __m256 f = _mm256_set1_ps(factor[i]);
      acc[i][0] = _mm256_mul_ps(f, _mm256_loadu_ps(c + i * ldc));
      acc[i][1] = _mm256_mul_ps(f, _mm256_loadu_ps(c + i * ldc + 8));
    } else {
      acc[i][0] = acc[i][1] = _mm256_setzero_ps();
    }
  }
  for (int64_t p = 0; p < k; ++p) {
    const __m256 b0 = _mm256_loadu_ps(b + p * 16), b1 = _mm256_loadu_ps(b + p * 16 + 8);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const __m256 x = _mm256_broadcast_ss(a + i * lda + p);
      acc[i][0] = _mm256_fmadd_ps(x, b0, acc[i][0]);
      acc[i][1] = _mm256_fmadd_ps(x, b1, acc[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    _mm256_storeu_ps(c + i * ldc, acc[i][0]);
    _mm256_storeu_ps(c + i * ldc + 8, acc[i][1]);
  }
}

using Multiply = void (*)(const float*, int64_t, const float*, int64_t, const float*, float*, int64_t);
constexpr Multiply kMultiply[kBlock + 1] = {nullptr,     multiply<1>, multiply<2>, multiply<3>,
                                            multiply<4>, multiply<5>, multiply<6>};

// --- few rows: straight from the cache -------------------------------------------------------------------------------

// The first n rows of 16-bit floats in float32, [n][size]; size a multiple of 16.
template <class F>
void widen(const CacheTile<F>& tile, int64_t n, int64_t size, float* rows) {
  for (int64_t j = 0; j < n; ++j, rows += size) {
    for (int64_t d = 0; d < size; d += 16) {
      const __m256 x[2] = {F::load(tile.row[j] + d), F::load(tile.row[j] + d + 8)};
      _mm256_storeu_ps(rows + d, x[0]);
      _mm256_storeu_ps(rows + d + 8, x[1]);
    }
  }
}

// Lane i of the result is the sum of the lanes of x[i].
__m256 sum_each(const __m256 (&x)[8]) {
  __m256 a[4], b[2];
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm256_add_ps(_mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    b[i] =
        _mm256_add_ps(_mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44), _mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(b[0], b[1], 0x20), _mm256_permute2f128_ps(b[0], b[1], 0x31));
}

// scores[r][j] = q[r] . row j (coded: . codes) for R rows and the first n keys, rounded up to 8.
template <class F, class Next, int R>
void dot_rows(const CacheTile<F>& tile, const float* q, int64_t stride, int64_t size, int64_t n, float* scores,
              const CacheTile<Next>* next) {
  constexpr int kKeys = 8 / R;
  for (int64_t j = 0; j < n; j += kKeys) {
    if (next) next->prefetch(j, kKeys, size);
    __m256 acc[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) acc[i] = _mm256_setzero_ps();
    for (int64_t d = 0; d < size; d += 8) {
      __m256 k[kKeys];
#pragma GCC unroll 8
      for (int c = 0; c < kKeys; ++c) k[c] = F::load(tile.row[j + c] + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256 x = _mm256_loadu_ps(q + r * stride + d);
#pragma GCC unroll 8
        for (int c = 0; c < kKeys; ++c) acc[r * kKeys + c] = _mm256_fmadd_ps(x, k[c], acc[r * kKeys + c]);
      }
    }
    float sums[8];
    _mm256_storeu_ps(sums, sum_each(acc));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * kTile + j, sums + r * kKeys, kKeys * sizeof(float));
  }
}

// acc[r][0:8N] = factor[r] acc[r][0:8N] + offset[r] + sum_j p[r][j] row_j[0:8N], r < M; dims start at d.
template <class F, class Next, int M, int N>
void add_values(const CacheTile<F>& tile, const float* p, int64_t n, int64_t size, int64_t d, const float* factor,
                const float* offset, float* out, int64_t stride, const CacheTile<Next>* next) {
  __m256 acc[M][N];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      acc[r][i] = _mm256_fmadd_ps(_mm256_set1_ps(factor[r]), _mm256_loadu_ps(out + r * stride + d + 8 * i),
                                  _mm256_set1_ps(offset[r]));
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    if (next) next->prefetch(j, 1, size);
    __m256 v[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) v[i] = F::load(tile.row[j] + d + 8 * i);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const __m256 x = _mm256_broadcast_ss(p + r * kTile + j);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) acc[r][i] = _mm256_fmadd_ps(x, v[i], acc[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) _mm256_storeu_ps(out + r * stride + d + 8 * i, acc[r][i]);
  }
}

template <class F, class Next, int M>
void add_values_rows(const CacheTile<F>& tile, const float* p, int64_t n, int64_t size, const float* factor,
                     const float* offset, float* out, int64_t stride, const CacheTile<Next>* next) {
  constexpr int kWide = M == 1 ? 8 : M == 2 ? 4 : 2;  // enough sums in flight to hide the latency of an FMA
  int64_t d = 0;
  for (; d + 8 * kWide <= size; d += 8 * kWide) {
    add_values<F, Next, M, kWide>(tile, p, n, size, d, factor, offset, out, stride, d == 0 ? next : nullptr);
  }
  for (; d < size; d += 16) {
    add_values<F, Next, M, 2>(tile, p, n, size, d, factor, offset, out, stride, d == 0 ? next : nullptr);
  }
}

template <class F, class Next>
void direct_scores(const CacheTile<F>& tile, const float* q, const float* q_sum, int64_t stride, int64_t size, int m,
                   int64_t n, float* scores, const CacheTile<Next>* next) {
  using Dot = void (*)(const CacheTile<F>&, const float*, int64_t, int64_t, int64_t, float*, const CacheTile<Next>*);
  constexpr Dot kDot[kPassRows + 1] = {nullptr, dot_rows<F, Next, 1>, dot_rows<F, Next, 2>, dot_rows<F, Next, 3>,
                                       dot_rows<F, Next, 4>};
  int r = 0;
  for (; r < m; r += kPassRows) {
    kDot[smaller(kPassRows, m - r)](tile, q + r * stride, stride, size, n, scores + r * kTile, r == 0 ? next : nullptr);
  }
  if (!F::kCoded) return;
  for (r = 0; r < m; ++r) {
    for (int64_t j = 0; j < n; j += 8) {
      float* s = scores + r * kTile + j;
      const __m256 low = _mm256_mul_ps(_mm256_set1_ps(q_sum[r]), _mm256_loadu_ps(tile.min + j));
      _mm256_storeu_ps(s, _mm256_fmadd_ps(_mm256_loadu_ps(s), _mm256_loadu_ps(tile.scale + j), low));
    }
  }
}

template <class F, class Next>
void direct_values(const CacheTile<F>& tile, float* p, int64_t n, int64_t size, int m, const float* factor, float* out,
                   int64_t stride, const CacheTile<Next>* next) {
  float offset[kBlock] = {};
  if (F::kCoded) {
    for (int r = 0; r < m; ++r) {
      __m256 low = _mm256_setzero_ps();
      for (int64_t j = 0; j < n; j += 8) {
        const __m256 x = _mm256_loadu_ps(p + r * kTile + j);
        low = _mm256_fmadd_ps(x, _mm256_loadu_ps(tile.min + j), low);
        _mm256_storeu_ps(p + r * kTile + j, _mm256_mul_ps(x, _mm256_loadu_ps(tile.scale + j)));
      }
      offset[r] = horizontal_sum(low);
    }
  }
  using Add = void (*)(const CacheTile<F>&, const float*, int64_t, int64_t, const float*, const float*, float*, int64_t,
                       const CacheTile<Next>*);
  constexpr Add kAdd[kBlock + 1] = {nullptr,
                                    add_values_rows<F, Next, 1>,
                                    add_values_rows<F, Next, 2>,
                                    add_values_rows<F, Next, 3>,
                                    add_values_rows<F, Next, 4>,
                                    add_values_rows<F, Next, 5>,
                                    add_values_rows<F, Next, 6>};
  kAdd[m](tile, p, n, size, factor, offset, out, stride, next);
}

// --- softmax ---------------------------------------------------------------------------------------------------------

// Scores s[0:n] (n a multiple of 16) become 2^(s - max) with the row's new maximum; `sum` is updated. Returns the
// factor that brings what was accumulated under the old maximum to the new one.
float softmax_step(float* s, int64_t n, float* max, float* sum) {
  __m256 high = _mm256_set1_ps(*max);
  for (int64_t j = 0; j < n; j += 8) high = _mm256_max_ps(high, _mm256_loadu_ps(s + j));
  const float top = horizontal_max(high);
  const __m256 base = _mm256_set1_ps(top == -INFINITY ? 0.0f : top);  // nothing visible yet: all weights are 0
  __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t j = 0; j < n; j += 16) {
#pragma GCC unroll 8
    for (int i = 0; i < 2; ++i) {
      const __m256 e = exp2_near(_mm256_sub_ps(_mm256_loadu_ps(s + j + 8 * i), base));
      _mm256_storeu_ps(s + j + 8 * i, e);
      total[i] = _mm256_add_ps(total[i], e);
    }
  }
  const float factor = *max == top ? 1.0f : exp2f(*max - top);
  *max = top;
  *sum = *sum * factor + horizontal_sum(_mm256_add_ps(total[0], total[1]));
  return factor;
}

// Scores of keys outside [low, high) become -inf; n columns.
void mask(float* s, int64_t low, int64_t high, int64_t n) {
  for (int64_t j = 0; j < smaller(low, n); ++j) s[j] = -INFINITY;
  for (int64_t j = larger(high, 0); j < n; ++j) s[j] = -INFINITY;
}

template <class F>
void attend(const AttentionTile& t) {
  const int64_t size = t.kv->size;
  const bool direct = t.rows <= kFewRows && size % 16 == 0;
  const bool widened = direct && t.rows > kPassRows && !F::kCoded && !std::is_same_v<F, Float32>;
  float* const key_panels = t.scratch + t.stride;  // after the row of zeros
  float* const value_panels = key_panels + kTile * t.stride;
  float* const scores = value_panels + kTile * t.stride;
  std::memset(t.scratch, 0, static_cast<size_t>(t.stride) * sizeof(float));
  std::memset(t.out, 0, static_cast<size_t>(t.rows * t.stride) * sizeof(float));
  CacheTile<Float32> wide_keys, wide_values;
  if (widened) {
    for (int64_t j = 0; j < kTile; ++j) {
      wide_keys.row[j] = key_panels + j * size;
      wide_values.row[j] = value_panels + j * size;
    }
  }
  float q_sum[kFewRows] = {};
  for (int64_t r = 0; r < t.rows; ++r) {
    t.max[r] = -INFINITY;
    t.sum[r] = 0.0f;
    if (F::kCoded && direct) {
      for (int64_t d = 0; d < size; ++d) q_sum[r] += t.q[r * t.stride + d];
    }
  }
  CacheTile<F> tiles[2], values, next_values;
  const auto locate_keys = [&](CacheTile<F>& tile, int64_t begin) {
    tile.locate(t, t.kv->k, begin, larger(0, smaller(kTile, t.end - begin)));
  };
  locate_keys(tiles[0], t.begin);
  int which = 0;
  for (int64_t begin = t.begin; begin < t.end; begin += kTile, which ^= 1) {
    const int64_t n = smaller(kTile, t.end - begin);
    const CacheTile<F>& keys = tiles[which];
    locate_keys(tiles[which ^ 1], begin + kTile);
    values.locate(t, t.kv->v, begin, n);
    if (widened) next_values.locate(t, t.kv->v, begin + kTile, larger(0, smaller(kTile, t.end - begin - kTile)));
    if (widened) {
      widen(keys, (n + 15) / 16 * 16, size, key_panels);
      widen(values, n, size, value_panels);
    } else if (!direct) {
      pack_keys(keys, size, t.stride, (n + 15) / 16 * 16, key_panels);
      pack_values(values, size, t.stride, n, value_panels);
    }
    int m;
    for (int64_t r0 = 0; r0 < t.rows; r0 += m) {
      const int64_t blocks = (t.rows - r0 + kBlock - 1) / kBlock;
      m = static_cast<int>((t.rows - r0 + blocks - 1) / blocks);
      // Keys of the tile that some row of the block sees: [low, high).
      const int64_t low = t.window > 0 ? t.first_pos + r0 / t.group - t.window + 1 - begin : 0;
      const int64_t high = smaller(n, t.first_pos + (r0 + m - 1) / t.group + 1 - begin);
      if (high <= 0 || low >= n) continue;
      const int64_t columns = (high + 15) / 16 * 16;
      const float* q = t.q + r0 * t.stride;
      if (widened) {
        direct_scores(wide_keys, q, nullptr, t.stride, size, m, columns, scores, r0 == 0 ? &next_values : nullptr);
      } else if (direct) {
        direct_scores(keys, q, q_sum + r0, t.stride, size, m, columns, scores, r0 == 0 ? &values : nullptr);
      } else {
        for (int64_t j = 0; j < columns; j += 16) {
          kMultiply[m](q, t.stride, key_panels + j * t.stride, t.stride, nullptr, scores + j, kTile);
        }
      }
      float factor[kBlock];
      for (int r = 0; r < m; ++r) {
        const int64_t pos = t.first_pos + (r0 + r) / t.group - begin;
        mask(scores + r * kTile, t.window > 0 ? pos - t.window + 1 : 0, smaller(n, pos + 1), columns);
        factor[r] = softmax_step(scores + r * kTile, columns, t.max + r0 + r, t.sum + r0 + r);
      }
      float* out = t.out + r0 * t.stride;
      if (widened) {
        direct_values(wide_values, scores, high, size, m, factor, out, t.stride, r0 == 0 ? &tiles[which ^ 1] : nullptr);
      } else if (direct) {
        direct_values(values, scores, high, size, m, factor, out, t.stride, r0 == 0 ? &tiles[which ^ 1] : nullptr);
      } else {
        for (int64_t d = 0; d < t.stride; d += 16) {
          kMultiply[m](scores, kTile, value_panels + d * kTile, high, factor, out + d, t.stride);
        }
      }
    }
  }
}

}  // namespace

void attend_avx2(const AttentionTile& tile) {
  if (tile.rows > kFewRows && words_serve(*tile.kv)) return attend_words_avx2(tile);
  attend_for(tile.kv->type, attend<Float32>, attend<Float16>, attend<BFloat16>, attend<Int8>)(tile);
}

}  // namespace qwen_rt

#endif
