// The host emulator's side of compat.h: CUDA's words for g++. One fiber a thread, one block at a time, deterministic.
//
// What it reports (launch() fails with kernel, block, thread, file and line): divergent and deadlocked barriers,
// threads that leave before a barrier, warp operations that not all lanes reach or that meet another one, shuffles from
// absent lanes, misaligned vector access, wild addresses, division by zero, copies never waited for, and shared memory,
// block or grid beyond the device's limits or the launch bound. Shared memory is NaN at the start of each block, and
// tests run blocks in three thread orders and compare: that shows missing barriers. What it cannot show: an index past
// a static array (UBSan does), memory ordering between blocks, occupancy, timing.
//
// A library is built as  g++ -O2 -std=c++17 -x c++ -DQRT_EMU -DQRT_WARP=32 -fPIC -shared csrc/gpu/*.cu
// csrc/gpu/emu/emu.cpp -o libemu32.so  and used through the C functions at the end of this file.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef QRT_WARP
#define QRT_WARP 32
#endif
static_assert(QRT_WARP == 32 || QRT_WARP == 64, "QRT_WARP is 32 or 64");

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __constant__ static const
#define QRT_ALIGN(n) __attribute__((aligned(n)))
#define __align__(n) QRT_ALIGN(n)
// Thread-local, so that the emulator finds (and fills) all of it, in templates too, by the library's TLS segment.
#define __shared__ static thread_local
// The section name carries the launch bound to the emulator.
#define QRT_KERNEL(max_threads) QRT_KERNEL_(max_threads)
#define QRT_KERNEL_(max_threads) extern "C" __attribute__((section("qrt_bound_" #max_threads))) void
#define QRT_DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(::qrt::emu::now.dynamic)
#define QRT_CHECK_ALIGNED(p, bytes) ::qrt::emu::check_aligned((p), (bytes))
#define QRT_CHECK_STRIDE(stride)                                                                       \
  do {                                                                                                 \
    if ((stride) % 8) ::qrt::emu::fail("a row stride of %d elements is not 16 bytes aligned", stride); \
  } while (0)
#define QRT_REGISTER(kernel) static const ::qrt::emu::Registration qrt_registration_##kernel(#kernel, kernel)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace qrt {
namespace emu {

#define QRT_HIDDEN __attribute__((visibility("hidden")))

// What the running fiber sees.
struct Now {
  uint3 thread, block, block_dim, grid_dim;
  unsigned char* dynamic;
};
extern QRT_HIDDEN Now now;

[[noreturn]] QRT_HIDDEN void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
QRT_HIDDEN void block_sync(const char* file, int line);
QRT_HIDDEN void warp_barrier(const char* file, int line);
// Deposits `value` (8 bytes), meets the warp, returns the table of all lanes' values; `lanes` is how many there are.
QRT_HIDDEN const uint64_t* exchange(uint64_t value, int kind, int* lanes, const char* file, int line);
QRT_HIDDEN void* warp_scratch(size_t bytes);  // zeroed at its first use; one a warp, for mma.h
QRT_HIDDEN void cp_async16(void* shared, const void* global, bool valid);
QRT_HIDDEN void cp_async_commit();
QRT_HIDDEN void cp_async_wait(int pending);
QRT_HIDDEN uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c);  // rounded once, as the instruction does

inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x0400u) return float_of(sign | ((rest + 0x1c000u) << 13));
  return float_of(sign | bits_of(static_cast<float>(rest) * 5.9604644775390625e-8f));  // subnormal: rest * 2^-24
}
inline uint16_t float_to_half(float f) {
  const uint32_t u = bits_of(f);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (a < 0x38800000u) {  // subnormal or zero: float addition rounds at 2^-24
    return static_cast<uint16_t>(sign | (bits_of(float_of(a) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13));
}

inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) {
    fail("address %p is not aligned to the %zu bytes it is used as", p, bytes);
  }
}

template <class T>
inline T shuffle(T v, int source, const char* file, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "devices shuffle 4 or 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &v, sizeof(T));
  int lanes = 0;
  const uint64_t* all = exchange(word, static_cast<int>(sizeof(T)), &lanes, file, line);
  if (source < 0 || source >= lanes) {
    fail("shuffle from lane %d of a warp of %d, at %s:%d", source, lanes, file, line);
  }
  T r;
  std::memcpy(&r, &all[source], sizeof(T));
  return r;
}

inline uint64_t ballot(bool predicate, const char* file, int line) {
  int lanes = 0;
  const uint64_t* all = exchange(predicate, 1, &lanes, file, line);
  uint64_t bits = 0;
  for (int i = 0; i < lanes; ++i) bits |= all[i] << i;
  return bits;
}

// One character a parameter: P pointer, i 32-bit integer, l 64-bit integer, f float.
template <class T>
struct Letter;
template <class T>
struct Letter<T*> {
  static constexpr char value = 'P';
};
template <>
struct Letter<int32_t> {
  static constexpr char value = 'i';
};
template <>
struct Letter<uint32_t> {
  static constexpr char value = 'i';
};
template <>
struct Letter<int64_t> {
  static constexpr char value = 'l';
};
template <>
struct Letter<uint64_t> {
  static constexpr char value = 'l';
};
template <>
struct Letter<float> {
  static constexpr char value = 'f';
};

using Invoke = void (*)(void (*kernel)(), void** args);

template <size_t... I>
struct Indices {};
template <size_t N, size_t... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <size_t... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};
template <class... A, size_t... I>
inline void invoke(void (*kernel)(A...), void** args, Indices<I...>) {
  kernel(*static_cast<A*>(args[I])...);
}

struct Registration {
  template <class... A>
  Registration(const char* name, void (*kernel)(A...)) {
    static const char signature[] = {Letter<A>::value..., '\0'};
    add(name, reinterpret_cast<void (*)()>(kernel), signature, [](void (*k)(), void** args) {
      invoke(reinterpret_cast<void (*)(A...)>(k), args, typename MakeIndices<sizeof...(A)>::type());
    });
  }
  QRT_HIDDEN static void add(const char* name, void (*kernel)(), const char* signature, Invoke invoke);
};

}  // namespace emu
}  // namespace qrt

#define threadIdx (::qrt::emu::now.thread)
#define blockIdx (::qrt::emu::now.block)
#define blockDim (::qrt::emu::now.block_dim)
#define gridDim (::qrt::emu::now.grid_dim)
#define __syncthreads() ::qrt::emu::block_sync(__FILE__, __LINE__)

static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __float_as_int(float f) {
  int i;
  std::memcpy(&i, &f, 4);
  return i;
}
static inline float __int_as_float(int i) {
  float f;
  std::memcpy(&f, &i, 4);
  return f;
}
static inline unsigned __float_as_uint(float f) { return static_cast<unsigned>(__float_as_int(f)); }
static inline float __uint_as_float(unsigned u) { return __int_as_float(static_cast<int>(u)); }

// Atomics return the old value; fibers cannot be interrupted between its reading and the writing.
template <class T>
static inline T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T>
static inline T atomicMax(T* p, T v) {
  const T old = *p;
  if (old < v) *p = v;
  return old;
}
template <class T>
static inline T atomicMin(T* p, T v) {
  const T old = *p;
  if (v < old) *p = v;
  return old;
}
template <class T>
static inline T atomicOr(T* p, T v) {
  const T old = *p;
  *p = old | v;
  return old;
}
template <class T>
static inline T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
template <class T>
static inline T atomicCAS(T* p, T expected, T v) {
  const T old = *p;
  if (old == expected) *p = v;
  return old;
}

// The C interface of an emulator library. One launch runs at a time in a process (calls are serialised).
extern "C" {
int qrt_emu_version();  // of this interface
int qrt_emu_warp();
int qrt_emu_count();
const char* qrt_emu_name(int i);       // i in [0, count), else null
const char* qrt_emu_signature(int i);  // one letter a parameter, see Letter
int qrt_emu_find(const char* name);    // index or -1
int qrt_emu_bound(int i);              // its launch bound in threads
// 0 forward, 1 reverse, 2 random by seed; the device's limit of dynamic shared memory in bytes (0: 64 KiB).
void qrt_emu_configure(int order, uint64_t seed, size_t max_dynamic_shared);
// args[j] points at parameter j's value, as for cuLaunchKernel. 0, or 1 and the reason in qrt_emu_error().
int qrt_emu_launch(int i, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block, size_t dynamic_shared,
                   void** args);
const char* qrt_emu_error();
uint64_t qrt_emu_switches();  // fiber switches so far
}
