// Matrix fragments: C[M,N] += A[M,K] B[K,N] by one warp, A and B half_t or bf16_t, C float. A kernel asks where its
// element i lives (a_row, a_col, ...) and never assumes a layout.
//
//                       unit                                          M   N   K   elements a lane: A  B  C
//   CUDA sm_80+         mma.sync m16n8k16 (half_t, bf16_t)            16  8   16                 8  4  4
//   CUDA sm_75          two mma.sync m16n8k8 (half_t)                 16  8   16                 8  4  4
//   HIP gfx90a          v_mfma_f32_16x16x16 f16, bf16_1k              16  16  16                 4  4  4
//   HIP gfx908          the same f16; bf16 as two 16x16x8             16  16  16                 4  4  4
//   emulation           either, by warp size
// QRT_HAS_MMA is 1 where there is such a unit for half_t, QRT_HAS_MMA_BF16 for bf16_t; elsewhere (gfx906, gfx926 and
// whatever is not known) kernels take their SIMT path, and run() is not there. Emulation has both, unless
// -DQRT_HAS_MMA=0.
// gfx928 and gfx936 have MMAC units whose layout no machine of ours has confirmed: only with -DQRT_MMAC=1, which a
// backend may set after csrc/gpu/mma_check.cu agreed with float64 on that very card. No compiler of ours knows those
// parts: that path has not even been compiled.
//
// Arithmetic: products exact, sums in float; the order of a sum's K terms and its rounding are the unit's own (tensor
// cores truncate below the largest term's last bits, as others have published). For one run():
// |error of an element| <= K 2^-23 (sum_k |a_k b_k| + |c|); mma_check.cu measures it on a card.
#pragma once

#include "compat.h"

#ifndef QRT_MMAC
#define QRT_MMAC 0
#endif
#if QRT_HIP && QRT_MMAC && (defined(__gfx928__) || defined(__gfx936__))
#define QRT_UNIT_MMAC 1
#else
#define QRT_UNIT_MMAC 0
#endif
#ifndef QRT_HAS_MMA
#if defined(QRT_EMU) || QRT_SM >= 750 || defined(__gfx908__) || defined(__gfx90a__) || QRT_UNIT_MMAC
#define QRT_HAS_MMA 1
#else
#define QRT_HAS_MMA 0
#endif
#endif
#ifndef QRT_HAS_MMA_BF16
#if QRT_HAS_MMA && (QRT_CUDA == 0 || QRT_SM >= 800)
#define QRT_HAS_MMA_BF16 1
#else
#define QRT_HAS_MMA_BF16 0
#endif
#endif

namespace qrt {
namespace mma {

template <class T>
struct Has {
  static constexpr bool value = false;
};
template <>
struct Has<half_t> {
  static constexpr bool value = QRT_HAS_MMA != 0;
};
template <>
struct Has<bf16_t> {
  static constexpr bool value = QRT_HAS_MMA_BF16 != 0;
};

// Row and column of lane l's element i.
#if QRT_WARP == 32
constexpr int M = 16, N = 8, K = 16, NA = 8, NB = 4, NC = 4;
QRT_DEVICE int a_row(int l, int i) { return (l >> 2) + ((i & 2) ? 8 : 0); }
QRT_DEVICE int a_col(int l, int i) { return (l & 3) * 2 + (i & 1) + ((i & 4) ? 8 : 0); }
QRT_DEVICE int b_row(int l, int i) { return (l & 3) * 2 + (i & 1) + ((i & 2) ? 8 : 0); }
QRT_DEVICE int b_col(int l, int) { return l >> 2; }
QRT_DEVICE int c_row(int l, int i) { return (l >> 2) + ((i & 2) ? 8 : 0); }
QRT_DEVICE int c_col(int l, int i) { return (l & 3) * 2 + (i & 1); }
#else
constexpr int M = 16, N = 16, K = 16, NA = 4, NB = 4, NC = 4;
QRT_DEVICE int a_row(int l, int) { return l & 15; }
QRT_DEVICE int a_col(int l, int i) { return (l >> 4) * 4 + i; }
QRT_DEVICE int b_row(int l, int i) { return (l >> 4) * 4 + i; }
QRT_DEVICE int b_col(int l, int) { return l & 15; }
#if QRT_UNIT_MMAC
QRT_DEVICE int c_row(int l, int) { return l & 15; }
QRT_DEVICE int c_col(int l, int i) { return (l >> 4) + 4 * i; }
#else
QRT_DEVICE int c_row(int l, int i) { return (l >> 4) * 4 + i; }
QRT_DEVICE int c_col(int l, int) { return l & 15; }
#endif
#endif

static_assert(M == 16 && K == 16 && N % 8 == 0, "kernels tile by these");

// Elements in pairs of one word: two neighbours along K share it, so that a pair is one 32-bit load where K is
// contiguous in memory.
template <class T>
struct alignas(4) A {
  T v[NA];
};
template <class T>
struct alignas(4) B {
  T v[NB];
};
struct C {
  float v[NC];
};

QRT_DEVICE void zero(C& c) {
  QRT_UNROLL
  for (int i = 0; i < NC; ++i) c.v[i] = 0.f;
}

namespace detail {
template <class Words, class Fragment>
QRT_DEVICE Words words_of(const Fragment& f) {
  static_assert(sizeof(Words) == sizeof(Fragment), "fragment size");
  union U {
    Words w;
    Fragment f;
    __device__ U() {}
  } x;
  x.f = f;
  return x.w;
}
struct W4 {
  uint32_t w[4];
};
struct W2 {
  uint32_t w[2];
};
template <class T>
struct IsHalf {
  static constexpr bool value = false;
};
template <>
struct IsHalf<half_t> {
  static constexpr bool value = true;
};
#if QRT_HIP
typedef float f4 __attribute__((ext_vector_type(4)));
typedef _Float16 h4 __attribute__((ext_vector_type(4)));
typedef short s4 __attribute__((ext_vector_type(4)));
typedef short s2 __attribute__((ext_vector_type(2)));
#endif
}  // namespace detail

#if QRT_HAS_MMA
// c += a b. All lanes of the warp, converged.
template <class T>
QRT_DEVICE void run(C& c, const A<T>& a, const B<T>& b) {
  static_assert(Has<T>::value, "this architecture has no matrix unit for the type");
#if defined(QRT_EMU)
  // The fibers of a warp share this memory: deposit, lane 0 multiplies the tile once, pick up.
  struct Tile {
    float a[M][K], b[K][N], c[M][N];
  };
  Tile& t = *static_cast<Tile*>(emu::warp_scratch(sizeof(Tile)));
  const int l = lane_id();
  for (int i = 0; i < NA; ++i) t.a[a_row(l, i)][a_col(l, i)] = to_float(a.v[i]);
  for (int i = 0; i < NB; ++i) t.b[b_row(l, i)][b_col(l, i)] = to_float(b.v[i]);
  for (int i = 0; i < NC; ++i) t.c[c_row(l, i)][c_col(l, i)] = c.v[i];
  warp_sync();
  if (l == 0) {
    for (int m = 0; m < M; ++m) {
      for (int k = 0; k < K; ++k) {
        for (int n = 0; n < N; ++n) t.c[m][n] += t.a[m][k] * t.b[k][n];
      }
    }
  }
  warp_sync();
  for (int i = 0; i < NC; ++i) c.v[i] = t.c[c_row(l, i)][c_col(l, i)];
  warp_sync();  // before another lane deposits its next operands
#elif QRT_SM >= 800
  const detail::W4 x = detail::words_of<detail::W4>(a);
  const detail::W2 y = detail::words_of<detail::W2>(b);
#define QRT_MMA_SYNC(type)                                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                   \
               ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                                \
               : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])                                 \
               : "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3]), "r"(y.w[0]), "r"(y.w[1]))
  if constexpr (detail::IsHalf<T>::value) {
    QRT_MMA_SYNC("f16");
  } else {
    QRT_MMA_SYNC("bf16");
  }
#undef QRT_MMA_SYNC
#elif QRT_SM >= 750
  const detail::W4 x = detail::words_of<detail::W4>(a);
  const detail::W2 y = detail::words_of<detail::W2>(b);
  QRT_UNROLL
  for (int k = 0; k < 2; ++k) {  // columns 0-7 of A are words 0 and 1, columns 8-15 words 2 and 3
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
                 : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
                 : "r"(x.w[2 * k]), "r"(x.w[2 * k + 1]), "r"(y.w[k]));
  }
#elif QRT_HIP
  detail::f4 acc = {c.v[0], c.v[1], c.v[2], c.v[3]};
#if QRT_UNIT_MMAC
  if constexpr (detail::IsHalf<T>::value) {
    acc = __builtin_amdgcn_mmac_f32_16x16x16f16(detail::words_of<detail::h4>(a), detail::words_of<detail::h4>(b), acc);
  } else {
    acc = __builtin_amdgcn_mmac_f32_16x16x16bf16(detail::words_of<detail::s4>(a), detail::words_of<detail::s4>(b), acc);
  }
#else
  if constexpr (detail::IsHalf<T>::value) {
    acc = __builtin_amdgcn_mfma_f32_16x16x16f16(detail::words_of<detail::h4>(a), detail::words_of<detail::h4>(b), acc,
                                                0, 0, 0);
  } else {
#if defined(__gfx90a__)
    acc = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(detail::words_of<detail::s4>(a), detail::words_of<detail::s4>(b),
                                                    acc, 0, 0, 0);
#else
    // The unit's k = 2 (l / 16) + i: elements 0, 1 and 2, 3 in turn, the same for A and B, cover each K once.
    const detail::s4 x = detail::words_of<detail::s4>(a), y = detail::words_of<detail::s4>(b);
    acc = __builtin_amdgcn_mfma_f32_16x16x8bf16(x.lo, y.lo, acc, 0, 0, 0);
    acc = __builtin_amdgcn_mfma_f32_16x16x8bf16(x.hi, y.hi, acc, 0, 0, 0);
#endif
  }
#endif
  c.v[0] = acc[0];
  c.v[1] = acc[1];
  c.v[2] = acc[2];
  c.v[3] = acc[3];
#endif
}
#endif  // QRT_HAS_MMA

// ---------------------------------------------------------------------------------------------- from shared memory
// `tile` points at the fragment's first element in shared memory, `stride` is in elements; rows are 16-byte aligned
// (stride a multiple of 8). A stride of 8 mod 16 elements has no bank conflicts. sm_75 and later: ldmatrix.
namespace detail {
#if QRT_SM >= 750
QRT_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
QRT_DEVICE void ldmatrix4(uint32_t (&w)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(shared_address(row))
               : "memory");
}
QRT_DEVICE void ldmatrix2(uint32_t (&w)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(w[0]), "=r"(w[1])
               : "r"(shared_address(row))
               : "memory");
}
QRT_DEVICE void ldmatrix2_trans(uint32_t (&w)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(w[0]), "=r"(w[1])
               : "r"(shared_address(row))
               : "memory");
}
template <class Fragment, class Words>
QRT_DEVICE void set_words(Fragment& f, const Words& w) {
  static_assert(sizeof(Words) == sizeof(Fragment), "fragment size");
  union U {
    Words w;
    Fragment f;
    __device__ U() {}
  } x;
  x.w = w;
  f = x.f;
}
#endif
}  // namespace detail

// A from row-major [M][K].
template <class T>
QRT_DEVICE void load_a(A<T>& a, const T* tile, int stride) {
  const int l = lane_id();
  QRT_CHECK_ALIGNED(tile, 16);
  QRT_CHECK_STRIDE(stride);
#if QRT_SM >= 750
  detail::W4 w;  // lanes 0-7 point at rows 0-7, 8-15 at rows 8-15, both of columns 0-7; 16-31 the same of columns 8-15
  detail::ldmatrix4(w.w, tile + (l & 15) * stride + (l >> 4) * 8);
  detail::set_words(a, w);
#else
  QRT_UNROLL
  for (int i = 0; i < NA; i += 2) {
    const vec<T, 2> p = *reinterpret_cast<const vec<T, 2>*>(tile + a_row(l, i) * stride + a_col(l, i));
    a.v[i] = p.v[0];
    a.v[i + 1] = p.v[1];
  }
#endif
}
// B from [N][K], K contiguous: rows of a weight matrix, keys.
template <class T>
QRT_DEVICE void load_b(B<T>& b, const T* tile, int stride) {
  const int l = lane_id();
  QRT_CHECK_ALIGNED(tile, 16);
  QRT_CHECK_STRIDE(stride);
#if QRT_SM >= 750
  detail::W2 w;
  detail::ldmatrix2(w.w, tile + (l & 7) * stride + ((l >> 3) & 1) * 8);
  detail::set_words(b, w);
#else
  QRT_UNROLL
  for (int i = 0; i < NB; i += 2) {
    const vec<T, 2> p = *reinterpret_cast<const vec<T, 2>*>(tile + b_col(l, i) * stride + b_row(l, i));
    b.v[i] = p.v[0];
    b.v[i + 1] = p.v[1];
  }
#endif
}
// B from [K][N], N contiguous: values.
template <class T>
QRT_DEVICE void load_b_rows(B<T>& b, const T* tile, int stride) {
  const int l = lane_id();
  QRT_CHECK_ALIGNED(tile, 16);
  QRT_CHECK_STRIDE(stride);
#if QRT_SM >= 750
  detail::W2 w;
  detail::ldmatrix2_trans(w.w, tile + (l & 15) * stride);
  detail::set_words(b, w);
#else
  QRT_UNROLL
  for (int i = 0; i < NB; ++i) b.v[i] = tile[b_row(l, i) * stride + b_col(l, i)];
#endif
}

}  // namespace mma
}  // namespace qrt
