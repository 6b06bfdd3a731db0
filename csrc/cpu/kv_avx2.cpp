#if defined(__x86_64__)

#include "kv.h"
#include "simd_avx2.h"

namespace qwen_rt {
namespace {

__m256 load_up_to_8(const float* x, int64_t n) { return n >= 8 ? _mm256_loadu_ps(x) : load_part(x, n); }

void store_f16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += 8) {
    const __m128i h = _mm256_cvtps_ph(load_up_to_8(x + i, n - i), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(out + i, &h, static_cast<size_t>(n - i < 8 ? n - i : 8) * 2);
  }
}

void store_bf16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 f = load_up_to_8(x + i, n - i);
    const __m256i u = _mm256_castps_si256(f);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    const __m256i h = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    std::memcpy(out + i, &packed, static_cast<size_t>(n - i < 8 ? n - i : 8) * 2);
  }
}

void store_int8(const float* x, int64_t n, uint8_t* codes, float* scale, float* min) {
  // A vector's tail is read again as an overlapping load, so that padding never enters the minimum.
  const __m256 first = _mm256_set1_ps(x[0]);
  __m256 low = first, high = first, poison = _mm256_setzero_ps();
  int64_t i = 0;
  const auto look = [&](__m256 v) {
    low = _mm256_min_ps(low, v);
    high = _mm256_max_ps(high, v);
    poison = _mm256_fmadd_ps(v, _mm256_setzero_ps(), poison);  // NaN once v holds NaN or infinity
  };
  for (; i + 8 <= n; i += 8) look(_mm256_loadu_ps(x + i));
  if (i < n) {
    if (n >= 8) {
      look(_mm256_loadu_ps(x + n - 8));
    } else {
      for (; i < n; ++i) look(_mm256_set1_ps(x[i]));
    }
  }
  const float bad = horizontal_sum(poison);
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const float bottom = bad - horizontal_max(_mm256_xor_ps(low, sign));
  *scale = (horizontal_max(high) + bad - bottom) / 255.0f;
  *min = bottom;
  if (!(*scale > 0.0f)) {
    std::memset(codes, 0, static_cast<size_t>(n));
    return;
  }
  const __m256 step = _mm256_set1_ps(*scale), base = _mm256_set1_ps(bottom);
  for (i = 0; i < n; i += 8) {
    const __m256 q = _mm256_div_ps(_mm256_sub_ps(load_up_to_8(x + i, n - i), base), step);
    const __m256i c = _mm256_cvtps_epi32(_mm256_min_ps(q, _mm256_set1_ps(255.0f)));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
    const __m128i bytes = _mm_packus_epi16(words, words);
    std::memcpy(codes + i, &bytes, static_cast<size_t>(n - i < 8 ? n - i : 8));
  }
}

}  // namespace

void kv_store_row_avx2(KvType type, const float* x, int64_t n, void* out, float* scale, float* min) {
  switch (type) {
    case KvType::kFloat32:
      std::memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
      break;
    case KvType::kFloat16:
      store_f16(x, n, static_cast<uint16_t*>(out));
      break;
    case KvType::kBFloat16:
      store_bf16(x, n, static_cast<uint16_t*>(out));
      break;
    case KvType::kInt8:
      store_int8(x, n, static_cast<uint8_t*>(out), scale, min);
      break;
  }
}

}  // namespace qwen_rt

#endif
