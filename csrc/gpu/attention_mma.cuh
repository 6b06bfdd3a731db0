// Attention of 16 rows by one warp on the matrix unit, with P and the accumulators in registers throughout.
//
// Two shapes of fragment, by the warp's width:
//   32 lanes (PTX m16n8k16): S = Q K^T with Q as A and K as B, then O = P V with P as A and V as B. An accumulator pair
//     of two key tiles of 8 is, element for element, the A fragment of 16 keys.
//   64 lanes (MFMA 16x16x16): S^T = K Q^T with K as A, then O^T = V^T P^T with V^T as A and P^T as B. The accumulator of
//     S^T is, element for element, the B fragment P^T. (Hygon's MMAC, whose accumulator is the other's transposed, takes
//     the order of 32 lanes; keys and columns of V are dealt out so that the same holds. Not yet seen by a card.)
// Sums over the head size may run in any order, and so may the columns of O: a lane owns 8 consecutive elements of a
// key (two steps of the matrix unit) and up to 8 consecutive columns of V (one for each of as many column tiles). Global
// and shared memory are therefore read 16 bytes a lane, in 64- and 128-byte runs.
//
// Error, u = 2^-11 (float16) or 2^-8 (bfloat16), u32 = 2^-24, D the head size, n the visible keys, s_max the largest
// scale |q| . |k| (int8 pages: scale |q|_1 (|mid| + 128 key scale)):
//   |error| <= (2u + 4 (D + 12) u32 s_max + (n + 96) u32) sum_j p_j |v_j|  +  tiny
// Products of 16-bit floats are exact in float32; sums are float32. 2u: P is rounded to 16 bits, and so is its sum, so
// that weights still add up to one (int8: (p scale) is rounded, u, and the sum is not). P is held 2^12 times too large
// in float16, so that `tiny` is 2^-37 n max|v| (bfloat16: 2^-133): subnormal probabilities. With int8 pages the weight
// is p scale / (largest scale so far), with the same `tiny`.
#pragma once

#include "attention_common.cuh"
#include "mma.h"

#if QRT_HAS_MMA

namespace qrt {
namespace attention {

constexpr bool kWide = kWarp == 64;
constexpr int kTileN = kWide ? 16 : 8;       // rows of K, columns of V, in one fragment
constexpr int kKeyFrags = 16 / kTileN;       // fragments of 16 keys
constexpr int kRowWords = kWide ? 2 : 4;     // words of a fragment of Q or P
constexpr int kLaneRows = kWide ? 1 : 2;     // rows a lane has scores of
constexpr int kScores = 4 * kKeyFrags;       // scores a lane has of 16 keys
constexpr int kKeyLane = kWide ? 16 : 1;     // lanes that share rows differ by 1 and 2 times this

QRT_DEVICE int minor_lane() { return kWide ? lane_id() & 15 : lane_id() >> 2; }  // column of V
QRT_DEVICE int key_lane() {                                                      // row of K
  return QRT_UNIT_MMAC ? (minor_lane() & 3) * 4 + (minor_lane() >> 2) : minor_lane();
}
QRT_DEVICE int major_lane() { return kWide ? lane_id() >> 4 : lane_id() & 3; }   // which 8 of 32 elements of a key
QRT_DEVICE int row_of(int r) { return kWide ? lane_id() & 15 : (lane_id() >> 2) + 8 * r; }  // r < kLaneRows
QRT_DEVICE constexpr int score_row(int e) { return kWide ? 0 : (e >> 1) & 1; }              // which of them has score e
QRT_DEVICE int score_key(int e) {  // key of score e, of 16; e and e + 1 (e even) are neighbours
  return kWide ? major_lane() * 4 + e : (e >> 2) * 8 + major_lane() * 2 + (e & 1);
}
constexpr int kKeyPairs = 2;  // pairs of neighbouring keys a lane has scores of
QRT_DEVICE constexpr int pair_of(int e) { return kWide ? e >> 1 : e >> 2; }
QRT_DEVICE int pair_key(int i) { return score_key(kWide ? 2 * i : 4 * i); }
QRT_DEVICE int value_key(int i) {  // key of element i < 4 of a fragment of V
  return kWide ? major_lane() * 4 + i : major_lane() * 2 + (i & 1) + 8 * (i >> 1);
}
QRT_DEVICE int out_column(int i) {
  if (QRT_UNIT_MMAC) return major_lane() + 4 * i;
  return kWide ? major_lane() * 4 + i : major_lane() * 2 + (i & 1);
}

// c += rows x columns, rows a fragment of Q or P, columns one of K or V.
template <class T>
QRT_DEVICE void multiply(float (&c)[4], const uint32_t (&rows)[kRowWords], uint32_t col0, uint32_t col1) {
  union Out {
    mma::C frag;
    float f[4];
    __device__ Out() {}
  } out;
  union Rows {
    uint32_t w[kRowWords];
    mma::A<T> a;
    mma::B<T> b;
    __device__ Rows() {}
  } r;
  union Columns {
    uint32_t w[2];
    mma::A<T> a;
    mma::B<T> b;
    __device__ Columns() {}
  } k;
  QRT_UNROLL
  for (int i = 0; i < 4; ++i) out.f[i] = c[i];
  QRT_UNROLL
  for (int i = 0; i < kRowWords; ++i) r.w[i] = rows[i];
  k.w[0] = col0;
  k.w[1] = col1;
  if constexpr (kWide && !QRT_UNIT_MMAC) {
    mma::run(out.frag, k.a, r.b);
  } else {
    mma::run(out.frag, r.a, k.b);
  }
  QRT_UNROLL
  for (int i = 0; i < 4; ++i) c[i] = out.f[i];
}

QRT_DEVICE float over_keys_max(float v) {
  v = fmaxf(v, shfl_xor(v, kKeyLane));
  return fmaxf(v, shfl_xor(v, 2 * kKeyLane));
}
QRT_DEVICE float over_keys_sum(float v) {
  v += shfl_xor(v, kKeyLane);
  return v + shfl_xor(v, 2 * kKeyLane);
}

// Sixteen rows against keys. Dp: head size rounded up to 64 or 128. Source gives the keys' data, see step().
template <class T, bool Int8, int Dp>
struct WarpRows {
  static constexpr int kChunks = Dp / 32;
  static constexpr int kRun = Dp / kTileN < 8 ? Dp / kTileN : 8;  // consecutive columns of V in a lane
  static constexpr int kRunWords = kRun / 2;
  static constexpr int kSpans = Dp / (kTileN * kRun);
  // P is scaled by 2^12 in float16, whose smallest numbers are near; the scale cancels against the sum.
  static constexpr float kLift = Bits<T>::kBf16 ? 1.f : 4096.f;

  uint32_t q[kChunks][2][kRowWords];
  float out[kSpans][kRun][4];
  float top[kLaneRows], sum[kLaneRows];
  int32_t pos[kLaneRows];  // -1: no such row
  float q_sum[kLaneRows];  // int8: sum of q; sum of p mid
  float mid[kLaneRows];
  float unit;  // int8: the largest value scale seen, the unit of out

  QRT_DEVICE void begin(const Args<T>& a, const Job& j, int row0) {
    Pack<4> x[kLaneRows][kChunks];
    QRT_UNROLL
    for (int r = 0; r < kLaneRows; ++r) {
      const int row = row0 + row_of(r);
      const bool there = row < j.rows;
      pos[r] = there ? j.position(row) : -1;
      const T* q_row = a.q + (there ? j.q_row(row) * a.q_stride + static_cast<int64_t>(j.q_head(row)) * j.head_size : 0);
      q_sum[r] = 0.f;
      QRT_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        const int d = c * 32 + major_lane() * 8;
        x[r][c] = there && d < j.head_size ? load_nc(reinterpret_cast<const Pack<4>*>(q_row + d)) : zero_pack<4>();
        if (Int8) {
          QRT_UNROLL
          for (int i = 0; i < 4; ++i) {
            q_sum[r] += to_float(unpack_lo<T>(x[r][c].w[i])) + to_float(unpack_hi<T>(x[r][c].w[i]));
          }
        }
      }
      if (Int8) q_sum[r] = over_keys_sum(q_sum[r]);
      top[r] = -infinity();
      sum[r] = mid[r] = 0.f;
    }
    QRT_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      QRT_UNROLL
      for (int s = 0; s < 2; ++s) {
        QRT_UNROLL
        for (int w = 0; w < kRowWords; ++w) q[c][s][w] = x[w % kLaneRows][c].w[2 * s + w / kLaneRows];
      }
    }
    QRT_UNROLL
    for (int s = 0; s < kSpans; ++s) {
      QRT_UNROLL
      for (int n = 0; n < kRun; ++n) {
        QRT_UNROLL
        for (int i = 0; i < 4; ++i) out[s][n][i] = 0.f;
      }
    }
    unit = bits_float(0x00800000u);  // smallest normal number
  }

  // scores[e] = q . k of 16 keys. key_words(frag, chunk): the lane's 8 elements of row key_lane() of the fragment.
  template <class KeyWords>
  QRT_DEVICE void score16(float (&scores)[kScores], KeyWords key_words) {
    QRT_UNROLL
    for (int f = 0; f < kKeyFrags; ++f) {
      float c[4] = {0.f, 0.f, 0.f, 0.f};
      QRT_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const Pack<4> k = key_words(f, chunk);
        multiply<T>(c, q[chunk][0], k.w[0], k.w[1]);
        multiply<T>(c, q[chunk][1], k.w[2], k.w[3]);
      }
      QRT_UNROLL
      for (int i = 0; i < 4; ++i) scores[4 * f + i] = c[i];
    }
  }

  // Scores -> P in 16 bits, the running max and sums moved on. scores of 16 * Steps keys from `key0` on; affine(s, i, v):
  // (scale, min) of key pair_key(i) of step s and of the next key, of their values if v: the bits of four floats.
  template <int Steps, class Affine>
  QRT_DEVICE void softmax(float (&scores)[Steps][kScores], uint32_t (&p)[Steps][kScores / 2], const Job& j, float scale,
                          int32_t key0, Affine affine) {
    float peak[kLaneRows];
    QRT_UNROLL
    for (int r = 0; r < kLaneRows; ++r) peak[r] = -infinity();
    float widest = 0.f;
    QRT_UNROLL
    for (int s = 0; s < Steps; ++s) {
      QRT_UNROLL
      for (int e = 0; e < kScores; ++e) {
        const int r = score_row(e);
        if constexpr (Int8) {
          if (e % 2 == 0) {
            const Pack<4> ka = affine(s, pair_of(e), false), va = affine(s, pair_of(e), true);
            QRT_UNROLL
            for (int i = 0; i < 2; ++i) {
              const float step = bits_float(ka.w[2 * i]), low = bits_float(ka.w[2 * i + 1]);
              scores[s][e + i] = step * scores[s][e + i] + (low + 128.f * step) * q_sum[r];
              widest = fmaxf(widest, bits_float(va.w[2 * i]));
            }
          }
        }
        const float x = j.sees(pos[r], key0 + 16 * s + score_key(e)) ? scores[s][e] * scale : -infinity();
        scores[s][e] = x;
        peak[r] = fmaxf(peak[r], x);
      }
    }
    float keep[kLaneRows], base[kLaneRows];
    QRT_UNROLL
    for (int r = 0; r < kLaneRows; ++r) {
      peak[r] = fmaxf(top[r], over_keys_max(peak[r]));
      base[r] = peak[r] == -infinity() ? 0.f : peak[r];
      keep[r] = top[r] == -infinity() ? 0.f : exp_neg(top[r] - base[r]);
      top[r] = peak[r];
      sum[r] *= keep[r];
      mid[r] *= keep[r];
    }
    float shrink = 1.f, per_unit = 1.f;
    if constexpr (Int8) {
      widest = fmaxf(unit, over_keys_max(widest));
      shrink = unit / widest;
      unit = widest;
      per_unit = 1.f / widest;
    }
    QRT_UNROLL
    for (int r = 0; r < kLaneRows; ++r) keep[r] *= shrink;
    QRT_UNROLL
    for (int s = 0; s < kSpans; ++s) {
      QRT_UNROLL
      for (int n = 0; n < kRun; ++n) {
        QRT_UNROLL
        for (int i = 0; i < 4; ++i) out[s][n][i] *= keep[score_row(i)];
      }
    }
    QRT_UNROLL
    for (int s = 0; s < Steps; ++s) {
      QRT_UNROLL
      for (int e = 0; e < kScores; e += 2) {
        const int r = score_row(e);
        float a = exp_neg(scores[s][e] - base[r]) * kLift, b = exp_neg(scores[s][e + 1] - base[r]) * kLift;
        if constexpr (Int8) {
          const Pack<4> va = affine(s, pair_of(e), true);
          const float step_a = bits_float(va.w[0]), step_b = bits_float(va.w[2]);
          sum[r] += a + b;
          mid[r] += a * (bits_float(va.w[1]) + 128.f * step_a) + b * (bits_float(va.w[3]) + 128.f * step_b);
          p[s][e / 2] = pack2_float<T>(a * (step_a * per_unit), b * (step_b * per_unit));
        } else {
          p[s][e / 2] = pack2_float<T>(a, b);
          sum[r] += to_float(unpack_lo<T>(p[s][e / 2])) + to_float(unpack_hi<T>(p[s][e / 2]));
        }
      }
    }
  }

  // out += P V of 16 keys. value_words(i, span): the lane's kRun columns of the row of key value_key(i).
  template <class ValueWords>
  QRT_DEVICE void accumulate16(const uint32_t (&p)[kScores / 2], ValueWords value_words) {
    QRT_UNROLL
    for (int s = 0; s < kSpans; ++s) {
      Pack<kRunWords> v[4];
      QRT_UNROLL
      for (int i = 0; i < 4; ++i) v[i] = value_words(i, s);
      QRT_UNROLL
      for (int n = 0; n < kRun; n += 2) {
        multiply<T>(out[s][n], p, (v[0].w[n / 2] & 0xffffu) | (v[1].w[n / 2] << 16),
                    (v[2].w[n / 2] & 0xffffu) | (v[3].w[n / 2] << 16));
        multiply<T>(out[s][n + 1], p, (v[0].w[n / 2] >> 16) | (v[1].w[n / 2] & 0xffff0000u),
                    (v[2].w[n / 2] >> 16) | (v[3].w[n / 2] & 0xffff0000u));
      }
    }
  }

  QRT_DEVICE static int value_at(int span) { return span * kTileN * kRun + minor_lane() * kRun; }  // first column
  QRT_DEVICE static int out_at(int span, int i) { return span * kTileN * kRun + out_column(i) * kRun; }
  // Value of out[span][n][i], in units of e^(s - top): column out_at(span, i) + n.
  QRT_DEVICE float value(int span, int n, int i) const {
    return Int8 ? out[span][n][i] * unit + mid[score_row(i)] : out[span][n][i];
  }
  // After the last step: the lanes' shares of the sums joined.
  QRT_DEVICE void finish() {
    QRT_UNROLL
    for (int r = 0; r < kLaneRows; ++r) {
      sum[r] = over_keys_sum(sum[r]);
      if (Int8) mid[r] = over_keys_sum(mid[r]);
    }
  }
};

}  // namespace attention
}  // namespace qrt

#endif  // QRT_HAS_MMA
