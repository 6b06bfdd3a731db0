// Blocks of at most 12 query rows against tiles of 64 keys, both products float32 FMAs held in registers.
//   keys    are transposed as they are stored, by units of 4 bytes (1, 2 or 4 dims), and converted where they are used:
//           for 16 elements 4 / dims shuffles instead of 4. A lane of a score's sum then holds one dim of each unit;
//           the lanes of a unit are added once at the end. int8 enters as code - 128; scores get scale and middle.
//   values  are read from the cache as they are by one block of rows (decode, short chunks), converted once for more.
//   1-2 rows (decode without grouped heads) take dot products from the cache: there a transposition does not pay.
#if defined(__x86_64__)

#include "attention_avx512.h"
#include "attention_integers_avx512.h"
#include "attention_words.h"

namespace qwen_rt {
namespace {

constexpr int kDotRows = 2;

// --- scores ----------------------------------------------------------------------------------------------------------

template <int U>
__m512 broadcast_unit(const float* p) {
  if constexpr (U == 1) return _mm512_set1_ps(*p);
  if constexpr (U == 2) {
    return _mm512_castpd_ps(_mm512_castsi512_pd(_mm512_set1_epi64(*reinterpret_cast<const long long*>(p))));
  }
  if constexpr (U == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
}

// Sums of neighbouring lanes: of a in the lower half of the result, of b in the upper.
__m512 add_neighbours(__m512 a, __m512 b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
}

// scores[r] = q[r] . keys, r < M, of 32 / kUnit keys whose units lie in 16 elements at a and 16 at b, 64 bytes a step;
// q [step][M][kUnit]. Meanwhile the rows `next` of a later tile, as many, are asked for.
template <class F, int M>
void score_panel(const float* q, const char* a, const char* b, int64_t steps, float* scores,
                 const typename F::T* const* next) {
  using T = typename F::T;
  constexpr int kUnit = F::kUnit;
  __m512 acc[M][2];
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 2
    for (int64_t i = s % 16; i < 32 / kUnit; i += 16) {
      prefetch_l2(reinterpret_cast<const char*>(next[i]) + s / 16 * 64);
    }
    const __m512 k0 = F::load(reinterpret_cast<const T*>(a + s * 64));
    const __m512 k1 = F::load(reinterpret_cast<const T*>(b + s * 64));
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
      const __m512 x = broadcast_unit<kUnit>(q + r * kUnit);
      acc[r][0] = _mm512_fmadd_ps(x, k0, acc[r][0]);
      acc[r][1] = _mm512_fmadd_ps(x, k1, acc[r][1]);
    }
    q += M * kUnit;
  }
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r) {
    float* to = scores + r * kTile;
    if constexpr (kUnit == 1) {
      _mm512_storeu_ps(to, acc[r][0]);
      _mm512_storeu_ps(to + 16, acc[r][1]);
    } else {
      const __m512 pairs = add_neighbours(acc[r][0], acc[r][1]);
      if constexpr (kUnit == 2) {
        _mm512_storeu_ps(to, pairs);
      } else {
        _mm256_storeu_ps(to, _mm512_castps512_ps256(add_neighbours(pairs, pairs)));
      }
    }
  }
}

// Lane i of the result is the sum of the lanes of x[i].
__m512 sum_each(const __m512 (&x)[16]) {
  __m512 a[8], b[4];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    b[i] =
        _mm512_add_ps(_mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44), _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
  }
  const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
  const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}

// scores[r][j] = q[r] . row j for R rows and the first n keys, rounded up to 16.
template <class F, int R>
void dot_rows(const CacheTile<F>& tile, const float* q, int64_t stride, int64_t size, int64_t n, float* scores,
              const CacheTile<F>& next) {
  constexpr int kKeys = 16 / R;
  for (int64_t j = 0; j < n; j += kKeys) {
    __m512 acc[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
    const auto add = [&](int64_t d, auto load) {
      __m512 x[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) x[r] = _mm512_loadu_ps(q + r * stride + d);
#pragma GCC unroll 16
      for (int c = 0; c < kKeys; ++c) {
        if (d % (64 / sizeof(typename F::T)) == 0) prefetch_l2(next.row[j + c] + d);
        const __m512 k = load(tile.row[j + c] + d);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) acc[r * kKeys + c] = _mm512_fmadd_ps(x[r], k, acc[r * kKeys + c]);
      }
    };
    int64_t d = 0;
    for (; d + 16 <= size; d += 16) add(d, [](const typename F::T* p) { return F::load(p); });
    if (d < size) {
      const __mmask16 m = first_lanes(size - d);
      add(d, [m](const typename F::T* p) { return F::load(p, m); });
    }
    float sums[16];
    _mm512_storeu_ps(sums, sum_each(acc));
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * kTile + j, sums + r * kKeys, kKeys * sizeof(float));
  }
}

// --- values ----------------------------------------------------------------------------------------------------------

// values: [key][stride] float32.
template <class F>
void pack_values(const CacheTile<F>& tile, int64_t n, int64_t size, int64_t stride, float* out,
                 const CacheTile<F>& next) {
  for (int64_t j = 0; j < n; ++j, out += stride) {
    next.prefetch(j, 1, size);
    for (int64_t d = 0; d < size; d += 16) {
      __m512 x = d + 16 <= size ? F::load(tile.row[j] + d) : F::load(tile.row[j] + d, first_lanes(size - d));
      if (kCoded<F>) x = _mm512_fmadd_ps(x, _mm512_set1_ps(tile.scale[j]), _mm512_set1_ps(tile.mid[j]));
      _mm512_storeu_ps(out + d, x);
    }
  }
}

// acc[r][0 : 16 N] = factor[r] out[r] + offset[r] + sum_j p[r][j] value_j, r < M; load(j, i) is vector i of value j.
template <int M, int N, class Load>
inline __attribute__((always_inline)) void add_values(const Load& load, const float* p, int64_t n, const float* factor,
                                                      const float* offset, float* out, int64_t stride) {
  __m512 acc[M][N];
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      acc[r][i] = _mm512_fmadd_ps(_mm512_set1_ps(factor[r]), _mm512_loadu_ps(out + r * stride + 16 * i),
                                  _mm512_set1_ps(offset[r]));
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    __m512 v[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) v[i] = load(j, i);
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
      const __m512 x = _mm512_set1_ps(p[r * kTile + j]);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) acc[r][i] = _mm512_fmadd_ps(x, v[i], acc[r][i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) _mm512_storeu_ps(out + r * stride + 16 * i, acc[r][i]);
  }
}

// Vectors of a value that a pass takes: M times as many sums and the vectors themselves fill at most 32 registers.
constexpr int wide(int rows) { return rows <= 7 ? 4 : 2; }

template <int M>
void add_packed(const float* values, const float* p, int64_t n, const float* factor, float* out, int64_t stride) {
  constexpr float kNone[kBlock] = {};
  int64_t d = 0;
  for (; d + 16 * wide(M) <= stride; d += 16 * wide(M)) {
    const auto load = [=](int64_t j, int i) { return _mm512_loadu_ps(values + j * stride + d + 16 * i); };
    add_values<M, wide(M)>(load, p, n, factor, kNone, out + d, stride);
  }
  for (; d < stride; d += 16) {
    const auto load = [=](int64_t j, int) { return _mm512_loadu_ps(values + j * stride + d); };
    add_values<M, 1>(load, p, n, factor, kNone, out + d, stride);
  }
}

template <class F, int M>
void add_cached(const CacheTile<F>& tile, const float* p, int64_t n, int64_t size, const float* factor,
                const float* offset, float* out, int64_t stride, const CacheTile<F>& next) {
  const typename F::T* const* rows = tile.row;
  int64_t d = 0;
  for (; d + 16 * wide(M) <= size; d += 16 * wide(M)) {
    const auto load = [=, &next](int64_t j, int i) {
      if (i == 0) {
        // Each pass over the rows asks for the lines of the next tile that hold the dims it computes.
        for (int b = 0; b < static_cast<int>(16 * wide(M) * sizeof(typename F::T)); b += 64) {
          prefetch_l2(reinterpret_cast<const char*>(next.row[j] + d) + b);
        }
      }
      return F::load(rows[j] + d + 16 * i);
    };
    add_values<M, wide(M)>(load, p, n, factor, offset, out + d, stride);
  }
  for (; d < size; d += 16) {
    const __mmask16 m = first_lanes(size - d);
    const auto load = [=](int64_t j, int) { return F::load(rows[j] + d, m); };
    add_values<M, 1>(load, p, n, factor, offset, out + d, stride);
  }
}

// --- softmax ---------------------------------------------------------------------------------------------------------

// Scores of m rows and 64 keys become weights 2^(s - max); the factors of what was summed before go to `factor`.
//   visible[r]   bit j: key j of the tile is visible to row r; null: all are to all
//   q_sum, keys  coded keys: s = s * scale + q_sum * mid first
//   values       coded values, not null: weights times scale, offset[r] = sum_j weight * mid
// max [m], sum [m][16]: the running maximum and the lanes of the running sum.
template <class F>
void softmax(int m, float* s, const uint64_t* visible, const CacheTile<F>& keys, const float* q_sum,
             const CacheTile<F>* values, float* max, float* sum, float* factor, float* offset) {
  constexpr int kVectors = kTile / 16;
  const __m512 here = settle(m, s, visible, [&](int r, int i, __m512 x) {
    if (!kCoded<F>) return x;
    const __m512 low = _mm512_mul_ps(_mm512_set1_ps(q_sum[r]), _mm512_loadu_ps(keys.mid + 16 * i));
    return _mm512_fmadd_ps(x, _mm512_loadu_ps(keys.scale + 16 * i), low);
  });
  alignas(64) float top[16];
  _mm512_store_ps(top, raise(m, here, max, factor));
  for (int r = 0; r < m; ++r) {
    const __m512 subtract = _mm512_set1_ps(top[r]);
    __m512 total = _mm512_mul_ps(_mm512_set1_ps(factor[r]), _mm512_loadu_ps(sum + 16 * r));
    __m512 low = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      float* at = s + r * kTile + 16 * i;
      __m512 e = exp2_nonpositive(_mm512_sub_ps(_mm512_loadu_ps(at), subtract));
      total = _mm512_add_ps(total, e);
      if (kCoded<F> && values) {
        low = _mm512_fmadd_ps(e, _mm512_loadu_ps(values->mid + 16 * i), low);
        e = _mm512_mul_ps(e, _mm512_loadu_ps(values->scale + 16 * i));
      }
      _mm512_storeu_ps(at, e);
    }
    _mm512_storeu_ps(sum + 16 * r, total);
    if (kCoded<F> && values) offset[r] = _mm512_reduce_add_ps(low);
  }
}

// --- the kernel ------------------------------------------------------------------------------------------------------

// What is compiled for each number of rows of a block.
template <class F>
struct Rows {
  void (*score)(const float*, const char*, const char*, int64_t, float*, const typename F::T* const*);
  void (*add_packed)(const float*, const float*, int64_t, const float*, float*, int64_t);
  void (*add_cached)(const CacheTile<F>&, const float*, int64_t, int64_t, const float*, const float*, float*, int64_t,
                     const CacheTile<F>&);
};

template <class F, int M>
constexpr Rows<F> kRows = {score_panel<F, M>, add_packed<M>, add_cached<F, M>};

template <class F>
constexpr Rows<F> kRowsOf[kBlock + 1] = {
    {},          kRows<F, 1>, kRows<F, 2>, kRows<F, 3>,  kRows<F, 4>,  kRows<F, 5>, kRows<F, 6>,
    kRows<F, 7>, kRows<F, 8>, kRows<F, 9>, kRows<F, 10>, kRows<F, 11>, kRows<F, 12>};

template <class F>
void attend(const AttentionTile& t) {
  static_assert(kTile == 64, "a tile is the bits of a word");
  constexpr int kUnit = F::kUnit, kKeys = 32 / kUnit;  // keys of two vectors
  const int64_t size = t.kv->size, steps = steps_of<F>(size);
  const int64_t panel = steps_of<F>(t.stride) * 4;  // bytes of a panel a key
  const int64_t blocks = (t.rows + kBlock - 1) / kBlock;
  const bool cached = blocks == 1, dots = t.rows <= kDotRows;
  float* const zeros = t.scratch;
  char* const key_panels = reinterpret_cast<char*>(zeros + t.stride);
  float* const value_panel = zeros + (1 + kTile) * t.stride;
  float* const scores = value_panel + kTile * t.stride;
  float* const sums = scores + kBlock * kTile;
  float* const queries = sums + t.rows * 16;  // by blocks of M rows: [step][M][kUnit]
  float* const q_sums = queries + t.rows * t.stride;
  auto* const positions = reinterpret_cast<int32_t*>(q_sums + t.rows);
  std::memset(zeros, 0, static_cast<size_t>(t.stride) * sizeof(float));
  std::memset(t.out, 0, static_cast<size_t>(t.rows * t.stride) * sizeof(float));
  std::memset(sums, 0, static_cast<size_t>(t.rows) * 16 * sizeof(float));
  const auto rows_of = [&](int64_t b) { return t.rows / blocks + (b < t.rows % blocks); };
  for (int64_t b = 0, r0 = 0, m; b < blocks; ++b, r0 += m) {
    m = rows_of(b);
    for (int64_t r = 0; r < m; ++r) {
      const float* q = t.q + (r0 + r) * t.stride;
      float* to = queries + r0 * t.stride + r * kUnit;
      float total = 0.0f;
      for (int64_t d = 0; kCoded<F> && d < size; ++d) total += q[d];
      q_sums[r0 + r] = total;
      t.max[r0 + r] = -INFINITY;
      positions[r0 + r] = static_cast<int32_t>(t.first_pos + (r0 + r) / t.group);
      if (dots) continue;
      for (int64_t s = 0; s < steps; ++s) std::memcpy(to + s * m * kUnit, q + s * kUnit, kUnit * sizeof(float));
    }
  }
  CacheTile<F> keys[2], values[2];
  keys[0].locate(t, t.kv->k, t.begin, zeros);
  values[0].locate(t, t.kv->v, t.begin, zeros);
  values[0].prefetch(0, kTile, size);
  int which = 0;
  for (int64_t begin = t.begin; begin < t.end; begin += kTile, which ^= 1) {
    const int64_t n = smaller(kTile, t.end - begin);
    const CacheTile<F>&k = keys[which], &v = values[which], &next_v = values[which ^ 1], &next_k = keys[which ^ 1];
    keys[which ^ 1].locate(t, t.kv->k, begin + kTile, zeros);
    values[which ^ 1].locate(t, t.kv->v, begin + kTile, zeros);
    if (!cached) {
      for (int64_t j = 0; j < n; j += 16) pack_keys(k, j, size, key_panels + j * panel);
      pack_values(v, n, size, t.stride, value_panel, next_v);
    }
    for (int64_t b = 0, r0 = 0, m; b < blocks; ++b, r0 += m) {
      m = rows_of(b);
      const Sight sight(t.window, n, m, [&](int64_t r) { return positions[r0 + r] - begin; });
      const int64_t high = sight.high;
      if (high == 0) continue;
      const Rows<F>& rows = kRowsOf<F>[m];
      if (dots) {
        (m == 1 ? dot_rows<F, 1> : dot_rows<F, 2>)(k, t.q, t.stride, size, high, scores, next_k);
      } else {
        for (int64_t j = 0; j < high; j += kKeys) {
          const char* at = key_panels + j / 16 * 16 * panel + j % 16 * kUnit * sizeof(typename F::T);
          if (cached && j % 16 == 0) {
            for (int64_t i = j; i < j + larger(16, kKeys); i += 16) {
              pack_keys(k, i, size, key_panels + i * panel);
            }
          }
          rows.score(queries + r0 * t.stride, at, at + (kUnit == 1 ? 16 * panel : 16 * sizeof(typename F::T)), steps,
                     scores + j, next_k.row + j);
        }
      }
      float factor[kBlock], offset[kBlock] = {};
      softmax(static_cast<int>(m), scores, sight.bits(), k, q_sums + r0, cached ? &v : nullptr, t.max + r0,
              sums + r0 * 16, factor, offset);
      float* const out = t.out + r0 * t.stride;
      if (cached) {
        rows.add_cached(v, scores, high, size, factor, offset, out, t.stride, next_v);
      } else {
        rows.add_packed(value_panel, scores, high, factor, out, t.stride);
      }
    }
  }
  for (int64_t r = 0; r < t.rows; ++r) t.sum[r] = _mm512_reduce_add_ps(_mm512_loadu_ps(sums + 16 * r));
}

}  // namespace

void attend_avx512(const AttentionTile& tile) {
  if (tile.rows > kDotRows && attend_int8_serves(tile)) return attend_int8_avx512(tile);
  if (tile.rows > kBlock && words_serve(*tile.kv)) return attend_words_avx512(tile);
  attend_for(tile.kv->type, attend<Float32>, attend<Float16>, attend<BFloat16>, attend<Int8>)(tile);
}

}  // namespace qwen_rt

#endif
