// Paged attention for many query rows a sequence (prefill, chunks over a cached prefix), causal, with or without a
// window. See attention_common.cuh for the formula, the arguments and what a block works on; online softmax over tiles
// of keys, one launch for all sequences of a step.
//
//   attention_prefill_{f16,bf16}_{kv16,kv8}_d{64,128}   head sizes up to 64, 128 that are multiples of 8; 64 rows an
//                                                       item; matrix unit where there is one for the type, else SIMT
//   attention_prefill_{f16,bf16}_{kv16,kv8}_any         any head size up to 256; 32 rows an item; SIMT
//     grid (items, Hkv), four warps, no dynamic shared memory
//
// Matrix unit: a warp has 16 of the 64 rows; tiles of 64 keys and their values lie in shared memory as 16-bit floats
// (int8 pages: centred codes, exact), 16-byte units permuted so that no read or write meets itself in a bank. While the
// warps multiply by the keys the values arrive, and the next keys while they multiply by the values. Error:
// attention_mma.cuh.
// SIMT: 16 threads share a row, each with 2 of 32 keys of the scores and Dp / 16 columns of the result; q and a tile of
// 32 keys, then of their values, in shared memory as 16-bit floats, P in float32. Error: as the SIMT decode
// (attention_decode.cu).
#include "attention_common.cuh"
#include "attention_mma.cuh"

namespace qrt {
namespace attention {

constexpr int kTileRows = 64;

#if QRT_HAS_MMA

constexpr int kTileKeys = 64;
#if QRT_SM >= 800 || defined(QRT_EMU)
constexpr bool kAsyncCopies = true;
#else
constexpr bool kAsyncCopies = false;
#endif

// Unit (16 bytes) of a tile's row where unit `u` lies: lanes that read together (two keys' four units of a fragment of
// K; four keys' two units of V) hit different banks.
QRT_DEVICE int key_unit(int key, int u) { return u ^ ((key & 1) << 2); }
QRT_DEVICE int value_unit(int key, int u) { return u ^ (((key >> 1) & 3) << 1); }

// Keys key0 .. key0 + 63 into a tile [64][Dp]; zeros from `end` and from the head size on.
template <class T, bool Int8, int Dp, bool Values>
QRT_DEVICE void load_tile(uint32_t* tile, const Args<T>& a, const Job& j, int32_t key0, int32_t end) {
  constexpr int kUnits = Dp / 8;
  const uint8_t* pages = Values ? a.v_pages : a.k_pages;
  const bool as_is = kAsyncCopies && !Int8 && a.cache_bf16 == Bits<T>::kBf16;
  for (int i = threadIdx.x; i < kTileKeys * kUnits; i += QRT_ATTENTION_THREADS) {
    const int key = i / kUnits, u = i % kUnits;
    const bool there = key0 + key < end && u * 8 < a.head_size;
    const int64_t at = there ? page_row(a, j, key0 + key) * a.head_size + u * 8 : 0;
    uint32_t* to = tile + (key * kUnits + (Values ? value_unit(key, u) : key_unit(key, u))) * 4;
    if (as_is) {
      cp_async16(to, pages + 2 * at, there);
    } else {
      *reinterpret_cast<Pack<4>*>(to) = decode_raw<T>(load_raw<Int8, 4>(pages, at, there), a.cache_bf16);
    }
  }
  cp_async_commit();
}

template <class T, bool Int8, int Dp>
QRT_DEVICE void prefill_mma(const Args<T>& a) {
  constexpr int kUnits = Dp / 8, kSteps = kTileKeys / 16;
  using Rows = WarpRows<T, Int8, Dp>;
  __shared__ QRT_ALIGN(16) uint32_t k_tile[kTileKeys * Dp / 2];
  __shared__ QRT_ALIGN(16) uint32_t v_tile[kTileKeys * Dp / 2];
  __shared__ QRT_ALIGN(16) uint32_t affine[2][Int8 ? 2 * kTileKeys : 4];  // bits of (scale, min) of keys, values

  const Job j = make_job(a, blockIdx.x, blockIdx.y, kTileRows);
  if (j.rows == 0) return;
  const int row0 = warp_id() * 16;
  const bool any = row0 < j.rows;  // the same for a warp, as what follows from it
  const int32_t seen_to = any ? j.position(min(row0 + 16, j.rows) - 1) : -1;
  const int32_t seen_from = any && j.window > 0 ? j.position(row0) - j.window + 1 : 0;
  Rows rows;
  rows.begin(a, j, row0);
  const int32_t first = j.lo & ~15;
  load_tile<T, Int8, Dp, false>(k_tile, a, j, first, j.hi);
  for (int32_t key0 = first; key0 < j.hi; key0 += kTileKeys) {
    load_tile<T, Int8, Dp, true>(v_tile, a, j, key0, j.hi);
    if constexpr (Int8) {
      const int t = threadIdx.x % kTileKeys, value = threadIdx.x / kTileKeys;  // at least two threads a key
      if (value < 2) {
        Pack<2> x = zero_pack<2>();
        if (key0 + t < j.hi) {
          x = load_nc(reinterpret_cast<const Pack<2>*>((value ? a.v_affine : a.k_affine) + 2 * page_row(a, j, key0 + t)));
        }
        *reinterpret_cast<Pack<2>*>(&affine[value][2 * t]) = x;
      }
    }
    cp_async_wait<1>();
    __syncthreads();  // keys are there
    const bool used = any && key0 <= seen_to && key0 + kTileKeys > seen_from;
    uint32_t p[kSteps][kScores / 2];
    if (used) {
      float scores[kSteps][kScores];
      QRT_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        rows.score16(scores[s], [&](int f, int c) {
          const int key = 16 * s + f * kTileN + key_lane();
          return *reinterpret_cast<const Pack<4>*>(k_tile + (key * kUnits + key_unit(key, c * 4 + major_lane())) * 4);
        });
      }
      rows.template softmax<kSteps>(scores, p, j, a.scale, key0, [&](int s, int pair, bool value) {
        return *reinterpret_cast<const Pack<4>*>(&affine[value ? 1 : 0][2 * (16 * s + pair_key(pair))]);
      });
    }
    cp_async_wait<0>();
    __syncthreads();  // values are there, and keys are done with
    if (key0 + kTileKeys < j.hi) load_tile<T, Int8, Dp, false>(k_tile, a, j, key0 + kTileKeys, j.hi);
    if (used) {
      QRT_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        rows.accumulate16(p[s], [&](int i, int span) {
          const int key = 16 * s + value_key(i), d = Rows::value_at(span);
          return *reinterpret_cast<const Pack<Rows::kRunWords>*>(
              v_tile + (key * kUnits + value_unit(key, d / 8)) * 4 + d % 8 / 2);
        });
      }
    }
    __syncthreads();  // values are done with
  }
  rows.finish();
  if (!any) return;
  QRT_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + row_of(score_row(i));
    const float total = rows.sum[score_row(i)];
    const float inverse = total > 0.f || is_nan(total) ? 1.f / total : 0.f;
    if (row >= j.rows) continue;
    T* to = a.out + (j.q_row(row) * a.num_heads + j.q_head(row)) * a.head_size;
    QRT_UNROLL
    for (int span = 0; span < Rows::kSpans; ++span) {
      const int d = Rows::out_at(span, i);
      if (d >= a.head_size) continue;
      Pack<Rows::kRunWords> x;
      QRT_UNROLL
      for (int n = 0; n < Rows::kRun; n += 2) {
        x.w[n / 2] = pack2_float<T>(rows.value(span, n, i) * inverse, rows.value(span, n + 1, i) * inverse);
      }
      *reinterpret_cast<Pack<Rows::kRunWords>*>(to + d) = x;
    }
  }
}

#endif  // QRT_HAS_MMA

constexpr int kSimtKeys = 32;

// SimtRows rows of up to Dp elements.
template <class T, bool Int8, int Dp, int SimtRows>
QRT_DEVICE void prefill_simt(const Args<T>& a) {
  constexpr int kRows = SimtRows * 16 / QRT_ATTENTION_THREADS, kKeys = kSimtKeys / 16, kColumns = Dp / 16;
  constexpr int kStride = Dp + 8;  // rows start in different banks
  __shared__ QRT_ALIGN(16) uint32_t q_tile[SimtRows * kStride / 2];
  __shared__ QRT_ALIGN(16) uint32_t kv_tile[kSimtKeys * kStride / 2];
  __shared__ float p_tile[SimtRows][kSimtKeys + 1];
  __shared__ float q_sums[SimtRows];
  __shared__ float steps[kSimtKeys], mids[kSimtKeys];

  const Job j = make_job(a, blockIdx.x, blockIdx.y, SimtRows);
  if (j.rows == 0) return;
  const int size = a.head_size, t = threadIdx.x, ty = t / 16, tx = t % 16;
  const int padded = (size + 1) & ~1;
  for (int i = t; i < SimtRows * padded / 2; i += QRT_ATTENTION_THREADS) {
    const int r = i / (padded / 2), d = i % (padded / 2) * 2;
    uint32_t x = 0u;
    if (r < j.rows) {
      const T* from = a.q + j.q_row(r) * a.q_stride + static_cast<int64_t>(j.q_head(r)) * size + d;
      x = from[0].u | (d + 1 < size ? static_cast<uint32_t>(from[1].u) << 16 : 0u);
    }
    q_tile[(r * kStride + d) / 2] = x;
  }
  __syncthreads();
  if (Int8) {
    for (int r = t; r < SimtRows; r += QRT_ATTENTION_THREADS) {
      float s = 0.f;
      for (int d = 0; d < padded; d += 2) {
        const uint32_t w = q_tile[(r * kStride + d) / 2];
        s += to_float(unpack_lo<T>(w)) + to_float(unpack_hi<T>(w));
      }
      q_sums[r] = s;
    }
  }
  float out[kRows][kColumns], top[kRows], sum[kRows];
  int32_t pos[kRows];
  QRT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int row = ty * kRows + r;
    pos[r] = row < j.rows ? j.position(row) : -1;
    top[r] = -infinity();
    sum[r] = 0.f;
    QRT_UNROLL
    for (int c = 0; c < kColumns; ++c) out[r][c] = 0.f;
  }
  // A tile of keys or values [32][kStride] as T, zeros from the last key on, and (scale, mid) of int8.
  auto load = [&](const uint8_t* pages, const float* affine, int32_t key0) {
    const int units = (size + 7) / 8;
    for (int i = t; i < kSimtKeys * units; i += QRT_ATTENTION_THREADS) {
      const int key = i / units, d = i % units * 8;
      uint32_t* to = kv_tile + (key * kStride + d) / 2;
      Pack<4> x = zero_pack<4>();
      if (key0 + key < j.hi) {
        const int64_t at = page_row(a, j, key0 + key) * size + d;
        if (size % 8 == 0) {
          x = decode_raw<T>(load_raw<Int8, 4>(pages, at, true), a.cache_bf16);
        } else {
          QRT_UNROLL
          for (int e = 0; e < 8; ++e) {  // without branches: past the end, the last element again
            const int64_t from = at + min(e, size - 1 - d);
            uint32_t w;
            if constexpr (Int8) {
              w = centred_pair<T>(load_nc(pages + from), 0) & 0xffffu;
            } else {
              w = page_word<T>(load_nc(reinterpret_cast<const uint16_t*>(pages) + from), a.cache_bf16) & 0xffffu;
            }
            x.w[e / 2] |= (d + e < size ? w : 0u) << (16 * (e % 2));
          }
        }
      }
      *reinterpret_cast<Pack<4>*>(to) = x;
    }
    if (Int8 && t < kSimtKeys) {
      float step = 0.f, mid = 0.f;
      if (key0 + t < j.hi) {
        const Pack<2> x = load_nc(reinterpret_cast<const Pack<2>*>(affine + 2 * page_row(a, j, key0 + t)));
        step = bits_float(x.w[0]);
        mid = bits_float(x.w[1]) + 128.f * step;
      }
      steps[t] = step;
      mids[t] = mid;
    }
  };
  for (int32_t key0 = j.lo & ~15; key0 < j.hi; key0 += kSimtKeys) {
    __syncthreads();  // the last values are done with
    load(a.k_pages, a.k_affine, key0);
    __syncthreads();
    float s[kRows][kKeys];
    QRT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      QRT_UNROLL
      for (int c = 0; c < kKeys; ++c) s[r][c] = 0.f;
    }
    for (int d = 0; d < padded; d += 2) {
      float k_lo[kKeys], k_hi[kKeys];
      QRT_UNROLL
      for (int c = 0; c < kKeys; ++c) {
        const uint32_t w = kv_tile[((tx + 16 * c) * kStride + d) / 2];
        k_lo[c] = to_float(unpack_lo<T>(w));
        k_hi[c] = to_float(unpack_hi<T>(w));
      }
      QRT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const uint32_t w = q_tile[((ty * kRows + r) * kStride + d) / 2];
        const float lo = to_float(unpack_lo<T>(w)), hi = to_float(unpack_hi<T>(w));
        QRT_UNROLL
        for (int c = 0; c < kKeys; ++c) s[r][c] = fmaf(hi, k_hi[c], fmaf(lo, k_lo[c], s[r][c]));
      }
    }
    QRT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int row = ty * kRows + r;
      float peak = top[r];
      QRT_UNROLL
      for (int c = 0; c < kKeys; ++c) {
        const int key = tx + 16 * c;
        if (Int8) s[r][c] = steps[key] * s[r][c] + mids[key] * q_sums[row];
        s[r][c] = j.sees(pos[r], key0 + key) ? s[r][c] * a.scale : -infinity();
        peak = fmaxf(peak, s[r][c]);
      }
      QRT_UNROLL
      for (int m = 1; m < 16; m *= 2) peak = fmaxf(peak, shfl_xor(peak, m));
      const float base = peak == -infinity() ? 0.f : peak;
      const float keep = top[r] == -infinity() ? 0.f : exp_neg(top[r] - base);
      top[r] = peak;
      sum[r] *= keep;
      QRT_UNROLL
      for (int c = 0; c < kColumns; ++c) out[r][c] *= keep;
      QRT_UNROLL
      for (int c = 0; c < kKeys; ++c) {
        const float p = exp_neg(s[r][c] - base);
        sum[r] += p;
        p_tile[row][tx + 16 * c] = p;
      }
    }
    __syncthreads();  // keys are done with
    load(a.v_pages, a.v_affine, key0);
    __syncthreads();
    for (int key = 0; key < kSimtKeys; ++key) {
      float p[kRows];
      QRT_UNROLL
      for (int r = 0; r < kRows; ++r) p[r] = p_tile[ty * kRows + r][key];
      QRT_UNROLL
      for (int c = 0; c < kColumns; c += 2) {
        const int d = c * 16 + tx * 2;
        if (d >= size) continue;
        const uint32_t w = kv_tile[(key * kStride + d) / 2];
        float lo = to_float(unpack_lo<T>(w)), hi = to_float(unpack_hi<T>(w));
        if (Int8) {
          lo = steps[key] * lo + mids[key];
          hi = steps[key] * hi + mids[key];
        }
        QRT_UNROLL
        for (int r = 0; r < kRows; ++r) {
          out[r][c] = fmaf(p[r], lo, out[r][c]);
          out[r][c + 1] = fmaf(p[r], hi, out[r][c + 1]);
        }
      }
    }
  }
  QRT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int row = ty * kRows + r;
    float total = sum[r];
    QRT_UNROLL
    for (int m = 1; m < 16; m *= 2) total += shfl_xor(total, m);
    if (row >= j.rows) continue;
    const float inverse = total > 0.f || is_nan(total) ? 1.f / total : 0.f;
    T* to = a.out + (j.q_row(row) * a.num_heads + j.q_head(row)) * size;
    QRT_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int d = c / 2 * 32 + tx * 2 + c % 2;
      if (d < size) to[d] = from_float<T>(out[r][c] * inverse);
    }
  }
}

template <class T, bool Int8, int Dp>
QRT_DEVICE void prefill_sized(const Args<T>& a) {
#if QRT_HAS_MMA
  if constexpr (mma::Has<T>::value) {
    prefill_mma<T, Int8, Dp>(a);
    return;
  }
#endif
  if constexpr (!mma::Has<T>::value) prefill_simt<T, Int8, Dp, kTileRows>(a);
}

}  // namespace attention
}  // namespace qrt

#define QRT_PREFILL(name, type, ...)                                            \
  QRT_KERNEL(QRT_ATTENTION_THREADS) name(QRT_ATTENTION_PARAMS(qrt::type)) {     \
    qrt::attention::__VA_ARGS__(QRT_ATTENTION_ARGS(qrt::type));                 \
  }                                                                             \
  QRT_REGISTER(name)
#define QRT_PREFILL_TYPE(name, type)                                                             \
  QRT_PREFILL(attention_prefill_##name##_kv16_d64, type, prefill_sized<qrt::type, false, 64>);   \
  QRT_PREFILL(attention_prefill_##name##_kv8_d64, type, prefill_sized<qrt::type, true, 64>);     \
  QRT_PREFILL(attention_prefill_##name##_kv16_d128, type, prefill_sized<qrt::type, false, 128>); \
  QRT_PREFILL(attention_prefill_##name##_kv8_d128, type, prefill_sized<qrt::type, true, 128>);   \
  QRT_PREFILL(attention_prefill_##name##_kv16_any, type, prefill_simt<qrt::type, false, 256, 32>); \
  QRT_PREFILL(attention_prefill_##name##_kv8_any, type, prefill_simt<qrt::type, true, 256, 32>)
QRT_PREFILL_TYPE(f16, half_t);
QRT_PREFILL_TYPE(bf16, bf16_t);
