// An int8 cache met as bytes, for heads of a multiple of 64 dims: both products are sums of byte products in int32.
//   scores  queries are integers of kSteps16 steps a row, as two signed bytes; keys are transposed by units of 4 dims.
//   values  weights times their key's scale are integers of kWeightSteps steps a row and tile, as two unsigned bytes;
//           four values' bytes are interleaved, which leaves the dims of 64 in another order until the end (Panel).
// Byte products are exact; what is rounded, beside attention.h's float32, with p_t the largest weight of tile t:
//   |error| of a score <= max|q| / (2 kSteps16) * sum_d |k_d - mid|,
//   |error| of an output <= sum_t p_t * max scale * kTile * 128 / (2 kWeightSteps) / sum p <= max scale / 16.
// The step of weights is found from the tile's largest score and its largest scale before they are computed.
#if defined(__x86_64__)

#include "attention_avx512.h"
#include "attention_integers_avx512.h"

namespace qwen_rt {
namespace {

constexpr float kWeightSteps = 65280.0f;  // 255 * 256
constexpr int64_t kChunk = 64;            // dims whose order is one of Panel

// 16 sums of byte products. Not __m512i: GCC 12 takes its lanes for 64 bits and spills sums of 32.
typedef int32_t Sums __attribute__((vector_size(64)));

inline Sums products(Sums sum, __m512i bytes, __m512i signed_bytes) {
  return (Sums)_mm512_dpbusd_epi32((__m512i)sum, bytes, signed_bytes);
}

inline __m512 both_planes(Sums upper, Sums lower) { return _mm512_cvtepi32_ps((__m512i)(upper * 256 + lower)); }

__m512i load512(const void* p) { return _mm512_loadu_si512(p); }

__m512i word_of(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

// --- queries ---------------------------------------------------------------------------------------------------------

// A row as two planes, upper bytes and lower; to[step][2 M][4] from the row's own place in it. Returns the row's step.
struct Query {
  float step, sum;         // sum: of the row as it is
  int32_t start[2];  // what codes that are 128 too large add to a plane's products, negated
};

Query quantize_query(const float* q, int64_t size, int m, int8_t* to) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i top = _mm512_setzero_si512(), upper_sum = top, lower_sum = top;
  __m512 sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < size; d += 16) {
    top = _mm512_max_epi32(top, _mm512_and_si512(load512(q + d), magnitude));
    sum = _mm512_add_ps(sum, _mm512_loadu_ps(q + d));
  }
  const int32_t bits = _mm512_reduce_max_epi32(top);
  float most;
  std::memcpy(&most, &bits, 4);
  const __m512 inverse = _mm512_set1_ps(most > kTiny ? kSteps16 / most : 0.0f);
  for (int64_t d = 0; d < size; d += 16) {
    const __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(q + d), inverse));
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
    const __m512i lower = _mm512_sub_epi32(x, _mm512_slli_epi32(upper, 8));
    upper_sum = _mm512_add_epi32(upper_sum, upper);
    lower_sum = _mm512_add_epi32(lower_sum, lower);
    alignas(16) int32_t words[2][4];
    _mm_store_si128(reinterpret_cast<__m128i*>(words[0]), _mm512_cvtepi32_epi8(upper));
    _mm_store_si128(reinterpret_cast<__m128i*>(words[1]), _mm512_cvtepi32_epi8(lower));
    for (int i = 0; i < 4; ++i) {
      int8_t* unit = to + (d / 4 + i) * 2 * m * 4;
      std::memcpy(unit, &words[0][i], 4);
      std::memcpy(unit + 4, &words[1][i], 4);
    }
  }
  return {most < INFINITY ? most / kSteps16 : NAN, _mm512_reduce_add_ps(sum),
          {-128 * _mm512_reduce_add_epi32(upper_sum), -128 * _mm512_reduce_add_epi32(lower_sum)}};
}

// --- scores ----------------------------------------------------------------------------------------------------------

// scores[r] = integer product of row r < M with 16 keys of a panel [step][16][4]; meanwhile the rows `next` of a later
// tile are asked for.
template <int M>
void score_bytes(const int8_t* q, const Query* rows, const char* panel, int64_t steps, float* scores,
                 const uint8_t* const* next) {
  Sums acc[2 * M];
#pragma GCC unroll 24
  for (int i = 0; i < 2 * M; ++i) acc[i] = Sums{} + rows[i / 2].start[i % 2];
  for (int64_t s = 0; s < steps; ++s) {
    prefetch_l2(next[s % 16] + s / 16 * 64);
    const __m512i keys = load512(panel + s * 64);
#pragma GCC unroll 24
    for (int i = 0; i < 2 * M; ++i) acc[i] = products(acc[i], keys, word_of(q + 4 * i));
    q += 2 * M * 4;
  }
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) {
    _mm512_storeu_ps(scores + r * kTile, both_planes(acc[2 * r], acc[2 * r + 1]));
  }
}

// --- weights ---------------------------------------------------------------------------------------------------------

// Integer scores of m rows and 64 keys become weights: bytes [row][upper, lower][key], their unit, and what else goes
// into the outputs: `factor` of what was summed before, `offset` for the middles of the values.
void softmax_bytes(int m, float* scores, const uint64_t* visible, const CacheTile<Int8>& keys, const Query* rows,
                   const CacheTile<Int8>& values, float* max, float* sum, uint8_t* weights, float* unit, float* factor,
                   float* offset) {
  const __m512 here = settle(m, scores, visible, [&](int r, int i, __m512 x) {
    const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(keys.scale + 16 * i), _mm512_set1_ps(rows[r].step));
    const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(keys.mid + 16 * i), _mm512_set1_ps(rows[r].sum));
    return _mm512_fmadd_ps(x, scale, low);
  });
  const __m512 base = raise(m, here, max, factor);
  weigh(m, scores, here, base, {values.scale, values.mid}, kWeightSteps, factor, sum, unit, offset,
        [&](int r, int i, __m512i codes) {
          uint8_t* to = weights + r * 2 * kTile + 16 * i;
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_srli_epi32(codes, 8)));
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kTile), _mm512_cvtepi32_epi8(codes));
        });
}

// --- values ----------------------------------------------------------------------------------------------------------

// A tile's values, minus 128, to a panel [4 keys][size / 16][16 dims][4 keys]. The 16 dims of vector i of a chunk are
// 16 L + 4 i + e, L < 4, e < 4.
void pack_values_bytes(const CacheTile<Int8>& tile, int64_t n, int64_t size, char* panel) {
  const __m512i sign = _mm512_set1_epi8(-128);
  for (int64_t j = 0; j < n; j += 4) {
    for (int64_t d = 0; d < size; d += kChunk, panel += 4 * kChunk) {
      __m512i x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        x[i] = _mm512_xor_si512(load512(tile.row[j + i] + d), sign);
      }
      const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
      const __m512i c = _mm512_unpacklo_epi8(x[2], x[3]), e = _mm512_unpackhi_epi8(x[2], x[3]);
      _mm512_storeu_si512(panel, _mm512_unpacklo_epi16(a, c));
      _mm512_storeu_si512(panel + 64, _mm512_unpackhi_epi16(a, c));
      _mm512_storeu_si512(panel + 128, _mm512_unpacklo_epi16(b, e));
      _mm512_storeu_si512(panel + 192, _mm512_unpackhi_epi16(b, e));
    }
  }
}

// Vectors of the panel that a pass takes: two sums a row and vector, and the vectors, fill at most 32 registers.
constexpr int pass_of(int rows) { return rows <= 3 ? 4 : rows <= 7 ? 2 : 1; }

// out[r] = factor[r] out[r] + offset[r] + unit[r] * integer product of weights and n values, r < M, for N vectors from
// `panel` and `out` on. Meanwhile as many of each four rows at `next` are asked for.
template <int M, int N>
void add_pass(const char* panel, int64_t size, int64_t n, const uint8_t* weights, const float* unit,
              const float* factor, const float* offset, float* out, int64_t stride, const uint8_t* const* next,
              int64_t ahead) {
  Sums acc[2 * M][N];
#pragma GCC unroll 24
  for (int i = 0; i < 2 * M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) acc[i][v] = Sums{};
  }
  for (int64_t j = 0; j < n; j += 4, panel += 4 * size) {
    __m512i values[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      prefetch_l2(next[j + v] + ahead);
      values[v] = load512(panel + 64 * v);
    }
#pragma GCC unroll 24
    for (int i = 0; i < 2 * M; ++i) {
      const __m512i w = word_of(weights + i * kTile + j);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) acc[i][v] = products(acc[i][v], w, values[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      float* to = out + r * stride + 16 * v;
      const __m512 before = _mm512_fmadd_ps(_mm512_set1_ps(factor[r]), _mm512_loadu_ps(to), _mm512_set1_ps(offset[r]));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(unit[r]), both_planes(acc[2 * r][v], acc[2 * r + 1][v]), before));
    }
  }
}

template <int M>
void add_bytes(const char* panel, int64_t size, int64_t n, const uint8_t* weights, const float* unit,
               const float* factor, const float* offset, float* out, int64_t stride, const uint8_t* const* next) {
  constexpr int N = pass_of(M);
  for (int64_t d = 0; d < size; d += 16 * N) {
    const uint8_t* const* rows = next + d % kChunk / 16;
    add_pass<M, N>(panel + d * 4, size, n, weights, unit, factor, offset, out + d, stride, rows, d / kChunk * kChunk);
  }
}

// The dims of a row's chunks back in order.
void order(float* out, int64_t size) {
  for (int64_t d = 0; d < size; d += kChunk, out += kChunk) {
    __m512 x[4], a[4];
    for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_ps(out + 16 * i);
    a[0] = _mm512_shuffle_f32x4(x[0], x[1], 0x44);  // x0 lanes 0, 1; x1 lanes 0, 1
    a[1] = _mm512_shuffle_f32x4(x[0], x[1], 0xee);
    a[2] = _mm512_shuffle_f32x4(x[2], x[3], 0x44);
    a[3] = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
    _mm512_storeu_ps(out, _mm512_shuffle_f32x4(a[0], a[2], 0x88));
    _mm512_storeu_ps(out + 16, _mm512_shuffle_f32x4(a[0], a[2], 0xdd));
    _mm512_storeu_ps(out + 32, _mm512_shuffle_f32x4(a[1], a[3], 0x88));
    _mm512_storeu_ps(out + 48, _mm512_shuffle_f32x4(a[1], a[3], 0xdd));
  }
}

// --- the kernel ------------------------------------------------------------------------------------------------------

struct RowsOfBytes {
  void (*score)(const int8_t*, const Query*, const char*, int64_t, float*, const uint8_t* const*);
  void (*add)(const char*, int64_t, int64_t, const uint8_t*, const float*, const float*, const float*, float*, int64_t,
              const uint8_t* const*);
};

template <int M>
constexpr RowsOfBytes kBytes = {score_bytes<M>, add_bytes<M>};

constexpr RowsOfBytes kBytesOf[kBlock + 1] = {{},        kBytes<1>, kBytes<2>, kBytes<3>,  kBytes<4>,  kBytes<5>, kBytes<6>,
                                              kBytes<7>, kBytes<8>, kBytes<9>, kBytes<10>, kBytes<11>, kBytes<12>};

}  // namespace

bool attend_int8_serves(const AttentionTile& t) {
  return t.kv->type == KvType::kInt8 && t.kv->size % kChunk == 0 && t.kv->size <= 256;
}

void attend_int8_avx512(const AttentionTile& t) {
  const int64_t size = t.kv->size, steps = size / 4, blocks = (t.rows + kBlock - 1) / kBlock;
  float* const zeros = t.scratch;
  char* const key_panels = reinterpret_cast<char*>(zeros + t.stride);
  char* const value_panel = key_panels + kTile * size;
  float* const scores = reinterpret_cast<float*>(value_panel + kTile * size);
  auto* const weights = reinterpret_cast<uint8_t*>(scores + kBlock * kTile);
  float* const sums = reinterpret_cast<float*>(weights + kBlock * 2 * kTile);
  auto* const queries = reinterpret_cast<int8_t*>(sums + t.rows * 16);  // by blocks of M rows: [step][2 M][4]
  auto* const rows = reinterpret_cast<Query*>(queries + t.rows * 2 * size);
  std::memset(zeros, 0, static_cast<size_t>(t.stride) * sizeof(float));
  std::memset(t.out, 0, static_cast<size_t>(t.rows * t.stride) * sizeof(float));
  std::memset(sums, 0, static_cast<size_t>(t.rows) * 16 * sizeof(float));
  const auto rows_of = [&](int64_t b) { return t.rows / blocks + (b < t.rows % blocks); };
  for (int64_t b = 0, r0 = 0, m; b < blocks; ++b, r0 += m) {
    m = rows_of(b);
    for (int64_t r = 0; r < m; ++r) {
      rows[r0 + r] = quantize_query(t.q + (r0 + r) * t.stride, size, static_cast<int>(m),
                                    queries + r0 * 2 * size + r * 8);
      t.max[r0 + r] = -INFINITY;
    }
  }
  CacheTile<Int8> keys[2], values[2];
  keys[0].locate(t, t.kv->k, t.begin, zeros);
  values[0].locate(t, t.kv->v, t.begin, zeros);
  values[0].prefetch(0, kTile, size);
  int which = 0;
  for (int64_t begin = t.begin; begin < t.end; begin += kTile, which ^= 1) {
    const int64_t n = smaller(kTile, t.end - begin);
    const CacheTile<Int8>&k = keys[which], &v = values[which], &next_v = values[which ^ 1], &next_k = keys[which ^ 1];
    keys[which ^ 1].locate(t, t.kv->k, begin + kTile, zeros);
    values[which ^ 1].locate(t, t.kv->v, begin + kTile, zeros);
    for (int64_t j = 0; j < n; j += 16) pack_keys(k, j, size, key_panels + j * size);
    pack_values_bytes(v, n, size, value_panel);
    for (int64_t b = 0, r0 = 0, m; b < blocks; ++b, r0 += m) {
      m = rows_of(b);
      const Sight sight(t.window, n, m, [&](int64_t r) { return t.first_pos + (r0 + r) / t.group - begin; });
      if (sight.high == 0) continue;
      for (int64_t j = 0; j < sight.high; j += 16) {
        kBytesOf[m].score(queries + r0 * 2 * size, rows + r0, key_panels + j * size, steps, scores + j, next_k.row + j);
      }
      float unit[kBlock], factor[kBlock], offset[kBlock];
      softmax_bytes(static_cast<int>(m), scores, sight.bits(), k, rows + r0, v, t.max + r0, sums + r0 * 16,
                    weights, unit, factor, offset);
      kBytesOf[m].add(value_panel, size, sight.high, weights, unit, factor, offset, t.out + r0 * t.stride, t.stride,
                      next_v.row);
    }
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    t.sum[r] = _mm512_reduce_add_ps(_mm512_loadu_ps(sums + 16 * r));
    order(t.out + r * t.stride, size);
  }
}

}  // namespace qwen_rt

#endif
