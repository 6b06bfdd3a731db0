// attention_words.h on AVX2, by the tiles that prompts meet int8 weights with: 6 query rows by 16 keys, and 6 rows of
// weights by 16 dims.
#if defined(__x86_64__)

#include "attention_avx2.h"
#include "attention_words.h"
#include "linear_prompt_avx2.h"

namespace qwen_rt {
namespace {

static_assert(kBlock == kPromptRows && kTile == kWordRow);

template <class T>
float* aligned(T* p) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 31) / 32 * 32);
}

__m128i pack_words(__m256i x) { return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)); }

// `size` numbers of a row -> integers of `steps` steps; the step, NaN where a number is not finite.
template <class F>
float to_words(const typename F::T* row, int64_t size, int32_t steps, int16_t* to) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i top = _mm256_setzero_si256();
  for (int64_t d = 0; d < size; d += 8) {
    top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(F::load(row + d)), magnitude));
  }
  const float most = widest(top);
  const __m256 inverse = _mm256_set1_ps(most > kTiny ? static_cast<float>(steps) / most : 0.0f);
  for (int64_t d = 0; d < size; d += 8) {
    const __m256i x = _mm256_cvtps_epi32(_mm256_mul_ps(F::load(row + d), inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d), pack_words(x));
  }
  return most < INFINITY ? most / static_cast<float>(steps) : NAN;
}

// A tile's rows [64][size]; those past its end are zeros, with a step of zero.
template <class F>
void tile_to_words(const CacheTile<F>& tile, int64_t n, int64_t size, int32_t steps, int16_t* to, float* step) {
  for (int64_t j = 0; j < n; ++j) step[j] = to_words<F>(tile.row[j], size, steps, to + j * size);
  std::memset(to + n * size, 0, static_cast<size_t>((kTile - n) * size) * sizeof(int16_t));
  std::memset(step + n, 0, static_cast<size_t>(kTile - n) * sizeof(float));
}

// 16 keys to a panel [size / 2][16 keys][2 dims].
void pack_keys(const int16_t* words, int64_t size, int16_t* panel) {
  for (int64_t j = 0; j < kPanel; j += 8) {
    for (int64_t d = 0; d < size; d += 16) {
      __m256 x[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) x[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(words + (j + i) * size + d));
      transpose(x);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(reinterpret_cast<float*>(panel + (d / 2 + i) * 32 + 2 * j), x[i]);
    }
  }
}

// Values to panels of 16 dims, [n / 2][16 dims][2 values] each.
void pack_values(const int16_t* words, int64_t n, int64_t size, int16_t* panels) {
  for (int64_t j = 0; j < n; j += 2, words += 2 * size) {
    for (int64_t d = 0; d < size; d += 16) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + d));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + size + d));
      const __m256i lo = _mm256_unpacklo_epi16(a, b), hi = _mm256_unpackhi_epi16(a, b);
      auto* to = reinterpret_cast<__m256i*>(panels + d * kTile + j * 16);
      _mm256_storeu_si256(to, _mm256_permute2x128_si256(lo, hi, 0x20));
      _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(lo, hi, 0x31));
    }
  }
}

// A block's running softmax: lanes are its rows.
struct Running {
  alignas(32) float max[8], sum[8];
};

// Scores [panel][6][16] of a tile, of which row r sees keys [low(r), high(r)), become weights times their value's step as
// integers [6][64]; unit[r] is what they count. Whether what was summed before has to be multiplied by factor[r]: sums
// are relative to a maximum that follows the scores only when they pass it by kSlack, powers of two that floats have room
// for.
template <class Low, class High>
bool weigh(float* scores, const Low& low, const High& high, const float* value_step, Running& running, float* unit,
           float* factor, int16_t* weights) {
  constexpr float kSlack = 8.0f;
  const __m256 hidden = _mm256_set1_ps(-INFINITY);
  alignas(32) float tops[8] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY};
  const auto at = [&](int r, int i) { return scores + i / 2 * kBlock * kPanel + r * kPanel + i % 2 * 8; };
  for (int r = 0; r < kBlock; ++r) {
    __m256 top = hidden;
    const int64_t first = low(r), end = high(r);
    if (first > 0 || end < kTile) {
      const __m256i before = _mm256_set1_epi32(static_cast<int>(larger(first, 0)) - 1);
      const __m256i after = _mm256_set1_epi32(static_cast<int>(larger(smaller(end, kTile), 0)));
      __m256i key = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      for (int i = 0; i < kTile / 8; ++i) {
        const __m256i seen = _mm256_and_si256(_mm256_cmpgt_epi32(key, before), _mm256_cmpgt_epi32(after, key));
        _mm256_storeu_ps(at(r, i), _mm256_blendv_ps(hidden, _mm256_loadu_ps(at(r, i)), _mm256_castsi256_ps(seen)));
        key = _mm256_add_epi32(key, _mm256_set1_epi32(8));
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTile / 8; ++i) top = _mm256_max_ps(top, _mm256_loadu_ps(at(r, i)));
    tops[r] = horizontal_max(top);
  }
  __m256i steps = _mm256_setzero_si256();
  for (int i = 0; i < kTile; i += 8) {
    steps = _mm256_max_epi32(steps, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value_step + i)));
  }
  const __m256 here = _mm256_load_ps(tops), old = _mm256_load_ps(running.max), sum = _mm256_load_ps(running.sum);
  const __m256 passed = _mm256_cmp_ps(here, _mm256_add_ps(old, _mm256_set1_ps(kSlack)), _CMP_GT_OQ);
  const __m256 now = _mm256_blendv_ps(old, here, passed);
  // Nothing visible yet: all weights are 0.
  const __m256 base = _mm256_andnot_ps(_mm256_cmp_ps(now, hidden, _CMP_EQ_OQ), now);
  const __m256 fall = exp2_near(_mm256_sub_ps(old, base));
  const __m256 before = _mm256_blendv_ps(_mm256_set1_ps(1.0f), fall, passed);
  const __m256 most = _mm256_mul_ps(exp2_near(_mm256_sub_ps(here, base)), _mm256_set1_ps(widest(steps)));
  const __m256 some = _mm256_cmp_ps(most, _mm256_set1_ps(kTiny), _CMP_GT_OQ);
  alignas(32) float inverse[8], subtract[8], totals[8] = {};
  _mm256_store_ps(running.max, now);
  _mm256_store_ps(subtract, base);
  _mm256_store_ps(inverse, _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(kWeightSteps), most)));
  _mm256_storeu_ps(unit, _mm256_mul_ps(most, _mm256_set1_ps(1.0f / kWeightSteps)));
  _mm256_storeu_ps(factor, before);
  for (int r = 0; r < kBlock; ++r) {
    const __m256 less = _mm256_broadcast_ss(subtract + r), scale = _mm256_broadcast_ss(inverse + r);
    __m256 total = _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int i = 0; i < kTile / 8; i += 2) {
      __m256i codes[2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256 e = exp2_near(_mm256_sub_ps(_mm256_loadu_ps(at(r, i + h)), less));
        total = _mm256_add_ps(total, e);
        codes[h] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_mul_ps(e, _mm256_loadu_ps(value_step + 8 * (i + h))), scale));
      }
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes[0], codes[1]), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + r * kTile + 8 * i), packed);
    }
    totals[r] = horizontal_sum(total);
  }
  _mm256_store_ps(running.sum, _mm256_fmadd_ps(sum, before, _mm256_load_ps(totals)));
  return _mm256_movemask_ps(passed) != 0;
}

template <class F>
void attend(const AttentionTile& t) {
  const int64_t size = t.kv->size, blocks = (t.rows + kBlock - 1) / kBlock, held = kBlock * size;
  float* const zeros = t.scratch;
  auto* const words = reinterpret_cast<int16_t*>(zeros + t.stride);  // [64][size], of keys, then of values
  int16_t* const key_panels = words + kTile * size;
  int16_t* const value_panels = key_panels + kTile * size;
  float* const scores = reinterpret_cast<float*>(value_panels + kTile * size);  // [panel][6][16]
  auto* const weights = reinterpret_cast<int16_t*>(scores + kBlock * kTile);    // [6][64]
  float* const spare = reinterpret_cast<float*>(weights + kBlock * kTile);      // the last block's sums, and any's rows
  float* const query_step = spare + held;
  auto* const queries = reinterpret_cast<int16_t*>(query_step + blocks * kBlock);  // by blocks: [size / 2][6][2]
  auto* const running = reinterpret_cast<Running*>(aligned(queries + blocks * held));
  std::memset(zeros, 0, static_cast<size_t>(t.stride) * sizeof(float));
  // A block's sums lie where its results will, but in panels [size / 16][6][16].
  const auto sums_of = [&](int64_t b) { return (b + 1) * kBlock <= t.rows ? t.out + b * held : spare; };
  for (int64_t b = 0; b < blocks; ++b) {
    std::memset(sums_of(b), 0, static_cast<size_t>(held) * sizeof(float));
    _mm256_store_ps(running[b].max, _mm256_set1_ps(-INFINITY));
    _mm256_store_ps(running[b].sum, _mm256_setzero_ps());
    for (int64_t r = 0; r < kBlock; ++r) {
      const int64_t row = b * kBlock + r;
      int16_t* to = queries + b * held + 2 * r;
      if (row < t.rows) {
        query_step[row] = to_words<Float32>(t.q + row * t.stride, size, query_steps(size), words);
      } else {
        query_step[row] = 0.0f;
        std::memset(words, 0, static_cast<size_t>(size) * sizeof(int16_t));
      }
      for (int64_t d = 0; d < size; d += 2) std::memcpy(to + d * kBlock, words + d, 4);
    }
  }
  CacheTile<F> keys, values;
  alignas(32) float key_step[kTile], value_step[kTile];
  alignas(32) float ones[kPanel];
  for (float& x : ones) x = 1.0f;
  for (int64_t begin = t.begin; begin < t.end; begin += kTile) {
    const int64_t n = smaller(kTile, t.end - begin);
    keys.locate(t, t.kv->k, begin, n);
    values.locate(t, t.kv->v, begin, n);
    values.prefetch(0, n, size);
    tile_to_words(keys, n, size, kKeySteps, words, key_step);
    for (int64_t j = 0; j < n; j += kPanel) pack_keys(words + j * size, size, key_panels + j * size);
    tile_to_words(values, n, size, kValueSteps, words, value_step);
    pack_values(words, (n + 7) / 8 * 8, size, value_panels);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t r0 = b * kBlock, m = smaller(kBlock, t.rows - r0);
      const auto position = [&](int64_t r) { return t.first_pos + (r0 + r) / t.group - begin; };
      const int64_t high = smaller(n, position(m - 1) + 1);
      if (high <= 0 || (t.window > 0 && position(0) - t.window + 1 >= n)) continue;
      for (int64_t p = 0; p * kPanel < high; ++p) {
        word_products_avx2(queries + b * held, key_panels + p * kPanel * size, size, query_step + r0, key_step + p * kPanel,
                           scores + p * kBlock * kPanel);
      }
      alignas(32) float unit[8], factor[8];
      const bool raised = weigh(
          scores, [&](int64_t r) { return t.window > 0 ? position(r) - t.window + 1 : 0; },
          [&](int64_t r) { return r < m ? smaller(n, position(r) + 1) : 0; }, value_step, running[b], unit, factor, weights);
      float* sums = sums_of(b);
      if (raised) {
        for (int64_t i = 0; i < held; i += 8) {
          const __m256 f = _mm256_broadcast_ss(factor + i / kPanel % kBlock);
          _mm256_storeu_ps(sums + i, _mm256_mul_ps(_mm256_loadu_ps(sums + i), f));
        }
      }
      for (int64_t d = 0; d < size; d += kPanel) {
        add_word_products_avx2(weights, value_panels + d * kTile, (high + 7) / 8 * 8, unit, ones, sums + d * kBlock);
      }
    }
  }
  for (int64_t b = blocks - 1; b >= 0; --b) {  // the one in `spare` first
    const float* sums = sums_of(b);
    if (sums != spare) {
      std::memcpy(spare, sums, static_cast<size_t>(held) * sizeof(float));
      sums = spare;
    }
    for (int64_t r = 0; r < smaller(kBlock, t.rows - b * kBlock); ++r) {
      t.max[b * kBlock + r] = running[b].max[r];
      t.sum[b * kBlock + r] = running[b].sum[r];
      for (int64_t d = 0; d < size; d += kPanel) {
        std::memcpy(t.out + (b * kBlock + r) * t.stride + d, sums + d * kBlock + r * kPanel, kPanel * sizeof(float));
      }
    }
  }
}

}  // namespace

void attend_words_avx2(const AttentionTile& t) {
  (t.kv->type == KvType::kFloat16 ? attend<Float16> : attend<BFloat16>)(t);
}

}  // namespace qwen_rt

#endif
