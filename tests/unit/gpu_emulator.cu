// Kernels of tests/unit/test_gpu_emulator.py: some right, most with one mistake each that the emulator must report.
#include "compat.h"

using namespace qrt;

// ---- right
template <class T>
__device__ void reverse_through_shared(T* out, const T* in) {
  __shared__ T s[256];  // in a template: must be poisoned as well
  s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
QRT_KERNEL(256) good_reverse(float* out, const float* in) { reverse_through_shared(out, in); }

QRT_KERNEL(256) good_sum(float* out, const float* in, int32_t n) {
  __shared__ float part[32];
  float s = 0.f, m = -infinity();
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    s += in[i];
    m = fmaxf(m, in[i]);
  }
  s = block_sum(s, part);
  m = block_max(m, part);
  out[2 * threadIdx.x] = s;
  out[2 * threadIdx.x + 1] = m;
}

QRT_KERNEL(64) good_parameters(int64_t* out, int32_t i, int64_t l, float f, const void* p) {
  out[0] = i;
  out[1] = l;
  out[2] = static_cast<int64_t>(float_bits(f));
  out[3] = p == nullptr;
  out[4] = static_cast<int64_t>(blockIdx.x) + 100 * blockIdx.y + 10000 * blockIdx.z;
  out[5] = static_cast<int64_t>(gridDim.x) + 100 * gridDim.y + 10000 * gridDim.z;
}

QRT_KERNEL(64) good_warp(int32_t* out) {
  const int l = lane_id(), v = static_cast<int>(threadIdx.x);
  int32_t* o = out + 5 * threadIdx.x;
  o[0] = shfl_xor(v, 5);
  o[1] = shfl(v, 3);
  o[2] = shfl_down(v, 7);
  o[3] = shfl_up(v, 7);
  o[4] = popcount(warp_ballot(l % 3 == 0));
}

QRT_KERNEL(64) good_convert(float* wide, uint16_t* half, uint16_t* bf16, const float* in, const uint16_t* halves,
                            int32_t n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  half_t h;
  h.u = halves[i];
  wide[i] = to_float(h);
  half[i] = from_float<half_t>(in[i]).u;
  bf16[i] = from_float<bf16_t>(in[i]).u;
}

QRT_KERNEL(64) good_packed(uint32_t* out, const uint32_t* a, const uint32_t* b, const uint32_t* c, int32_t n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  out[4 * i] = fma2<half_t>(a[i], b[i], c[i]);
  out[4 * i + 1] = add2<half_t>(a[i], b[i]);
  out[4 * i + 2] = sub2<half_t>(a[i], b[i]);
  out[4 * i + 3] = mul2<half_t>(a[i], b[i]);
}

QRT_KERNEL(64) good_exp(float* out, const float* in, int32_t n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = fast_exp(in[i]);
}

QRT_KERNEL(64) good_copy(float* out, const float* in, int32_t rows) {
  QRT_DYN_SHARED(float, s);  // 2 buffers of 4 floats a thread
  const int t = static_cast<int>(threadIdx.x), n = 4 * static_cast<int>(blockDim.x);
  cp_async16(s + 4 * t, in + 4 * t);
  cp_async_commit();
  for (int r = 0; r < rows; ++r) {
    if (r + 1 < rows) cp_async16(s + ((r + 1) & 1) * n + 4 * t, in + (r + 1) * n + 4 * t);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    for (int i = 0; i < 4; ++i) out[r * n + i * blockDim.x + t] = s[(r & 1) * n + n - 1 - (i * blockDim.x + t)];
    __syncthreads();
  }
  cp_async_wait<0>();
}

// ---- mistakes that show in results: NaN, or the thread orders disagree
QRT_KERNEL(256) bad_missing_barrier(float* out, const float* in) {
  __shared__ float s[256];
  s[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
QRT_KERNEL(256) bad_missing_second_barrier(float* out, const float* in) {  // right but for the reuse of s
  __shared__ float s[256];
  for (int r = 0; r < 2; ++r) {
    s[threadIdx.x] = in[r * blockDim.x + threadIdx.x];
    __syncthreads();
    out[r * blockDim.x + threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
  }
}
QRT_KERNEL(64) bad_uninitialised(float* out) {
  __shared__ float s[64];
  if (threadIdx.x != 5) s[threadIdx.x] = 1.f;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
QRT_KERNEL(64) bad_stale(float* out) {  // block 1 reads what block 0 left
  __shared__ float s[64];
  if (blockIdx.x == 0) s[threadIdx.x] = 1.f;
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x];
}
QRT_KERNEL(64) bad_warp32(float* out, const float* in) {  // takes the warp for 32 lanes
  float v = in[threadIdx.x];
  for (int m = 16; m > 0; m >>= 1) v += shfl_xor(v, m);
  out[threadIdx.x] = shfl(v, 0) + static_cast<float>(threadIdx.x / 32);
}
QRT_KERNEL(64) bad_no_warp_sync(float* out) {
  __shared__ float s[64];
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = s[threadIdx.x ^ 1];
}
QRT_KERNEL(64) bad_copy_not_waited(float* out, const float* in) {
  QRT_DYN_SHARED(float, s);
  cp_async16(s + 4 * threadIdx.x, in + 4 * threadIdx.x);
  cp_async_commit();
  out[threadIdx.x] = s[4 * threadIdx.x];
  cp_async_wait<0>();
}

// ---- mistakes that are reported
QRT_KERNEL(64) bad_divergent_barrier(float* out) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.f;
}
QRT_KERNEL(64) bad_early_exit(float* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1.f;
}
QRT_KERNEL(64) bad_barrier_and_shuffle(float* out) {
  if (threadIdx.x % 2) {
    out[threadIdx.x] = shfl_xor(1.f, 2);
  } else {
    __syncthreads();
  }
}
QRT_KERNEL(64) bad_different_shuffles(float* out) {
  float v = 1.f;
  if (threadIdx.x % 2) {
    v = shfl_xor(v, 2);
  } else {
    v = shfl_xor(v, 4);
  }
  out[threadIdx.x] = v;
}
QRT_KERNEL(64) bad_shuffle_after_exit(float* out) {
  if (lane_id() == 3) return;
  out[threadIdx.x] = shfl_xor(1.f, 1);
}
QRT_KERNEL(64) bad_absent_lane(float* out) { out[threadIdx.x] = shfl_xor(1.f, 16); }
QRT_KERNEL(64) bad_lane_out_of_range(float* out) { out[threadIdx.x] = shfl(1.f, kWarp); }
QRT_KERNEL(64) bad_past_dynamic(float* out) {
  QRT_DYN_SHARED(float, s);
  s[threadIdx.x] = 1.f;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
QRT_KERNEL(64) bad_before_dynamic(float* out) {
  QRT_DYN_SHARED(float, s);
  const int back = 2;
  s[static_cast<int>(threadIdx.x) - back] = 1.f;
  out[threadIdx.x] = s[static_cast<int>(threadIdx.x) - back];
}
QRT_KERNEL(64) bad_alignment(float* out, const float* in) {
  const vec<float, 4> v = load_vec<float, 4>(in + threadIdx.x);
  out[threadIdx.x] = v[0];
}
QRT_KERNEL(64) bad_address(float* out, int64_t offset) { out[offset + threadIdx.x] = 1.f; }
QRT_KERNEL(64) bad_division(int32_t* out, int32_t zero) { out[threadIdx.x] = 7 / zero; }
QRT_KERNEL(64) bad_copy_left(float* out, const float* in) {
  QRT_DYN_SHARED(float, s);
  cp_async16(s + 4 * threadIdx.x, in + 4 * threadIdx.x);
  cp_async_commit();
  out[threadIdx.x] = 0.f;
}
__device__ __attribute__((noinline)) static float deep(int n) {
  volatile float frame[512];
  frame[n % 512] = 1.f;
  return n ? deep(n - 1) + frame[n % 512] : 0.f;
}
QRT_KERNEL(64) bad_stack(float* out, int32_t depth) { out[threadIdx.x] = deep(depth); }
QRT_KERNEL(64) bad_static_index(float* out, int32_t i) {  // UBSan's to find
  __shared__ float s[64];
  s[threadIdx.x] = 1.f;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x + i];
}
constexpr int kBound = 64;
QRT_KERNEL(kBound) bad_bound(float* out) { out[threadIdx.x] = 1.f; }

QRT_REGISTER(good_reverse);
QRT_REGISTER(good_sum);
QRT_REGISTER(good_parameters);
QRT_REGISTER(good_warp);
QRT_REGISTER(good_convert);
QRT_REGISTER(good_packed);
QRT_REGISTER(good_exp);
QRT_REGISTER(good_copy);
QRT_REGISTER(bad_missing_barrier);
QRT_REGISTER(bad_missing_second_barrier);
QRT_REGISTER(bad_uninitialised);
QRT_REGISTER(bad_stale);
QRT_REGISTER(bad_warp32);
QRT_REGISTER(bad_no_warp_sync);
QRT_REGISTER(bad_copy_not_waited);
QRT_REGISTER(bad_divergent_barrier);
QRT_REGISTER(bad_early_exit);
QRT_REGISTER(bad_barrier_and_shuffle);
QRT_REGISTER(bad_different_shuffles);
QRT_REGISTER(bad_shuffle_after_exit);
QRT_REGISTER(bad_absent_lane);
QRT_REGISTER(bad_lane_out_of_range);
QRT_REGISTER(bad_past_dynamic);
QRT_REGISTER(bad_before_dynamic);
QRT_REGISTER(bad_alignment);
QRT_REGISTER(bad_address);
QRT_REGISTER(bad_division);
QRT_REGISTER(bad_copy_left);
QRT_REGISTER(bad_stack);
QRT_REGISTER(bad_static_index);
QRT_REGISTER(bad_bound);
