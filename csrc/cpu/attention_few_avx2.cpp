// Decoding: scores and weighted values of a few query rows, up to 8 at a time, straight from the cache. Keys meet the rows
// in dot products, values row by row; each conversion serves all rows, and lanes are rows in between.
#if defined(__x86_64__)

#include "attention_avx2.h"

namespace qwen_rt {
namespace {

constexpr int kPassRows = 8;

// The next tile's rows, asked for evenly by all the passes over this one: memory takes longer than one pass to give them.
template <class F>
class Ahead {
 public:
  Ahead(const CacheTile<F>& tile, int64_t size, int64_t passes) : tile_(tile), size_(size) {
    while ((int64_t{1} << shift_) < passes) ++shift_;
  }
  // While `keys` keys from the j-th on are multiplied.
  void ask(int64_t j, int64_t keys) const {
    const int64_t begin = (at_ + j) >> shift_, end = (at_ + j + keys) >> shift_;
    if (begin < end) tile_.prefetch(begin, end - begin, size_);
  }
  void pass_done() { at_ += kTile; }

 private:
  const CacheTile<F>& tile_;
  const int64_t size_;
  int shift_ = 0;   // 2^shift_ passes, or a little fewer
  int64_t at_ = 0;  // kTile times the passes done
};

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

// Rows of a pass over a tile, R at most kPassRows. Their scores are vectors, one for each kKeys keys, whose lane
// r * kKeys + c belongs to row r and the c-th of these keys: no softmax has to look across lanes.
struct FewRows {
  const float* q;
  float* out;
  int64_t pos[2];            // of the first row and the last
  __m256 max, sum, q_sum;    // by lane
  __m256i lane_pos;          // of its row, less c
};

constexpr int keys_of(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : rows <= 4 ? 2 : 1; }

// Vectors of values that R rows take at a time: enough sums in flight to hide the latency of an FMA.
constexpr int wide_values(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : rows <= 6 ? 2 : 1; }

// Lane i: x[i % kKeys].
template <int kKeys>
__m256 of_keys(const float* x) {
  if constexpr (kKeys == 8) return _mm256_loadu_ps(x);
  if constexpr (kKeys == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x));
  if constexpr (kKeys == 2) return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(x)));
  return _mm256_broadcast_ss(x);
}

// Each lane becomes what `both` makes of all lanes of its row.
template <int kKeys, class Both>
__m256 of_rows(__m256 x, const Both& both) {
  if constexpr (kKeys >= 2) x = both(x, _mm256_permute_ps(x, 0xb1));
  if constexpr (kKeys >= 4) x = both(x, _mm256_permute_ps(x, 0x4e));
  if constexpr (kKeys >= 8) x = both(x, _mm256_permute2f128_ps(x, x, 1));
  return x;
}

__m256 most(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
__m256 plus(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }

// q[r] . row (coded: . codes) for R rows and keys_of(R) keys from the j-th on.
template <class F, int R>
__m256 dot_rows(const CacheTile<F>& tile, int64_t j, const float* q, int64_t stride, int64_t size) {
  constexpr int kKeys = keys_of(R);
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
  return sum_each(acc);
}

// out[r][0:8N] = factor[r] out[r][0:8N] + offset[r] + sum_j p[r][j] row_j[0:8N], r < R; dims start at d; n a multiple of 4;
// p, factor, offset by lane.
template <class F, int R, int N>
void add_values(const CacheTile<F>& tile, const float* p, int64_t n, int64_t d, const float* factor, const float* offset,
                float* out, int64_t stride, const Ahead<F>& next) {
  constexpr int kKeys = keys_of(R);
  __m256 acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      acc[r][i] = _mm256_fmadd_ps(_mm256_set1_ps(factor[r * kKeys]), _mm256_loadu_ps(out + r * stride + d + 8 * i),
                                  _mm256_set1_ps(offset[r * kKeys]));
    }
  }
  for (int64_t j = 0; j < n; j += 4) {
    next.ask(j, 4);
#pragma GCC unroll 4
    for (int64_t key = j; key < j + 4; ++key) {
      const float* weight = p + key / kKeys * 8 + key % kKeys;
      __m256 v[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) v[i] = F::load(tile.row[key] + d + 8 * i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256 x = _mm256_broadcast_ss(weight + r * kKeys);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) acc[r][i] = _mm256_fmadd_ps(x, v[i], acc[r][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) _mm256_storeu_ps(out + r * stride + d + 8 * i, acc[r][i]);
  }
}

// R rows over a tile of n keys that begins at `begin`; p: room for the scores.
template <class F, int R>
void few_rows(const AttentionTile& t, FewRows& rows, const CacheTile<F>& keys, const CacheTile<F>& values, int64_t begin,
              int64_t n, float* p, Ahead<F>& values_ahead, Ahead<F>& keys_ahead) {
  constexpr int kKeys = keys_of(R);
  const int64_t size = t.kv->size, high = smaller(n, rows.pos[1] + 1 - begin), window = t.window;
  if (high <= 0 || (window > 0 && rows.pos[0] - window + 1 >= begin + n)) return;
  const int64_t columns = (high + kKeys - 1) / kKeys * kKeys;
  const bool all_seen = columns <= smaller(n, rows.pos[0] + 1 - begin) && (window == 0 || rows.pos[1] - window < begin);
  const __m256i oldest = _mm256_set1_epi32(static_cast<int>(window - 1));
  __m256 top = rows.max;
  for (int64_t j = 0; j < columns; j += kKeys) {
    values_ahead.ask(j, kKeys);
    __m256 s = dot_rows<F, R>(keys, j, rows.q, t.stride, size);
    if constexpr (F::kCoded) {
      s = _mm256_fmadd_ps(s, of_keys<kKeys>(keys.scale + j), _mm256_mul_ps(rows.q_sum, of_keys<kKeys>(keys.min + j)));
    }
    if (!all_seen) {  // a key is seen at the ages 0 .. window - 1
      const __m256i age = _mm256_sub_epi32(rows.lane_pos, _mm256_set1_epi32(static_cast<int>(begin + j)));
      __m256i hidden = _mm256_cmpgt_epi32(_mm256_setzero_si256(), age);
      if (window > 0) hidden = _mm256_or_si256(hidden, _mm256_cmpgt_epi32(age, oldest));
      s = _mm256_blendv_ps(s, _mm256_set1_ps(-INFINITY), _mm256_castsi256_ps(hidden));
    }
    top = _mm256_max_ps(top, s);
    _mm256_storeu_ps(p + j / kKeys * 8, s);
  }
  values_ahead.pass_done();
  top = of_rows<kKeys>(top, most);
  const __m256 nothing = _mm256_cmp_ps(top, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ);  // visible yet: all weights are 0
  const __m256 base = _mm256_andnot_ps(nothing, top);
  __m256 total = _mm256_setzero_ps(), low = total;
  for (int64_t j = 0; j < columns; j += kKeys) {
    __m256 e = exp2_near(_mm256_sub_ps(_mm256_loadu_ps(p + j / kKeys * 8), base));
    total = _mm256_add_ps(total, e);
    if constexpr (F::kCoded) {
      low = _mm256_fmadd_ps(e, of_keys<kKeys>(values.min + j), low);
      e = _mm256_mul_ps(e, of_keys<kKeys>(values.scale + j));
    }
    _mm256_storeu_ps(p + j / kKeys * 8, e);
  }
  const int64_t rounded = (columns + 3) / 4 * 4;
  for (int64_t j = columns; j < rounded; j += kKeys) _mm256_storeu_ps(p + j / kKeys * 8, _mm256_setzero_ps());
  const __m256 shrink = exp2_near(_mm256_sub_ps(rows.max, base));
  rows.max = top;
  rows.sum = _mm256_fmadd_ps(rows.sum, shrink, total);
  float factor[8], offset[8];
  _mm256_storeu_ps(factor, shrink);
  _mm256_storeu_ps(offset, of_rows<kKeys>(low, plus));
  constexpr int kWide = wide_values(R);
  int64_t d = 0;
  for (; d + 8 * kWide <= size; d += 8 * kWide, keys_ahead.pass_done()) {
    add_values<F, R, kWide>(values, p, rounded, d, factor, offset, rows.out, t.stride, keys_ahead);
  }
  if constexpr (kWide > 2) {
    for (; d < size; d += 16, keys_ahead.pass_done()) {
      add_values<F, R, 2>(values, p, rounded, d, factor, offset, rows.out, t.stride, keys_ahead);
    }
  }
}

// All rows, at most kFewRows; size a multiple of 16.
template <class F>
void attend_few(const AttentionTile& t) {
  using Pass = void (*)(const AttentionTile&, FewRows&, const CacheTile<F>&, const CacheTile<F>&, int64_t, int64_t, float*,
                        Ahead<F>&, Ahead<F>&);
  constexpr Pass kPass[kPassRows + 1] = {nullptr,        few_rows<F, 1>, few_rows<F, 2>, few_rows<F, 3>, few_rows<F, 4>,
                                         few_rows<F, 5>, few_rows<F, 6>, few_rows<F, 7>, few_rows<F, 8>};
  const int64_t size = t.kv->size;
  float* const p = t.scratch + t.stride;  // after the row of zeros
  std::memset(t.scratch, 0, static_cast<size_t>(t.stride) * sizeof(float));
  std::memset(t.out, 0, static_cast<size_t>(t.rows * t.stride) * sizeof(float));
  FewRows passes[kFewRows / kPassRows];
  const int64_t count = (t.rows + kPassRows - 1) / kPassRows, most_rows = (t.rows + count - 1) / count;
  const auto rows_of = [&](int64_t i) { return static_cast<int>(smaller(most_rows, t.rows - i * most_rows)); };
  int64_t value_passes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int m = rows_of(i), keys = keys_of(m), wide = 8 * wide_values(m);
    const int64_t r0 = i * most_rows;
    const auto pos = [&](int64_t r) { return t.first_pos + (r0 + r) / t.group; };
    int32_t lane_pos[8];
    float sums[8];
    for (int lane = 0; lane < 8; ++lane) {
      const int64_t r = smaller(lane / keys, m - 1);
      lane_pos[lane] = static_cast<int32_t>(pos(r) - lane % keys);
      sums[lane] = lane > 0 ? sums[lane - 1] : 0.0f;
      if (!F::kCoded || lane % keys != 0 || lane / keys != r) continue;
      sums[lane] = 0.0f;
      for (int64_t d = 0; d < size; ++d) sums[lane] += t.q[(r0 + r) * t.stride + d];
    }
    passes[i] = {t.q + r0 * t.stride,
                 t.out + r0 * t.stride,
                 {pos(0), pos(m - 1)},
                 _mm256_set1_ps(-INFINITY),
                 _mm256_setzero_ps(),
                 _mm256_loadu_ps(sums),
                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane_pos))};
    value_passes += size / wide + size % wide / 16;
  }
  CacheTile<F> key_tiles[2], value_tiles[2];  // this one and the next
  const auto locate = [&](int which, int64_t begin) {
    const int64_t n = larger(0, smaller(kTile, t.end - begin));
    key_tiles[which].locate(t, t.kv->k, begin, n);
    value_tiles[which].locate(t, t.kv->v, begin, n);
  };
  locate(0, t.begin);
  int which = 0;
  for (int64_t begin = t.begin; begin < t.end; begin += kTile, which ^= 1) {
    locate(which ^ 1, begin + kTile);
    Ahead<F> keys_ahead(key_tiles[which ^ 1], size, value_passes), values_ahead(value_tiles[which ^ 1], size, count);
    for (int64_t i = 0; i < count; ++i) {
      kPass[rows_of(i)](t, passes[i], key_tiles[which], value_tiles[which], begin, smaller(kTile, t.end - begin), p,
                        values_ahead, keys_ahead);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int keys = keys_of(rows_of(i));
    float max[8], sum[8];
    _mm256_storeu_ps(max, passes[i].max);
    _mm256_storeu_ps(sum, passes[i].sum);
    for (int r = 0; r < rows_of(i); ++r) {
      t.max[i * most_rows + r] = max[r * keys];
      float all = 0.0f;
      for (int c = 0; c < keys; ++c) all += sum[r * keys + c];
      t.sum[i * most_rows + r] = all;
    }
  }
}

}  // namespace

void attend_few_avx2(const AttentionTile& tile) {
  attend_for(tile.kv->type, attend_few<Float32>, attend_few<Float16>, attend_few<BFloat16>, attend_few<Int8>)(tile);
}

}  // namespace qwen_rt

#endif
