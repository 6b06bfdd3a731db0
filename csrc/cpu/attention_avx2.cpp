// Many query rows, and heads that are no multiple of 16: a tile of 64 keys is converted to float32 once, in panels of 16
// columns (keys transposed), and both products are 6 x 16 register-blocked matrix multiplications over it. Few rows:
// attention_few_avx2.cpp; caches of 16-bit floats are met as integers instead (attention_words_avx2.cpp).
#if defined(__x86_64__)

#include "attention_avx2.h"
#include "attention_words.h"

namespace qwen_rt {
namespace {

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
  float* const key_panels = t.scratch + t.stride;  // after the row of zeros
  float* const value_panels = key_panels + kTile * t.stride;
  float* const scores = value_panels + kTile * t.stride;
  std::memset(t.scratch, 0, static_cast<size_t>(t.stride) * sizeof(float));
  std::memset(t.out, 0, static_cast<size_t>(t.rows * t.stride) * sizeof(float));
  for (int64_t r = 0; r < t.rows; ++r) {
    t.max[r] = -INFINITY;
    t.sum[r] = 0.0f;
  }
  CacheTile<F> keys, values;
  for (int64_t begin = t.begin; begin < t.end; begin += kTile) {
    const int64_t n = smaller(kTile, t.end - begin);
    keys.locate(t, t.kv->k, begin, n);
    values.locate(t, t.kv->v, begin, n);
    pack_keys(keys, size, t.stride, (n + 15) / 16 * 16, key_panels);
    pack_values(values, size, t.stride, n, value_panels);
    int m;
    for (int64_t r0 = 0; r0 < t.rows; r0 += m) {
      const int64_t blocks = (t.rows - r0 + kBlock - 1) / kBlock;
      m = static_cast<int>((t.rows - r0 + blocks - 1) / blocks);
      // Keys of the tile that some row of the block sees: [low, high).
      const int64_t low = t.window > 0 ? t.first_pos + r0 / t.group - t.window + 1 - begin : 0;
      const int64_t high = smaller(n, t.first_pos + (r0 + m - 1) / t.group + 1 - begin);
      if (high <= 0 || low >= n) continue;
      const int64_t columns = (high + 15) / 16 * 16;
      for (int64_t j = 0; j < columns; j += 16) {
        kMultiply[m](t.q + r0 * t.stride, t.stride, key_panels + j * t.stride, t.stride, nullptr, scores + j, kTile);
      }
      float factor[kBlock];
      for (int r = 0; r < m; ++r) {
        const int64_t pos = t.first_pos + (r0 + r) / t.group - begin;
        mask(scores + r * kTile, t.window > 0 ? pos - t.window + 1 : 0, smaller(n, pos + 1), columns);
        factor[r] = softmax_step(scores + r * kTile, columns, t.max + r0 + r, t.sum + r0 + r);
      }
      for (int64_t d = 0; d < t.stride; d += 16) {
        kMultiply[m](scores, kTile, value_panels + d * kTile, high, factor, t.out + r0 * t.stride + d, t.stride);
      }
    }
  }
}

}  // namespace

void attend_avx2(const AttentionTile& tile) {
  if (tile.rows <= kFewRows && tile.kv->size % 16 == 0) return attend_few_avx2(tile);
  if (words_serve(*tile.kv)) return attend_words_avx2(tile);
  attend_for(tile.kv->type, attend<Float32>, attend<Float16>, attend<BFloat16>, attend<Int8>)(tile);
}

}  // namespace qwen_rt

#endif
