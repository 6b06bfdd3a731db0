// Paged attention for few query rows a sequence (decode), split over the context, and the merge of the splits. See
// attention_common.cuh for the formula, the arguments and what a block works on.
//
//   attention_decode_{f16,bf16}_{kv16,kv8}_d{64,128}   head sizes up to 64, 128 that are multiples of 8: matrix unit where
//                                                      there is one for the type, else SIMT
//   attention_decode_{f16,bf16}_{kv16,kv8}_any         any head size up to 256: SIMT
//     grid (splits, Hkv, items), four warps, no dynamic shared memory; an item has up to 16 rows
//   attention_merge_{f16,bf16}                         grid (max_rows, Hkv, items), 128 threads
//
// The grid depends on the number of splits only, so that a captured step may be replayed on longer contexts: a split is
// an equal share of the keys the item sees at the time, and one without keys leaves a max of -infinity and exits.
//
// Matrix unit: the block's four warps take turns at 16 keys (int8: 32), straight from global memory to fragments, and
// meet only at the end. Every byte of K and V is read once for all query heads of the group, 16 (int8: 8) bytes a lane;
// per 16 keys of 128 elements a warp has 8 KiB on the way. Error: attention_mma.cuh.
// SIMT: ceil(D / 8) lanes, rounded up to a power of two, share a key; a lane holds 8 elements of q and of the sum of p v
// in float32 for up to 8 rows at a time (more rows read the keys again). Error, u32 = 2^-24:
//   |error| <= (4 (D + 12) u32 s_max + (n + 96) u32) sum_j p_j |v_j|, and the rounding of the result to 16 bits,
// s_max as in attention_mma.cuh.
#include "attention_common.cuh"
#include "attention_mma.cuh"

namespace qrt {
namespace attention {

#if QRT_HAS_MMA

template <class T, bool Int8, int Dp>
QRT_DEVICE void decode_mma(const Args<T>& a, const Partial& part) {
  constexpr int kSteps = Int8 ? 2 : 1;
  constexpr int kKeys = 16 * kSteps;
  using Rows = WarpRows<T, Int8, Dp>;
  __shared__ SplitStat<kSplitRows> stat;
  __shared__ float acc[kSplitRows * Dp];

  const Job j = make_job(a, part.item, blockIdx.y, kSplitRows);
  const Range range = split_range(j, part.split, part.num_splits);
  if (range.begin >= range.end) {
    write_empty(a, j, part);
    return;
  }
  const int size = a.head_size;
  Rows rows;
  rows.begin(a, j, 0);
  for (int32_t key0 = range.begin + warp_id() * kKeys; key0 < range.end; key0 += kWarps * kKeys) {
    Raw<Int8, 4> k[kSteps][kKeyFrags][Rows::kChunks];
    Raw<Int8, Rows::kRunWords> v[kSteps][Rows::kSpans][4];
    Pack<4> affine[2][kSteps][kKeyPairs];
    QRT_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const int32_t first = key0 + 16 * s;  // 16 keys of one page
      const int64_t row = first < range.end ? page_row(a, j, first) : 0;
      QRT_UNROLL
      for (int f = 0; f < kKeyFrags; ++f) {
        const int key = f * kTileN + key_lane();
        QRT_UNROLL
        for (int c = 0; c < Rows::kChunks; ++c) {
          const int d = c * 32 + major_lane() * 8;
          k[s][f][c] = load_raw<Int8, 4>(a.k_pages, (row + key) * size + d, first + key < range.end && d < size);
        }
      }
      QRT_UNROLL
      for (int span = 0; span < Rows::kSpans; ++span) {
        QRT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int key = value_key(i), d = Rows::value_at(span);
          v[s][span][i] = load_raw<Int8, Rows::kRunWords>(a.v_pages, (row + key) * size + d,
                                                          first + key < range.end && d < size);
        }
      }
      if constexpr (Int8) {
        QRT_UNROLL
        for (int i = 0; i < kKeyPairs; ++i) {
          const int key = pair_key(i);
          const bool one = first + key < range.end, two = first + key + 1 < range.end;
          Pack<4> ka = zero_pack<4>(), va = ka;
          if (one) {  // (a page has an even number of keys: the pair is there, though its second may not be the sequence's)
            ka = load_nc(reinterpret_cast<const Pack<4>*>(a.k_affine + 2 * (row + key)));
            va = load_nc(reinterpret_cast<const Pack<4>*>(a.v_affine + 2 * (row + key)));
          }
          if (!two) ka.w[2] = ka.w[3] = va.w[2] = va.w[3] = 0u;
          affine[0][s][i] = ka;
          affine[1][s][i] = va;
        }
      }
    }
    float scores[kSteps][kScores];
    uint32_t p[kSteps][kScores / 2];
    QRT_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      rows.score16(scores[s], [&](int f, int c) { return decode_raw<T>(k[s][f][c], a.cache_bf16); });
    }
    rows.template softmax<kSteps>(scores, p, j, a.scale, key0,
                                  [&](int s, int pair, bool value) { return affine[value ? 1 : 0][s][pair]; });
    QRT_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      rows.accumulate16(p[s], [&](int i, int span) { return decode_raw<T>(v[s][span][i], a.cache_bf16); });
    }
  }
  rows.finish();
  if (major_lane() == 0) {
    QRT_UNROLL
    for (int r = 0; r < kLaneRows; ++r) {
      stat.top[warp_id()][row_of(r)] = rows.top[r];
      stat.sum[warp_id()][row_of(r)] = rows.sum[r];
    }
  }
  __syncthreads();
  float weight[kLaneRows];
  QRT_UNROLL
  for (int r = 0; r < kLaneRows; ++r) weight[r] = stat.weight(warp_id(), row_of(r));
  for (int w = 0; w < kWarps; ++w) {  // in turn: the order of sums is fixed
    if (warp_id() == w) {
      QRT_UNROLL
      for (int span = 0; span < Rows::kSpans; ++span) {
        QRT_UNROLL
        for (int i = 0; i < 4; ++i) {
          float* to = acc + row_of(score_row(i)) * Dp + Rows::out_at(span, i);
          QRT_UNROLL
          for (int n = 0; n < Rows::kRun; ++n) {
            const float x = weight[score_row(i)] * rows.value(span, n, i);
            to[n] = w == 0 ? x : to[n] + x;
          }
        }
      }
    }
    __syncthreads();
  }
  write_rows(a, j, part, stat, acc, Dp, 0, j.rows);
}

#endif  // QRT_HAS_MMA

constexpr int kSimtRows = 8;
constexpr int kSimtSize = 256;

// Eight elements from element `at` on of a row that ends before `left` more elements; zeros beyond.
template <class T, bool Int8>
QRT_DEVICE void load8(float (&x)[8], const uint8_t* pages, int64_t at, int left, bool bf16, bool aligned) {
  QRT_UNROLL
  for (int i = 0; i < 8; ++i) x[i] = 0.f;
  if (left <= 0) return;
  if (aligned) {
    if constexpr (Int8) {
      const Pack<2> c = load_nc(reinterpret_cast<const Pack<2>*>(pages + at));
      QRT_UNROLL
      for (int i = 0; i < 8; ++i) x[i] = centred(c.w[i / 4], i % 4);
    } else {
      const Pack<4> c = load_stream(reinterpret_cast<const Pack<4>*>(pages + 2 * at));
      QRT_UNROLL
      for (int i = 0; i < 8; ++i) {
        x[i] = page_float(static_cast<uint16_t>(c.w[i / 2] >> (16 * (i % 2))), bf16);
      }
    }
    return;
  }
  QRT_UNROLL
  for (int i = 0; i < 8; ++i) {  // without branches: past the end, the last element again
    const int64_t from = at + min(i, left - 1);
    float y;
    if constexpr (Int8) {
      y = centred(load_nc(pages + from), 0);
    } else {
      y = page_float(load_nc(reinterpret_cast<const uint16_t*>(pages) + from), bf16);
    }
    x[i] = i < left ? y : 0.f;
  }
}

template <class T, bool Int8>
QRT_DEVICE void decode_simt(const Args<T>& a, const Partial& part) {
  constexpr int kUnroll = 2;  // keys a lane has on the way
  __shared__ SplitStat<kSimtRows> stat;
  __shared__ float acc[kSimtRows * kSimtSize];

  const Job j = make_job(a, part.item, blockIdx.y, kSplitRows);
  const Range range = split_range(j, part.split, part.num_splits);
  if (range.begin >= range.end) {
    write_empty(a, j, part);
    return;
  }
  const int size = a.head_size;
  const bool aligned = size % 8 == 0;
  int lanes = 1;  // that share a key
  while (lanes * 8 < size) lanes *= 2;
  const int groups = kWarp / lanes, d0 = lane_id() % lanes * 8;
  const int group = warp_id() * groups + lane_id() / lanes;

  for (int row0 = 0; row0 < j.rows; row0 += kSimtRows) {
    const int num = min(kSimtRows, j.rows - row0);
    float q[kSimtRows][8], out[kSimtRows][8], top[kSimtRows], sum[kSimtRows], q_sum[kSimtRows];
    int32_t pos[kSimtRows];
    QRT_UNROLL
    for (int r = 0; r < kSimtRows; ++r) {
      const int row = row0 + r;
      pos[r] = r < num ? j.position(row) : -1;
      top[r] = -infinity();
      sum[r] = q_sum[r] = 0.f;
      const int some = min(row, j.rows - 1);  // rows past the end: another's q, no keys
      const T* from = a.q + j.q_row(some) * a.q_stride + static_cast<int64_t>(j.q_head(some)) * size;
      QRT_UNROLL
      for (int i = 0; i < 8; ++i) {
        const float x = to_float(from[min(d0 + i, size - 1)]);
        q[r][i] = d0 + i < size ? x : 0.f;
        out[r][i] = 0.f;
        q_sum[r] += q[r][i];
      }
      if (Int8) {
        for (int m = lanes / 2; m > 0; m /= 2) q_sum[r] += shfl_xor(q_sum[r], m);
      }
    }
    const int32_t stride = kWarps * groups * kUnroll;
    for (int32_t key0 = range.begin; key0 < range.end; key0 += stride) {  // all lanes make the same number of rounds
      float k[kUnroll][8], v[kUnroll][8], k_step[kUnroll], k_mid[kUnroll], v_step[kUnroll], v_mid[kUnroll];
      int32_t keys[kUnroll];
      QRT_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        keys[u] = key0 + group * kUnroll + u;
        const bool there = keys[u] < range.end;
        const int64_t row = there ? page_row(a, j, keys[u]) : 0;
        load8<T, Int8>(k[u], a.k_pages, row * size + d0, there ? size - d0 : 0, a.cache_bf16, aligned);
        load8<T, Int8>(v[u], a.v_pages, row * size + d0, there ? size - d0 : 0, a.cache_bf16, aligned);
        k_step[u] = k_mid[u] = v_step[u] = v_mid[u] = 0.f;
        if (Int8 && there) {
          const Pack<2> ka = load_nc(reinterpret_cast<const Pack<2>*>(a.k_affine + 2 * row));
          const Pack<2> va = load_nc(reinterpret_cast<const Pack<2>*>(a.v_affine + 2 * row));
          k_step[u] = bits_float(ka.w[0]);
          k_mid[u] = bits_float(ka.w[1]) + 128.f * k_step[u];
          v_step[u] = bits_float(va.w[0]);
          v_mid[u] = bits_float(va.w[1]) + 128.f * v_step[u];
        }
        if (Int8) {
          QRT_UNROLL
          for (int i = 0; i < 8; ++i) v[u][i] = d0 + i < size ? v_step[u] * v[u][i] + v_mid[u] : 0.f;
        }
      }
      QRT_UNROLL
      for (int r = 0; r < kSimtRows; ++r) {
        if (r >= num) continue;  // the same for all threads
        float x[kUnroll];
        QRT_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
          float dot = 0.f;
          QRT_UNROLL
          for (int i = 0; i < 8; ++i) dot = fmaf(q[r][i], k[u][i], dot);
          for (int m = lanes / 2; m > 0; m /= 2) dot += shfl_xor(dot, m);
          if (Int8) dot = k_step[u] * dot + k_mid[u] * q_sum[r];
          x[u] = keys[u] < range.end && j.sees(pos[r], keys[u]) ? dot * a.scale : -infinity();
        }
        float peak = top[r];
        QRT_UNROLL
        for (int u = 0; u < kUnroll; ++u) peak = fmaxf(peak, x[u]);
        const float base = peak == -infinity() ? 0.f : peak;
        const float keep = top[r] == -infinity() ? 0.f : exp_neg(top[r] - base);
        top[r] = peak;
        sum[r] *= keep;
        QRT_UNROLL
        for (int i = 0; i < 8; ++i) out[r][i] *= keep;
        QRT_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
          const float p = exp_neg(x[u] - base);
          sum[r] += p;
          QRT_UNROLL
          for (int i = 0; i < 8; ++i) out[r][i] = fmaf(p, v[u][i], out[r][i]);
        }
      }
    }
    // The groups of a warp, then the warps.
    __syncthreads();  // the last rows' readers are done
    QRT_UNROLL
    for (int r = 0; r < kSimtRows; ++r) {
      float peak = top[r];
      for (int m = lanes; m < kWarp; m *= 2) peak = fmaxf(peak, shfl_xor(peak, m));
      const float keep = top[r] == -infinity() ? 0.f : exp_neg(top[r] - peak);
      top[r] = peak;
      sum[r] *= keep;
      for (int m = lanes; m < kWarp; m *= 2) sum[r] += shfl_xor(sum[r], m);
      QRT_UNROLL
      for (int i = 0; i < 8; ++i) {
        out[r][i] *= keep;
        for (int m = lanes; m < kWarp; m *= 2) out[r][i] += shfl_xor(out[r][i], m);
      }
      if (lane_id() == 0) {
        stat.top[warp_id()][r] = top[r];
        stat.sum[warp_id()][r] = sum[r];
      }
    }
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      if (warp_id() == w && lane_id() < lanes) {
        QRT_UNROLL
        for (int r = 0; r < kSimtRows; ++r) {
          const float weight = stat.weight(w, r);
          QRT_UNROLL
          for (int i = 0; i < 8; ++i) {
            float* to = acc + r * kSimtSize + d0 + i;
            *to = w == 0 ? weight * out[r][i] : *to + weight * out[r][i];
          }
        }
      }
      __syncthreads();
    }
    write_rows(a, j, part, stat, acc, kSimtSize, row0, num);
  }
}

template <class T, bool Int8, int Dp>
QRT_DEVICE void decode_sized(const Args<T>& a, const Partial& part) {
#if QRT_HAS_MMA
  if constexpr (mma::Has<T>::value) {
    decode_mma<T, Int8, Dp>(a, part);
    return;
  }
#endif
  if constexpr (!mma::Has<T>::value) decode_simt<T, Int8>(a, part);
}

template <class T>
QRT_DEVICE void merge(T* out, const float* part_out, const float* part_stat, const int32_t* work,
                      const int32_t* q_start, int32_t num_splits, int32_t num_heads, int32_t head_size) {
  const int32_t row = blockIdx.x, max_rows = gridDim.x, kv_head = blockIdx.y, num_kv_heads = gridDim.y;
  const int32_t item = blockIdx.z, seq = work[2 * item], group = num_heads / num_kv_heads;
  const int32_t flat = work[2 * item + 1] + row, q_len = q_start[seq + 1] - q_start[seq];
  if (flat >= q_len * group) return;
  const int64_t slots = static_cast<int64_t>(gridDim.z) * num_kv_heads * max_rows;
  const int64_t slot = (static_cast<int64_t>(item) * num_kv_heads + kv_head) * max_rows + row;
  float peak = -infinity();
  for (int32_t s = 0; s < num_splits; ++s) peak = fmaxf(peak, part_stat[2 * (s * slots + slot)]);
  const int64_t to = (static_cast<int64_t>(q_start[seq] + flat / group) * num_heads + kv_head * group + flat % group) *
                     head_size;
  for (int d = threadIdx.x; d < head_size; d += blockDim.x) {
    float total = 0.f, x = 0.f;
    for (int32_t s = 0; s < num_splits; ++s) {
      const int64_t at = s * slots + slot;
      const float top = part_stat[2 * at];
      if (top == -infinity()) continue;  // no keys: nothing else was written
      const float weight = exp_neg(top - peak);
      total += weight * part_stat[2 * at + 1];
      x += weight * part_out[at * head_size + d];
    }
    out[to + d] = from_float<T>(total > 0.f || is_nan(total) ? x / total : 0.f);
  }
}

}  // namespace attention
}  // namespace qrt

// part_out, part_stat: Partial's layout; read and written only when gridDim.x > 1.
#define QRT_ATTENTION_SPLIT                                                                                         \
  qrt::attention::Partial {                                                                                         \
    part_out, part_stat, static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(gridDim.x),                         \
        static_cast<int32_t>(blockIdx.z), static_cast<int32_t>(gridDim.z), max_rows                                 \
  }
#define QRT_DECODE(name, type, ...)                                                                                 \
  QRT_KERNEL(QRT_ATTENTION_THREADS)                                                                                 \
  name(QRT_ATTENTION_PARAMS(qrt::type), float* part_out, float* part_stat, int32_t max_rows) {                      \
    qrt::attention::__VA_ARGS__(QRT_ATTENTION_ARGS(qrt::type), QRT_ATTENTION_SPLIT);                                   \
  }                                                                                                                 \
  QRT_REGISTER(name)
#define QRT_MERGE(name, type)                                                                                       \
  QRT_KERNEL(128)                                                                                                   \
  name(qrt::type* out, const float* part_out, const float* part_stat, const int32_t* work, const int32_t* q_start,  \
       int32_t num_splits, int32_t num_heads, int32_t head_size) {                                                  \
    qrt::attention::merge<qrt::type>(out, part_out, part_stat, work, q_start, num_splits, num_heads, head_size);    \
  }                                                                                                                 \
  QRT_REGISTER(name)

#define QRT_DECODE_TYPE(name, type)                                                              \
  QRT_DECODE(attention_decode_##name##_kv16_d64, type, decode_sized<qrt::type, false, 64>);      \
  QRT_DECODE(attention_decode_##name##_kv8_d64, type, decode_sized<qrt::type, true, 64>);        \
  QRT_DECODE(attention_decode_##name##_kv16_d128, type, decode_sized<qrt::type, false, 128>);    \
  QRT_DECODE(attention_decode_##name##_kv8_d128, type, decode_sized<qrt::type, true, 128>);      \
  QRT_DECODE(attention_decode_##name##_kv16_any, type, decode_simt<qrt::type, false>);           \
  QRT_DECODE(attention_decode_##name##_kv8_any, type, decode_simt<qrt::type, true>);             \
  QRT_MERGE(attention_merge_##name, type)
QRT_DECODE_TYPE(f16, half_t);
QRT_DECODE_TYPE(bf16, bf16_t);
