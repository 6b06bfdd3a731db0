// One device language for nvcc, NVRTC, hipcc (HIP 5.2 and later), HIPRTC and, with -DQRT_EMU, g++ on the host.
//
// A .cu file includes this first, writes kernels as `QRT_KERNEL(256) name_f16(...) { ... }`, and ends with one
// `QRT_REGISTER(name_f16)` line a kernel (empty on devices). Everything here is in namespace qrt. Rules it relies on:
//   - blocks are one-dimensional (threadIdx.x) and a multiple of kWarp wherever a warp_ or block_ function is called;
//   - the argument of QRT_KERNEL is a literal multiple of 32, or a macro for one;
//   - every lane of a warp reaches every warp_ and shfl call, every thread of a block every __syncthreads().
//     The emulator reports the file and line where that is not so;
//   - kernel parameters are pointers, int32_t, int64_t or float;
//   - no CUDA or HIP header beyond the runtime's: half_t and bf16_t are raw bits, converted here.
#pragma once

#if defined(QRT_EMU)
#include "emu/emu.h"
#define QRT_CUDA 0
#define QRT_HIP 0
#elif defined(__HIP__) || defined(__HIPCC__) || defined(__HIPCC_RTC__)
#define QRT_CUDA 0
#define QRT_HIP 1
#if !defined(__HIPCC_RTC__)
#include <hip/hip_runtime.h>
#include <stdint.h>
#endif
#else
#define QRT_CUDA 1
#define QRT_HIP 0
#if !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#include <stdint.h>
#endif
#endif

#if defined(__CUDACC_RTC__) || defined(__HIPCC_RTC__)  // no host headers there
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
#if defined(__INT64_TYPE__) && !defined(__HIPCC_RTC__)  // HIPRTC itself declares them as long long
typedef __INT64_TYPE__ int64_t;
typedef __UINT64_TYPE__ uint64_t;
#elif defined(_WIN64) || defined(__HIPCC_RTC__)
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
typedef long int64_t;
typedef unsigned long uint64_t;
#endif
#endif

#if QRT_CUDA || QRT_HIP
#if QRT_HIP
#define QRT_WARP 64  // gfx9 and Hygon's DCUs have wave64 only
#define QRT_ALIGN(n) __attribute__((aligned(n)))
#else
#define QRT_WARP 32
#define QRT_ALIGN(n) __align__(n)
#endif
#define QRT_KERNEL(max_threads) extern "C" __global__ void __launch_bounds__(max_threads)
#define QRT_CHECK_ALIGNED(p, bytes)
#define QRT_CHECK_STRIDE(stride)
#define QRT_REGISTER(kernel)
// Declares `T* name`, the block's dynamic shared memory, 16-byte aligned.
#define QRT_DYN_SHARED(T, name)                                    \
  extern __shared__ QRT_ALIGN(16) unsigned char qrt_dyn_shared[];  \
  T* name = reinterpret_cast<T*>(qrt_dyn_shared)
#endif

// The architecture class at compile time: QRT_SM is __CUDA_ARCH__ (800 for sm_80) or 0; QRT_GFX_DOT the gfx parts whose
// dot instructions are known. Both are 0 in emulation and in a compiler's host pass.
#if QRT_CUDA && defined(__CUDA_ARCH__)
#define QRT_SM __CUDA_ARCH__
#else
#define QRT_SM 0
#endif
#if QRT_HIP && (defined(__gfx906__) || defined(__gfx908__) || defined(__gfx90a__))
#define QRT_GFX_DOT 1
#else
#define QRT_GFX_DOT 0
#endif

#define QRT_DEVICE __device__ __forceinline__
// Before a loop of constant length: unroll it.
#if defined(QRT_EMU)
#define QRT_UNROLL
#else
#define QRT_UNROLL _Pragma("unroll")
#endif

#if QRT_HIP
typedef _Float16 qrt_half2_native __attribute__((ext_vector_type(2)));
extern "C" __device__ __attribute__((const)) qrt_half2_native __ocml_fma_2f16(qrt_half2_native, qrt_half2_native,
                                                                             qrt_half2_native);
#endif

namespace qrt {

constexpr int kWarp = QRT_WARP;

// ---------------------------------------------------------------------------------------------- integers, bits
template <class A, class B>
__host__ __device__ constexpr auto ceil_div(A a, B b) -> decltype(a / b) {
  return (a + b - 1) / b;
}
template <class T>
QRT_DEVICE T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
QRT_DEVICE T max(T a, T b) {
  return a < b ? b : a;
}

QRT_DEVICE uint32_t float_bits(float f) {
  union {
    float f;
    uint32_t u;
  } x;
  x.f = f;
  return x.u;
}
QRT_DEVICE float bits_float(uint32_t u) {
  union {
    uint32_t u;
    float f;
  } x;
  x.u = u;
  return x.f;
}
QRT_DEVICE bool is_nan(float f) { return (float_bits(f) & 0x7fffffffu) > 0x7f800000u; }
QRT_DEVICE bool is_finite(float f) { return (float_bits(f) & 0x7f800000u) != 0x7f800000u; }
QRT_DEVICE float infinity() { return bits_float(0x7f800000u); }

// ---------------------------------------------------------------------------------------------- 16-bit floats
struct half_t {  // IEEE binary16, raw bits
  uint16_t u;
};
struct bf16_t {  // bfloat16, raw bits
  uint16_t u;
};

QRT_DEVICE float to_float(float v) { return v; }
QRT_DEVICE float to_float(bf16_t v) { return bits_float(static_cast<uint32_t>(v.u) << 16); }
QRT_DEVICE float to_float(half_t v) {
#if QRT_SM
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.u));
  return f;
#elif QRT_HIP
  union {
    uint16_t u;
    _Float16 h;
  } x;
  x.u = v.u;
  return static_cast<float>(x.h);
#elif defined(QRT_EMU)
  return emu::half_to_float(v.u);
#else
  return 0.f;  // a CUDA compiler's host pass
#endif
}

// Round to nearest even; beyond the largest finite value: infinity. NaN stays NaN.
template <class T>
QRT_DEVICE T from_float(float v);
template <>
QRT_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
QRT_DEVICE bf16_t from_float<bf16_t>(float v) {
  const uint32_t x = float_bits(v);
  bf16_t r;
  r.u = (x & 0x7fffffffu) > 0x7f800000u ? static_cast<uint16_t>((x >> 16) | 0x40u)
                                        : static_cast<uint16_t>((x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
  return r;
}
template <>
QRT_DEVICE half_t from_float<half_t>(float v) {
  half_t r;
#if QRT_SM
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.u) : "f"(v));
#elif QRT_HIP
  union {
    _Float16 h;
    uint16_t u;
  } x;
  x.h = static_cast<_Float16>(v);
  r.u = x.u;
#elif defined(QRT_EMU)
  r.u = emu::float_to_half(v);
#else
  r.u = 0;
#endif
  return r;
}

// Two 16-bit floats in one word, the lower-addressed one in the low half.
QRT_DEVICE uint32_t pack2(uint16_t lo, uint16_t hi) {
  return static_cast<uint32_t>(lo) | static_cast<uint32_t>(hi) << 16;
}
template <class T>
QRT_DEVICE uint32_t pack2(T lo, T hi) {
  return pack2(lo.u, hi.u);
}
template <class T>
QRT_DEVICE T unpack_lo(uint32_t w) {
  T r;
  r.u = static_cast<uint16_t>(w & 0xffffu);
  return r;
}
template <class T>
QRT_DEVICE T unpack_hi(uint32_t w) {
  T r;
  r.u = static_cast<uint16_t>(w >> 16);
  return r;
}
// Both halves rounded as from_float does; one instruction on sm_80 and later.
template <class T>
QRT_DEVICE uint32_t pack2_float(float lo, float hi) {
  return pack2(from_float<T>(lo), from_float<T>(hi));
}
#if QRT_SM >= 800
template <>
QRT_DEVICE uint32_t pack2_float<half_t>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
template <>
QRT_DEVICE uint32_t pack2_float<bf16_t>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
#endif

// Packed arithmetic on two values of T, each result rounded once (a*b+c too). half_t is native everywhere; bf16_t is
// native on sm_80 and later (add, sub and mul through fma), through float elsewhere, where fma2 of bf16_t may round
// twice (float, then bfloat16).
#if QRT_HIP
using half2_native = ::qrt_half2_native;
QRT_DEVICE half2_native as_half2(uint32_t w) {
  union {
    uint32_t u;
    half2_native h;
  } x;
  x.u = w;
  return x.h;
}
QRT_DEVICE uint32_t from_half2(half2_native h) {
  union {
    half2_native h;
    uint32_t u;
  } x;
  x.h = h;
  return x.u;
}
#endif
template <class T>
QRT_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
QRT_DEVICE uint32_t fma2<half_t>(uint32_t a, uint32_t b, uint32_t c) {
#if QRT_SM
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#elif QRT_HIP
  return from_half2(__ocml_fma_2f16(as_half2(a), as_half2(b), as_half2(c)));
#elif defined(QRT_EMU)
  return emu::half2_fma(a, b, c);
#else
  return a + b + c;
#endif
}
template <>
QRT_DEVICE uint32_t fma2<bf16_t>(uint32_t a, uint32_t b, uint32_t c) {
#if QRT_SM >= 800
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#else
  const float lo = fmaf(bits_float(a << 16), bits_float(b << 16), bits_float(c << 16));
  const float hi = fmaf(bits_float(a & 0xffff0000u), bits_float(b & 0xffff0000u), bits_float(c & 0xffff0000u));
  return pack2_float<bf16_t>(lo, hi);
#endif
}
template <class T>
QRT_DEVICE uint32_t mul2(uint32_t a, uint32_t b) {
  return fma2<T>(a, b, 0x80008000u);  // + -0 keeps the sign of a zero product
}
template <class T>
QRT_DEVICE uint32_t add2(uint32_t a, uint32_t b) {
  return fma2<T>(a, pack2(from_float<T>(1.f), from_float<T>(1.f)), b);
}
template <class T>
QRT_DEVICE uint32_t sub2(uint32_t a, uint32_t b) {
  return fma2<T>(b, pack2(from_float<T>(-1.f), from_float<T>(-1.f)), a);
}

// ---------------------------------------------------------------------------------------------- vectors, loads
// N values that move as one aligned word of sizeof(T) * N <= 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) vec {
  T v[N];
  QRT_DEVICE T& operator[](int i) { return v[i]; }
  QRT_DEVICE const T& operator[](int i) const { return v[i]; }
};

template <class T, int N>
QRT_DEVICE vec<T, N> load_vec(const T* p) {  // p aligned to sizeof(T) * N; global or shared memory
  QRT_CHECK_ALIGNED(p, sizeof(T) * N);
  return *reinterpret_cast<const vec<T, N>*>(p);
}
template <class T, int N>
QRT_DEVICE void store_vec(T* p, const vec<T, N>& v) {
  QRT_CHECK_ALIGNED(p, sizeof(T) * N);
  *reinterpret_cast<vec<T, N>*>(p) = v;
}

#if QRT_SM
namespace detail {
template <int Bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
}  // namespace detail
#endif

// Reads global memory that no thread writes during the kernel (the read-only path on CUDA). T of 1, 2, 4, 8, 16 bytes.
template <class T>
QRT_DEVICE T load_nc(const T* p) {
  QRT_CHECK_ALIGNED(p, alignof(T));
#if QRT_SM
  using W = typename detail::Word<sizeof(T)>::type;
  union U {
    W w;
    T t;
    __device__ U() {}
  } x;
  x.w = __ldg(reinterpret_cast<const W*>(p));
  return x.t;
#else
  return *p;
#endif
}
// As load_nc, for data read once: does not displace what is in the first-level cache.
template <class T>
QRT_DEVICE T load_stream(const T* p) {
#if QRT_SM >= 700
  if constexpr (sizeof(T) == 16) {
    union U {
      uint4 w;
      T t;
      __device__ U() {}
    } x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.w.x), "=r"(x.w.y), "=r"(x.w.z), "=r"(x.w.w)
                 : "l"(p));
    return x.t;
  }
#endif
  return load_nc(p);
}

// ---------------------------------------------------------------------------------------------- warps
QRT_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
QRT_DEVICE int warp_id() { return static_cast<int>(threadIdx.x / kWarp); }
QRT_DEVICE int num_warps() { return static_cast<int>((blockDim.x + kWarp - 1) / kWarp); }

// Memory written before it by a lane is seen after it by every lane of the warp.
#if defined(QRT_EMU)
#define QRT_HERE , const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define QRT_HERE_ONLY const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define QRT_PASS , file, line
#define QRT_PASS_ONLY file, line
#else
#define QRT_HERE
#define QRT_HERE_ONLY
#define QRT_PASS
#define QRT_PASS_ONLY
#endif
QRT_DEVICE void warp_sync(QRT_HERE_ONLY) {
#if defined(QRT_EMU)
  emu::warp_barrier(QRT_PASS_ONLY);
#elif QRT_HIP
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
#elif QRT_SM
  __syncwarp();
#endif
}

// T: int, unsigned, float, double, (unsigned) long long. Sources are lanes of the same warp, all of them present.
#if defined(QRT_EMU)
#define QRT_SHFL(cuda, hip, source) return emu::shuffle(v, (source) QRT_PASS)
#elif QRT_HIP
#define QRT_SHFL(cuda, hip, source) return hip
#elif QRT_SM
#define QRT_SHFL(cuda, hip, source) return cuda
#else
#define QRT_SHFL(cuda, hip, source) return v
#endif
template <class T>
QRT_DEVICE T shfl_xor(T v, int mask QRT_HERE) {
  QRT_SHFL(__shfl_xor_sync(0xffffffffu, v, mask), __shfl_xor(v, mask, kWarp), lane_id() ^ mask);
}
template <class T>
QRT_DEVICE T shfl(T v, int lane QRT_HERE) {  // lane in [0, kWarp)
  QRT_SHFL(__shfl_sync(0xffffffffu, v, lane), __shfl(v, lane, kWarp), lane);
}
template <class T>
QRT_DEVICE T shfl_down(T v, int delta QRT_HERE) {  // lanes past the end keep their own value
  QRT_SHFL(__shfl_down_sync(0xffffffffu, v, delta), __shfl_down(v, delta, kWarp),
           lane_id() + delta < kWarp ? lane_id() + delta : lane_id());
}
template <class T>
QRT_DEVICE T shfl_up(T v, int delta QRT_HERE) {  // lanes before the start keep their own value
  QRT_SHFL(__shfl_up_sync(0xffffffffu, v, delta), __shfl_up(v, delta, kWarp),
           lane_id() >= delta ? lane_id() - delta : lane_id());
}
// Bit i is lane i's predicate; kWarp bits. (CUDA's headers own the plain name.)
QRT_DEVICE uint64_t warp_ballot(bool predicate QRT_HERE) {
#if defined(QRT_EMU)
  return emu::ballot(predicate QRT_PASS);
#elif QRT_HIP
  return __ballot(predicate);
#elif QRT_SM
  return __ballot_sync(0xffffffffu, predicate);
#else
  return predicate;
#endif
}
QRT_DEVICE int popcount(uint64_t bits) {
#if QRT_CUDA
  return __popcll(bits);
#else
  return __builtin_popcountll(bits);
#endif
}

// Reductions over all lanes, the same result in each (a fixed tree: bitwise repeatable).
QRT_DEVICE float warp_sum(float v QRT_HERE) {
QRT_UNROLL
  for (int m = kWarp / 2; m > 0; m >>= 1) v += shfl_xor(v, m QRT_PASS);
  return v;
}
QRT_DEVICE float warp_max(float v QRT_HERE) {  // NaN is ignored unless all are NaN
QRT_UNROLL
  for (int m = kWarp / 2; m > 0; m >>= 1) v = fmaxf(v, shfl_xor(v, m QRT_PASS));
  return v;
}

// Reductions over the block, the same result in each thread. shared32: 32 floats of shared memory, free to reuse after
// the call returns in all threads only behind a barrier or another block_ call.
#if defined(QRT_EMU)
#define QRT_BLOCK_SYNC() emu::block_sync(QRT_PASS_ONLY)
#else
#define QRT_BLOCK_SYNC() __syncthreads()
#endif
QRT_DEVICE float block_sum(float v, float* shared32 QRT_HERE) {
  v = warp_sum(v QRT_PASS);
  QRT_BLOCK_SYNC();  // the last call's readers are done
  if (lane_id() == 0) shared32[warp_id()] = v;
  QRT_BLOCK_SYNC();
  return warp_sum(lane_id() < num_warps() ? shared32[lane_id()] : 0.f QRT_PASS);
}
QRT_DEVICE float block_max(float v, float* shared32 QRT_HERE) {
  v = warp_max(v QRT_PASS);
  QRT_BLOCK_SYNC();
  if (lane_id() == 0) shared32[warp_id()] = v;
  QRT_BLOCK_SYNC();
  return warp_max(lane_id() < num_warps() ? shared32[lane_id()] : -infinity() QRT_PASS);
}

// ---------------------------------------------------------------------------------------------- arithmetic
// 2^x by the device's own instruction; relative error at most 2^-22 (CUDA), 2^-23 (HIP, emulation); results below
// 2^-126 may be zero. fast_exp(x) = 2^(x log2 e): relative error at most (|x| + 4) 2^-23.
QRT_DEVICE float fast_exp2(float x) {
#if QRT_SM
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#elif QRT_HIP
#if __has_builtin(__builtin_amdgcn_exp2f)
  return __builtin_amdgcn_exp2f(x);
#else
  return __builtin_exp2f(x);  // clang 15: the bare v_exp_f32
#endif
#else
  return exp2f(x);
#endif
}
QRT_DEVICE float fast_exp(float x) { return fast_exp2(x * 1.4426950408889634f); }

// ---------------------------------------------------------------------------------------------- asynchronous copies
// 16 bytes from global to shared memory, both 16-byte aligned; zeros where `valid` is false (then `global` is not
// read). The bytes are this thread's after cp_async_wait<n> (at most the n latest groups still under way) and the
// block's after a barrier behind that. Synchronous where the device has no such copy (before sm_80, HIP). In emulation
// a copy lands at the wait in forward order, at once in reverse order, and at either in random order.
QRT_DEVICE void cp_async16(void* shared, const void* global, bool valid = true) {
#if QRT_SM >= 800
  const unsigned s = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(s), "l"(global), "r"(bytes) : "memory");
#elif defined(QRT_EMU)
  emu::cp_async16(shared, global, valid);
#else
  const vec<uint32_t, 4> zero = {{0u, 0u, 0u, 0u}};
  *static_cast<vec<uint32_t, 4>*>(shared) = valid ? *static_cast<const vec<uint32_t, 4>*>(global) : zero;
#endif
}
QRT_DEVICE void cp_async_commit() {
#if QRT_SM >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(QRT_EMU)
  emu::cp_async_commit();
#endif
}
template <int Pending>
QRT_DEVICE void cp_async_wait() {
#if QRT_SM >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#elif defined(QRT_EMU)
  emu::cp_async_wait(Pending);
#endif
}

}  // namespace qrt
