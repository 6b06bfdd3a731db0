// attention_words.h on AVX-512: twice what float32 multiply-adds come to. Keys are transposed by pairs of dims; two values'
// integers are interleaved, which leaves 32 dims in another order until the end.
#if defined(__x86_64__)

#include "attention_avx512.h"
#include "attention_integers_avx512.h"
#include "attention_words.h"

namespace qwen_rt {
namespace {

constexpr int64_t kChunk = 32;  // dims whose order is one of pack_values

// Sixteen sums. Not __m512i: GCC 12 takes its lanes for 64 bits and spills sums of 32.
typedef int32_t Sums __attribute__((vector_size(64)));

inline Sums products(Sums sum, __m512i a, __m512i b) { return (Sums)_mm512_dpwssd_epi32((__m512i)sum, a, b); }

inline __m512 floats(Sums sum) { return _mm512_cvtepi32_ps((__m512i)sum); }

__m512i load512(const void* p) { return _mm512_loadu_si512(p); }

__m512i pair_of(const void* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return _mm512_set1_epi32(pair);
}

// Words of a tile, as CacheTile for pack_keys.
struct Words {
  using T = int16_t;
};

// --- from floats to integers -----------------------------------------------------------------------------------------

// `size` numbers of a row -> integers of `steps` steps; the step, NaN where a number is not finite.
template <class F>
float to_words(const typename F::T* row, int64_t size, int32_t steps, int16_t* to) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i top = _mm512_setzero_si512();
  for (int64_t d = 0; d < size; d += 16) {
    top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(F::load(row + d)), magnitude));
  }
  const int32_t bits = _mm512_reduce_max_epi32(top);
  float most;
  std::memcpy(&most, &bits, 4);
  const __m512 inverse = _mm512_set1_ps(most > kTiny ? static_cast<float>(steps) / most : 0.0f);
  for (int64_t d = 0; d < size; d += 16) {
    const __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(F::load(row + d), inverse));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), _mm512_cvtsepi32_epi16(x));
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

// To a panel [2 values][size / 16][16 dims][2 values]. Of 32 dims, the first vector has 8 L + e, the second 8 L + 4 + e,
// L < 4, e < 4.
void pack_values(const int16_t* words, int64_t n, int64_t size, char* panel) {
  for (int64_t j = 0; j < n; j += 2, words += 2 * size) {
    for (int64_t d = 0; d < size; d += kChunk, panel += 4 * kChunk) {
      const __m512i a = load512(words + d), b = load512(words + size + d);
      _mm512_storeu_si512(panel, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(panel + 64, _mm512_unpackhi_epi16(a, b));
    }
  }
}

// --- products --------------------------------------------------------------------------------------------------------

// scores[r] = integer product of row r < M with 32 keys of two panels [step][16][2], `apart` bytes from each other.
template <int M>
void score_words(const int16_t* q, const char* panel, int64_t apart, int64_t steps, float* scores) {
  Sums acc[M][2];
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) acc[r][0] = acc[r][1] = Sums{};
  for (int64_t s = 0; s < steps; ++s, panel += 64, q += 2 * M) {
    const __m512i keys[2] = {load512(panel), load512(panel + apart)};
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) {
      const __m512i x = pair_of(q + 2 * r);
      acc[r][0] = products(acc[r][0], keys[0], x);
      acc[r][1] = products(acc[r][1], keys[1], x);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) {
    _mm512_storeu_ps(scores + r * kTile, floats(acc[r][0]));
    _mm512_storeu_ps(scores + r * kTile + 16, floats(acc[r][1]));
  }
}

// out[r] = factor[r] out[r] + unit[r] * integer product of weights [row][64] and n values, r < M, all dims.
template <int M>
void add_words(const char* panel, int64_t size, int64_t n, const int16_t* weights, const float* unit,
               const float* factor, float* out, int64_t stride) {
  for (int64_t d = 0; d < size; d += 32, panel += 128, out += 32) {
    Sums acc[M][2];
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) acc[r][0] = acc[r][1] = Sums{};
    const char* values = panel;
    for (int64_t j = 0; j < n; j += 2, values += 4 * size) {
      const __m512i v[2] = {load512(values), load512(values + 64)};
#pragma GCC unroll 12
      for (int r = 0; r < M; ++r) {
        const __m512i w = pair_of(weights + r * kTile + j);
        acc[r][0] = products(acc[r][0], v[0], w);
        acc[r][1] = products(acc[r][1], v[1], w);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        float* to = out + r * stride + 16 * i;
        const __m512 before = _mm512_mul_ps(_mm512_set1_ps(factor[r]), _mm512_loadu_ps(to));
        _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(unit[r]), floats(acc[r][i]), before));
      }
    }
  }
}

// The dims of a row's chunks back in order.
void order(float* out, int64_t size) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t d = 0; d < size; d += kChunk, out += kChunk) {
    const __m512 a = _mm512_loadu_ps(out), b = _mm512_loadu_ps(out + 16);
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(a, first, b));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(a, second, b));
  }
}

// --- the kernel ------------------------------------------------------------------------------------------------------

struct RowsOfWords {
  void (*score)(const int16_t*, const char*, int64_t, int64_t, float*);
  void (*add)(const char*, int64_t, int64_t, const int16_t*, const float*, const float*, float*, int64_t);
};

template <int M>
constexpr RowsOfWords kWords = {score_words<M>, add_words<M>};

constexpr RowsOfWords kWordsOf[kBlock + 1] = {{},        kWords<1>, kWords<2>, kWords<3>,  kWords<4>,  kWords<5>, kWords<6>,
                                              kWords<7>, kWords<8>, kWords<9>, kWords<10>, kWords<11>, kWords<12>};

template <class F>
void attend(const AttentionTile& t) {
  const int64_t size = t.kv->size, steps = size / 2, blocks = (t.rows + kBlock - 1) / kBlock;
  float* const zeros = t.scratch;
  auto* const words = reinterpret_cast<int16_t*>(zeros + t.stride);  // [64][size], of keys, then of values
  char* const key_panels = reinterpret_cast<char*>(words + kTile * size);
  char* const value_panel = key_panels + 2 * kTile * size;
  float* const scores = reinterpret_cast<float*>(value_panel + 2 * kTile * size);
  auto* const weights = reinterpret_cast<int16_t*>(scores + kBlock * kTile);
  float* const sums = reinterpret_cast<float*>(weights + kBlock * kTile);
  float* const query_step = sums + t.rows * 16;
  auto* const queries = reinterpret_cast<int16_t*>(query_step + t.rows);  // by blocks of M rows: [step][M][2]
  std::memset(zeros, 0, static_cast<size_t>(t.stride) * sizeof(float));
  std::memset(t.out, 0, static_cast<size_t>(t.rows * t.stride) * sizeof(float));
  std::memset(sums, 0, static_cast<size_t>(t.rows) * 16 * sizeof(float));
  const auto rows_of = [&](int64_t b) { return t.rows / blocks + (b < t.rows % blocks); };
  for (int64_t b = 0, r0 = 0, m; b < blocks; ++b, r0 += m) {
    m = rows_of(b);
    for (int64_t r = 0; r < m; ++r) {
      query_step[r0 + r] = to_words<Float32>(t.q + (r0 + r) * t.stride, size, query_steps(size), words);
      int16_t* to = queries + r0 * size + 2 * r;
      for (int64_t s = 0; s < steps; ++s) std::memcpy(to + s * 2 * m, words + 2 * s, 4);
      t.max[r0 + r] = -INFINITY;
    }
  }
  CacheTile<F> keys, values;
  CacheTile<Words> coded;
  for (int64_t j = 0; j < kTile; ++j) coded.row[j] = words + j * size;
  alignas(64) float key_step[kTile], value_step[kTile];
  for (int64_t begin = t.begin; begin < t.end; begin += kTile) {
    const int64_t n = smaller(kTile, t.end - begin);
    keys.locate(t, t.kv->k, begin, zeros);
    values.locate(t, t.kv->v, begin, zeros);
    values.prefetch(0, n, size);
    tile_to_words(keys, n, size, kKeySteps, words, key_step);
    for (int64_t j = 0; j < (n + 31) / 32 * 32; j += 16) pack_keys(coded, j, size, key_panels + j * size * 2);
    tile_to_words(values, n, size, kValueSteps, words, value_step);
    pack_values(words, n, size, value_panel);
    for (int64_t b = 0, r0 = 0, m; b < blocks; ++b, r0 += m) {
      m = rows_of(b);
      const Sight sight(t.window, n, m, [&](int64_t r) { return t.first_pos + (r0 + r) / t.group - begin; });
      if (sight.high == 0) continue;
      for (int64_t j = 0; j < sight.high; j += 32) {
        kWordsOf[m].score(queries + r0 * size, key_panels + j * size * 2, size * 32, steps, scores + j);
      }
      const __m512 here = settle(static_cast<int>(m), scores, sight.bits(), [&](int r, int i, __m512 x) {
        return _mm512_mul_ps(x, _mm512_mul_ps(_mm512_load_ps(key_step + 16 * i), _mm512_set1_ps(query_step[r0 + r])));
      });
      float unit[kBlock], factor[kBlock], offset[kBlock];
      const __m512 base = raise(static_cast<int>(m), here, t.max + r0, factor);
      weigh(static_cast<int>(m), scores, here, base, {value_step, nullptr}, kWeightSteps, factor, sums + r0 * 16, unit,
            offset, [&](int r, int i, __m512i codes) {
              int16_t* to = weights + r * kTile + 16 * i;
              _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(codes));
            });
      kWordsOf[m].add(value_panel, size, sight.high, weights, unit, factor, t.out + r0 * t.stride, t.stride);
    }
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    t.sum[r] = _mm512_reduce_add_ps(_mm512_loadu_ps(sums + 16 * r));
    order(t.out + r * t.stride, size);
  }
}

}  // namespace

void attend_words_avx512(const AttentionTile& t) {
  (t.kv->type == KvType::kFloat16 ? attend<Float16> : attend<BFloat16>)(t);
}

}  // namespace qwen_rt

#endif
