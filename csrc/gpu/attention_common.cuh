// What every attention kernel shares: the arguments, what a block works on, the pages, the end of a split.
//
//   out[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, g]) v[j, g],  g = h / group,  group = Hq / Hkv
//
// over the keys j <= p of row t at position p (with a window w: p - w < j <= p). Keys and values are read only from the
// cache. A block works on one key head of one sequence: its rows are (query, query head of the group) pairs, flattened
// as query * group + head, so that all query heads of a key head share what is read. `work` int32 [items, 2] lists
// (sequence, first flattened row); an item has the rows up to the sequence's end, at most the kernel's row count.
//
// Pages: [num_blocks, Hkv, block, D], 16-bit floats or uint8 codes with float32 (scale, min) [num_blocks, Hkv, block, 2].
// Codes are used centred, code - 128, which both 16-bit types hold exactly:
//   x = scale * (code - 128) + mid, mid = min + 128 * scale;  q . k = scale * (q . (code - 128)) + mid * sum(q);
//   sum_j p_j v_j = sum_j (p_j scale_j) (code_j - 128) + sum_j p_j mid_j.
// Nothing beyond a sequence's last key is read, and keys past a row's position enter as p = 0 with finite values: what
// lies in stale or foreign pages never reaches an output.
//
// A split over the context leaves, per row, max_j s_j, sum_j e^(s_j - max) and sum_j e^(s_j - max) v_j (online softmax,
// Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2022, arXiv:2205.14135); attention_merge_* joins the splits.
#pragma once

#include "compat.h"

// q rows are q_stride elements apart, heads head_size apart; out is [T, num_heads, head_size], contiguous. window 0: all
// keys. cache_bf16: what 16-bit pages hold (else float16). block_shift: log2 of the tokens in a page, at least 4.
#define QRT_ATTENTION_PARAMS(T)                                                                                       \
  T *out, const T *q, int64_t q_stride, const uint8_t *k_pages, const uint8_t *v_pages, const float *k_affine,        \
      const float *v_affine, const int32_t *work, const int32_t *q_start, const int32_t *kv_lens,                     \
      const int32_t *block_table, int32_t table_stride, int32_t num_heads, int32_t num_kv_heads, int32_t head_size,   \
      int32_t block_shift, int32_t window, int32_t cache_bf16, float scale
#define QRT_ATTENTION_ARGS(T)                                                                                       \
  qrt::attention::Args<T> {                                                                                         \
    out, q, q_stride, k_pages, v_pages, k_affine, v_affine, work, q_start, kv_lens, block_table, table_stride,      \
        num_heads, num_kv_heads, head_size, block_shift, window, cache_bf16 != 0, scale                             \
  }
// Four warps a block, whatever their width.
#if QRT_WARP == 64
#define QRT_ATTENTION_THREADS 256
#else
#define QRT_ATTENTION_THREADS 128
#endif

namespace qrt {
namespace attention {

constexpr int kWarps = 4;
constexpr int kSplitRows = 16;   // rows of an item of the split kernels
constexpr int kSplitKeys = 128;  // a split is a multiple of this many keys

template <class T>
struct Args {
  T* out;
  const T* q;
  int64_t q_stride;
  const uint8_t *k_pages, *v_pages;
  const float *k_affine, *v_affine;
  const int32_t *work, *q_start, *kv_lens, *block_table;
  int32_t table_stride, num_heads, num_kv_heads, head_size, block_shift, window;
  bool cache_bf16;
  float scale;
};

// One item at one key head.
struct Job {
  int32_t first, rows, group, kv_head, head_size, window;
  int32_t base;  // position of the sequence's first query row
  int64_t token;  // its row of q and out
  const int32_t* table;
  int32_t lo, hi;  // keys [lo, hi) are seen by some row

  QRT_DEVICE int32_t position(int32_t row) const { return base + (first + row) / group; }
  QRT_DEVICE bool sees(int32_t pos, int32_t key) const { return key <= pos && (window <= 0 || key > pos - window); }
  QRT_DEVICE int64_t q_row(int32_t row) const { return token + (first + row) / group; }
  QRT_DEVICE int32_t q_head(int32_t row) const { return kv_head * group + (first + row) % group; }
};

template <class T>
QRT_DEVICE Job make_job(const Args<T>& a, int32_t item, int32_t kv_head, int32_t max_rows) {
  Job j;
  const int32_t seq = a.work[2 * item];
  j.first = a.work[2 * item + 1];
  j.group = a.num_heads / a.num_kv_heads;
  j.kv_head = kv_head;
  j.head_size = a.head_size;
  j.window = a.window;
  j.token = a.q_start[seq];
  const int32_t q_len = a.q_start[seq + 1] - a.q_start[seq];
  j.base = a.kv_lens[seq] - q_len;
  j.rows = max(0, min(max_rows, q_len * j.group - j.first));
  j.table = a.block_table + static_cast<int64_t>(seq) * a.table_stride;
  j.lo = j.window > 0 ? max(0, j.position(0) - j.window + 1) : 0;
  j.hi = j.rows > 0 ? j.position(j.rows - 1) + 1 : 0;
  return j;
}

// The part of [lo, hi) that split `index` of `num` works on; empty when begin >= end. Begins are multiples of 16.
struct Range {
  int32_t begin, end;
};
QRT_DEVICE Range split_range(const Job& j, int32_t index, int32_t num) {
  const int32_t lo = j.lo & ~15;
  const int32_t size = ceil_div(ceil_div(max(0, j.hi - lo), num), kSplitKeys) * kSplitKeys;
  Range r;
  r.begin = lo + index * size;
  r.end = min(j.hi, r.begin + size);
  return r;
}

// Index of a key's vector in the pages: times D the element, times 2 its (scale, min).
template <class T>
QRT_DEVICE int64_t page_row(const Args<T>& a, const Job& j, int32_t key) {
  const int64_t block = load_nc(j.table + (key >> a.block_shift));
  return ((block * a.num_kv_heads + j.kv_head) << a.block_shift) + (key & ((1 << a.block_shift) - 1));
}

// ------------------------------------------------------------------------------------------------ elements of a page
template <int Words>
struct alignas(4 * Words) Pack {  // 2 * Words 16-bit floats
  uint32_t w[Words];
};

// The 16-bit floats of a word as T: the same bits when the page holds T; else rounded, beyond float16's range its largest.
template <class T>
struct Bits;
template <>
struct Bits<half_t> {
  static constexpr bool kBf16 = false;
};
template <>
struct Bits<bf16_t> {
  static constexpr bool kBf16 = true;
};
QRT_DEVICE float page_float(uint16_t u, bool bf16) {
  if (bf16) {
    bf16_t b;
    b.u = u;
    return to_float(b);
  }
  half_t h;
  h.u = u;
  return to_float(h);
}
template <class T>
QRT_DEVICE uint32_t page_word(uint32_t w, bool bf16) {
  if (bf16 == Bits<T>::kBf16) return w;
  float lo = page_float(static_cast<uint16_t>(w & 0xffffu), bf16);
  float hi = page_float(static_cast<uint16_t>(w >> 16), bf16);
  if (!Bits<T>::kBf16) {
    lo = lo > 65504.f ? 65504.f : lo < -65504.f ? -65504.f : lo;  // NaN passes
    hi = hi > 65504.f ? 65504.f : hi < -65504.f ? -65504.f : hi;
  }
  return pack2_float<T>(lo, hi);
}

// Byte i of w, less 128: 2^23 + code is a float whose low byte is the code.
QRT_DEVICE float centred(uint32_t w, int i) {
  return bits_float(0x4b000000u | ((w >> (8 * i)) & 0xffu)) - 8388736.f;
}
template <class T>
QRT_DEVICE uint32_t centred_pair(uint32_t w, int i) {  // bytes i and i + 1
  const float lo = centred(w, i), hi = centred(w, i + 1);
  if (Bits<T>::kBf16) return (float_bits(lo) >> 16) | (float_bits(hi) & 0xffff0000u);  // exact: 8 bits
  return pack2_float<T>(lo, hi);
}

// 2 * Words consecutive elements at element `at` of the pages, as they lie there; zeros where not `there` (nothing read).
template <bool Int8, int Words>
struct Raw {
  Pack<Int8 ? Words / 2 : Words> bits;
};
template <bool Int8, int Words>
QRT_DEVICE Raw<Int8, Words> load_raw(const uint8_t* pages, int64_t at, bool there) {
  using Bytes = Pack<Int8 ? Words / 2 : Words>;
  Raw<Int8, Words> r;
  if (there) {
    r.bits = load_stream(reinterpret_cast<const Bytes*>(pages + (Int8 ? at : 2 * at)));
  } else {
    QRT_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(Bytes) / 4); ++i) r.bits.w[i] = Int8 ? 0x80808080u : 0u;
  }
  return r;
}
// As T, codes centred.
template <class T, bool Int8, int Words>
QRT_DEVICE Pack<Words> decode_raw(const Raw<Int8, Words>& x, bool bf16) {
  Pack<Words> r;
  QRT_UNROLL
  for (int i = 0; i < Words; ++i) {
    if constexpr (Int8) {
      r.w[i] = centred_pair<T>(x.bits.w[i / 2], i % 2 * 2);
    } else {
      r.w[i] = page_word<T>(x.bits.w[i], bf16);
    }
  }
  return r;
}
template <int Words>
QRT_DEVICE Pack<Words> zero_pack() {
  Pack<Words> r;
  QRT_UNROLL
  for (int i = 0; i < Words; ++i) r.w[i] = 0u;
  return r;
}

// e^x for x <= 0 and -infinity.
QRT_DEVICE float exp_neg(float x) { return x < -104.f ? 0.f : fast_exp(x); }

// ------------------------------------------------------------------------------------------------ the end of a split
// Joins the block's warps, one after the other so that the order of sums is fixed, and writes rows r < rows: the output
// when it is the only split, else the partial result. `add(row_sums)` below is the caller's part. Sizes: stat of
// kWarps * Rows pairs (max, sum), acc of Rows * Stride floats, both shared.
template <int Rows>
struct SplitStat {
  float top[kWarps][Rows], sum[kWarps][Rows];

  // Largest of a row over the warps; the weight of a warp's sums against it.
  QRT_DEVICE float row_top(int r) const {
    float t = top[0][r];
    QRT_UNROLL
    for (int w = 1; w < kWarps; ++w) t = fmaxf(t, top[w][r]);
    return t;
  }
  QRT_DEVICE float weight(int w, int r) const {
    return top[w][r] == -infinity() ? 0.f : exp_neg(top[w][r] - row_top(r));
  }
};

// Where a split leaves its rows. part_out float32 [splits, slots, D], part_stat float32 [splits, slots, 2] (max, sum),
// slot = (item * Hkv + kv_head) * max_rows + row.
struct Partial {
  float *out, *stat;
  int32_t split, num_splits, item, num_items, max_rows;

  QRT_DEVICE int64_t slot(const Job& j, int32_t num_kv_heads, int32_t row) const {
    const int64_t item_head = static_cast<int64_t>(item) * num_kv_heads + j.kv_head;
    return (static_cast<int64_t>(split) * num_items * num_kv_heads + item_head) * max_rows + row;
  }
};

template <class T, int Rows>
QRT_DEVICE void write_rows(const Args<T>& a, const Job& j, const Partial& part, const SplitStat<Rows>& stat,
                           const float* acc, int stride, int row0, int rows) {
  const int d_size = a.head_size;
  for (int i = threadIdx.x; i < rows * d_size; i += blockDim.x) {
    const int r = i / d_size, d = i % d_size;
    float sum = 0.f;
    QRT_UNROLL
    for (int w = 0; w < kWarps; ++w) sum += stat.weight(w, r) * stat.sum[w][r];
    const float v = acc[r * stride + d];
    if (part.num_splits == 1) {
      const int64_t row = j.q_row(row0 + r) * a.num_heads + j.q_head(row0 + r);
      a.out[row * d_size + d] = from_float<T>(sum > 0.f || is_nan(sum) ? v / sum : 0.f);
    } else {
      const int64_t slot = part.slot(j, a.num_kv_heads, row0 + r);
      part.out[slot * d_size + d] = v;
      if (d == 0) {
        part.stat[2 * slot] = stat.row_top(r);
        part.stat[2 * slot + 1] = sum;
      }
    }
  }
}

// A split with no keys: its max says so, its sums are not read.
template <class T>
QRT_DEVICE void write_empty(const Args<T>& a, const Job& j, const Partial& part) {
  if (part.num_splits == 1) {
    for (int i = threadIdx.x; i < j.rows * a.head_size; i += blockDim.x) {
      const int r = i / a.head_size;
      const int64_t row = j.q_row(r) * a.num_heads + j.q_head(r);
      a.out[row * a.head_size + i % a.head_size] = from_float<T>(0.f);
    }
    return;
  }
  for (int r = threadIdx.x; r < j.rows; r += blockDim.x) {
    const int64_t slot = part.slot(j, a.num_kv_heads, r);
    part.stat[2 * slot] = -infinity();
    part.stat[2 * slot + 1] = 0.f;
  }
}

}  // namespace attention
}  // namespace qrt
