// Rotary embedding and the write into the paged KV cache: together in one pass, and each alone. T is the compute dtype
// (f16, bf16), u its unit roundoff; one warp a head of a token, all of its values in registers.
//
//   rope   halves of the first 2r dims of every head, i < r, by the token's row of float32 tables [T, r]:
//            x[i] = T(x[i] cos[i] - x[i+r] sin[i]);  x[i+r] = T(x[i+r] cos[i] + x[i] sin[i])
//          in float32: within 3 * 2^-24 (|x1 cos| + |x2 sin|) + u |result| of exact; dims from 2r on pass unchanged.
//          Queries may then be scaled by a T factor of their token (logn): T(x * factor), once more u.
//   store  cache dtype f16, bf16: rounded to nearest even. int8, per token and head, asymmetric:
//            scale = (max - min) / 255;  code = round((x - min) / scale), ties to even;  x ~ code * scale + min
//          in IEEE float32, code for code what the reference makes of the same vector; a constant vector has scale 0 and
//          comes back exact; a vector with NaN or infinity reads back as NaN. (scale, min) pairs lie beside the pages.
//   rope_store_kv = rope of q and k, then store of k and v, bit for bit; k itself is not written back.
//
// Pages of a layer: [num_blocks, kv_heads, block, size], affine [num_blocks, kv_heads, block, 2] float32. A slot is
// block id * block + offset; a token whose slot is negative stores nothing (rows that only fill up a captured batch).
// size <= kMaxHead, 2r <= size: the caller's to check. A warp moves 128 values at a time where pointers, strides, size
// and r allow it, one value a lane elsewhere.
#include "elem.cuh"

namespace qrt {
namespace {

constexpr int kMaxHead = 256;
constexpr int kWide = 128 / kWarp;

// A head spread over a warp: part c of a lane is values [first(c), first(c) + N), if below size.
template <int N>
struct Head {
  static constexpr int kParts = kMaxHead / (kWarp * N);
  float v[kParts][N];
  static QRT_DEVICE int first(int c) { return (c * kWarp + lane_id()) * N; }
};

template <class T, int N>
QRT_DEVICE void load_head(Head<N>& head, const T* x, int size) {
#pragma unroll
  for (int c = 0; c < Head<N>::kParts; ++c) {
    const int at = Head<N>::first(c);
    if (at < size) load_floats<T, N>(x + at, head.v[c]);
  }
}

template <class T, int N>
QRT_DEVICE void store_head(T* out, const Head<N>& head, int size) {
#pragma unroll
  for (int c = 0; c < Head<N>::kParts; ++c) {
    const int at = Head<N>::first(c);
    if (at < size) store_floats<T, N>(out + at, head.v[c]);
  }
}

// `head` holds x; its partner half is read from x once more (the first-level cache has it).
template <class T, int N>
QRT_DEVICE void rotate(Head<N>& head, const T* x, const float* cos, const float* sin, int r) {
#pragma unroll
  for (int c = 0; c < Head<N>::kParts; ++c) {
    const int at = Head<N>::first(c);
    if (at >= 2 * r) continue;
    const bool upper = at >= r;
    const int i = upper ? at - r : at;
    float other[N], cs[N], sn[N];
    load_floats<T, N>(x + (upper ? i : i + r), other);
    load_floats<float, N>(cos + i, cs);
    load_floats<float, N>(sin + i, sn);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float turned = upper ? head.v[c][j] * cs[j] + other[j] * sn[j] : head.v[c][j] * cs[j] - other[j] * sn[j];
      head.v[c][j] = rounded_to<T>(turned);
    }
  }
}

// Smaller and larger of two; NaN if either is.
QRT_DEVICE float min_nan(float a, float b) { return a < b || is_nan(a) ? a : b; }
QRT_DEVICE float max_nan(float a, float b) { return a > b || is_nan(a) ? a : b; }

// Writes a head to row `row` of the pages.
template <class C, int N>
struct Page {
  static QRT_DEVICE void write(C* pages, float*, int64_t row, const Head<N>& head, int size) {
    store_head<C, N>(pages + row * size, head, size);
  }
};
template <int N>
struct Page<uint8_t, N> {
  static QRT_DEVICE void write(uint8_t* pages, float* affine, int64_t row, const Head<N>& head, int size) {
    float low = infinity(), high = -infinity();
#pragma unroll
    for (int c = 0; c < Head<N>::kParts; ++c) {
      if (Head<N>::first(c) >= size) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        low = min_nan(low, head.v[c][j]);
        high = max_nan(high, head.v[c][j]);
      }
    }
#pragma unroll
    for (int m = kWarp / 2; m > 0; m >>= 1) {
      low = min_nan(low, shfl_xor(low, m));
      high = max_nan(high, shfl_xor(high, m));
    }
    const float scale = (high - low) / 255.0f;
    pages += row * size;
#pragma unroll
    for (int c = 0; c < Head<N>::kParts; ++c) {
      const int at = Head<N>::first(c);
      if (at >= size) continue;
      vec<uint8_t, N> codes;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float code = rintf((head.v[c][j] - low) / scale);
        codes.v[j] = scale > 0.0f && code > 0.0f ? static_cast<uint8_t>(code < 255.0f ? code : 255.0f) : 0;
      }
      store_vec<uint8_t, N>(pages + at, codes);
    }
    if (lane_id() == 0) {
      affine[2 * row] = scale;
      affine[2 * row + 1] = low;
    }
  }
};

// Heads of one tensor [tokens, count, size]: strides in elements, size contiguous.
template <class T>
struct Heads {
  T* data;
  int64_t row, head;
  QRT_DEVICE T* at(int64_t token, int h) const { return data + token * row + h * head; }
  QRT_DEVICE bool aligned(int values) const {
    const int bytes = values * static_cast<int>(sizeof(T));
    return is_aligned(data, row, sizeof(T), bytes) && is_aligned(data, head, sizeof(T), bytes);
  }
};

// One of two, member by member: a choice between references would put both in memory.
template <class T>
QRT_DEVICE Heads<T> choose(bool first, const Heads<T>& a, const Heads<T>& b) {
  return {first ? a.data : b.data, first ? a.row : b.row, first ? a.head : b.head};
}

struct Tables {
  const float *cos, *sin;
  int64_t cos_row, sin_row;
  int r;
  QRT_DEVICE bool aligned(int values) const {
    return r % values == 0 && is_aligned(cos, cos_row, 4, values * 4) && is_aligned(sin, sin_row, 4, values * 4);
  }
};

template <class C>
struct Cache {
  C *k, *v;
  float *k_affine, *v_affine;
  const int64_t* slots;
  int kv_heads, block;
  QRT_DEVICE bool aligned(int values) const {
    const int bytes = values * static_cast<int>(sizeof(C));
    return is_aligned(k, 0, sizeof(C), bytes) && is_aligned(v, 0, sizeof(C), bytes);
  }
  template <int N>
  QRT_DEVICE void write(bool value, int64_t token, int h, const Head<N>& head, int size) const {
    const int64_t slot = slots[token];
    if (slot < 0) return;
    const int64_t row = (slot / block * kv_heads + h) * block + slot % block;
    Page<C, N>::write(value ? v : k, value ? v_affine : k_affine, row, head, size);
  }
};

// The head this warp works on, of `heads` of token blockIdx.x.
QRT_DEVICE int head_index() {
  return static_cast<int>(blockIdx.y) * (static_cast<int>(blockDim.x) / kWarp) + warp_id();
}

// x turned (unless r is 0), and for queries scaled: written to `out`.
template <int N, class T>
QRT_DEVICE void turn_head(const Heads<const T>& x, const Heads<T>& out, const Tables& t, const T* scale, int h,
                          int size) {
  const int64_t token = blockIdx.x;
  const T* from = x.at(token, h);
  Head<N> head;
  load_head<T, N>(head, from, size);
  rotate<T, N>(head, from, t.cos + token * t.cos_row, t.sin + token * t.sin_row, t.r);
  if (scale) {
    const float factor = to_float(scale[token]);
#pragma unroll
    for (int c = 0; c < Head<N>::kParts; ++c) {
#pragma unroll
      for (int j = 0; j < N; ++j) head.v[c][j] *= factor;
    }
  }
  warp_sync();  // every lane has read x before one writes over it
  store_head<T, N>(out.at(token, h), head, size);
}

// x turned (unless r is 0): written to the cache as a key, or as a value.
template <int N, class T, class C>
QRT_DEVICE void cache_head(const Heads<const T>& x, const Cache<C>& cache, const Tables& t, bool value, int h, int size) {
  const int64_t token = blockIdx.x;
  const T* from = x.at(token, h);
  Head<N> head;
  load_head<T, N>(head, from, size);
  rotate<T, N>(head, from, t.cos + token * t.cos_row, t.sin + token * t.sin_row, t.r);
  cache.write(value, token, h, head, size);
}

template <class T>
QRT_DEVICE void rope(const Heads<const T>& x, const Heads<T>& out, const Tables& t, const T* scale, int h, int size) {
  if (size % kWide == 0 && x.aligned(kWide) && out.aligned(kWide) && t.aligned(kWide)) {
    turn_head<kWide, T>(x, out, t, scale, h, size);
  } else {
    turn_head<1, T>(x, out, t, scale, h, size);
  }
}

// Head h of k, then of v.
template <class T, class C>
QRT_DEVICE void store_kv(const Heads<const T>& k, const Heads<const T>& v, const Cache<C>& cache, const Tables& t, int h,
                         int size) {
  const bool value = h >= cache.kv_heads;
  const Heads<const T> x = choose(value, v, k);
  const Tables turn{t.cos, t.sin, t.cos_row, t.sin_row, value ? 0 : t.r};
  const int at = value ? h - cache.kv_heads : h;
  if (size % kWide == 0 && x.aligned(kWide) && cache.aligned(kWide) && (turn.r == 0 || turn.aligned(kWide))) {
    cache_head<kWide, T, C>(x, cache, turn, value, at, size);
  } else {
    cache_head<1, T, C>(x, cache, turn, value, at, size);
  }
}

}  // namespace
}  // namespace qrt

// All: grid (tokens, ceil(heads / warps a block)), heads counting q and k, k and v, or q, k and v; block 256 or fewer.
// Strides in elements.

// q [tokens, q_heads, size] and k [tokens, k_heads, size] -> q_out, k_out (which may be q and k); q_scale [tokens] of T
// or null.
#define QRT_ROPE(NAME, T)                                                                                            \
  QRT_KERNEL(256)                                                                                                    \
  NAME(const qrt::T* q, const qrt::T* k, qrt::T* q_out, qrt::T* k_out, const float* cos, const float* sin,           \
       const qrt::T* q_scale, int64_t q_row, int64_t q_head, int64_t k_row, int64_t k_head, int64_t q_out_row,       \
       int64_t q_out_head, int64_t k_out_row, int64_t k_out_head, int64_t cos_row, int64_t sin_row, int32_t q_heads, \
       int32_t k_heads, int32_t size, int32_t r) {                                                                   \
    const int h = qrt::head_index();                                                                                \
    if (h >= q_heads + k_heads) return;                                                                             \
    const bool is_q = h < q_heads;                                                                                  \
    qrt::rope<qrt::T>(                                                                                              \
        qrt::choose<const qrt::T>(is_q, {q, q_row, q_head}, {k, k_row, k_head}),                                    \
        qrt::choose<qrt::T>(is_q, {q_out, q_out_row, q_out_head}, {k_out, k_out_row, k_out_head}),                  \
        {cos, sin, cos_row, sin_row, r}, is_q ? q_scale : nullptr, is_q ? h : h - q_heads, size);                   \
  }                                                                                                                 \
  QRT_REGISTER(NAME);

QRT_ROPE(rope_f16, half_t)
QRT_ROPE(rope_bf16, bf16_t)

// k, v [tokens, kv_heads, size] -> the pages, at slots [tokens]; affine null unless the cache is int8.
#define QRT_STORE_KV(NAME, C, T)                                                                                     \
  QRT_KERNEL(256)                                                                                                    \
  NAME(const qrt::T* k, const qrt::T* v, C* k_pages, C* v_pages, float* k_affine, float* v_affine,                   \
       const int64_t* slots, int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head, int32_t kv_heads,         \
       int32_t size, int32_t block) {                                                                                \
    const int h = qrt::head_index();                                                                                 \
    if (h >= 2 * kv_heads) return;                                                                                   \
    qrt::store_kv<qrt::T, C>({k, k_row, k_head}, {v, v_row, v_head},                                                 \
                             {k_pages, v_pages, k_affine, v_affine, slots, kv_heads, block},                             \
                             {nullptr, nullptr, 0, 0, 0}, h, size);                                                  \
  }                                                                                                                  \
  QRT_REGISTER(NAME);

// rope_T and store_kv_C_T in one.
#define QRT_ROPE_STORE_KV(NAME, C, T)                                                                                \
  QRT_KERNEL(256)                                                                                                    \
  NAME(const qrt::T* q, qrt::T* q_out, const qrt::T* k, const qrt::T* v, const float* cos, const float* sin,         \
       const qrt::T* q_scale, C* k_pages, C* v_pages, float* k_affine, float* v_affine, const int64_t* slots,        \
       int64_t q_row, int64_t q_head, int64_t q_out_row, int64_t q_out_head, int64_t k_row, int64_t k_head,          \
       int64_t v_row, int64_t v_head, int64_t cos_row, int64_t sin_row, int32_t q_heads, int32_t kv_heads,           \
       int32_t size, int32_t r, int32_t block) {                                                                     \
    const int h = qrt::head_index();                                                                                \
    if (h >= q_heads + 2 * kv_heads) return;                                                                        \
    const qrt::Tables tables{cos, sin, cos_row, sin_row, r};                                                        \
    if (h < q_heads) {                                                                                              \
      qrt::rope<qrt::T>({q, q_row, q_head}, {q_out, q_out_row, q_out_head}, tables, q_scale, h, size);              \
    } else {                                                                                                        \
      qrt::store_kv<qrt::T, C>({k, k_row, k_head}, {v, v_row, v_head},                                              \
                               {k_pages, v_pages, k_affine, v_affine, slots, kv_heads, block}, tables,              \
                               h - q_heads, size);                                                                  \
    }                                                                                                               \
  }                                                                                                                 \
  QRT_REGISTER(NAME);

QRT_STORE_KV(store_kv_f16_f16, qrt::half_t, half_t)
QRT_STORE_KV(store_kv_bf16_f16, qrt::bf16_t, half_t)
QRT_STORE_KV(store_kv_int8_f16, uint8_t, half_t)
QRT_STORE_KV(store_kv_f16_bf16, qrt::half_t, bf16_t)
QRT_STORE_KV(store_kv_bf16_bf16, qrt::bf16_t, bf16_t)
QRT_STORE_KV(store_kv_int8_bf16, uint8_t, bf16_t)

QRT_ROPE_STORE_KV(rope_store_kv_f16_f16, qrt::half_t, half_t)
QRT_ROPE_STORE_KV(rope_store_kv_bf16_f16, qrt::bf16_t, half_t)
QRT_ROPE_STORE_KV(rope_store_kv_int8_f16, uint8_t, half_t)
QRT_ROPE_STORE_KV(rope_store_kv_f16_bf16, qrt::half_t, bf16_t)
QRT_ROPE_STORE_KV(rope_store_kv_bf16_bf16, qrt::bf16_t, bf16_t)
QRT_ROPE_STORE_KV(rope_store_kv_int8_bf16, uint8_t, bf16_t)
