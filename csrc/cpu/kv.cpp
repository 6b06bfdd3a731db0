#include "kv.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu_features.h"
#include "half.h"
#include "pool.h"

namespace qwen_rt {
namespace {

void quantize_row(const float* x, int64_t n, uint8_t* codes, float* scale, float* min) {
  float low = x[0], high = x[0];
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
    finite &= std::isfinite(x[i]);
  }
  if (!finite) low = high = std::numeric_limits<float>::quiet_NaN();
  *scale = (high - low) / 255.0f;
  *min = low;
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = *scale > 0.0f ? static_cast<uint8_t>(std::min(std::nearbyint((x[i] - low) / *scale), 255.0f)) : 0;
  }
}

}  // namespace

void kv_store_row_scalar(KvType type, const float* x, int64_t n, void* out, float* scale, float* min) {
  if (type == KvType::kFloat32) {
    std::memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
  } else if (type == KvType::kInt8) {
    quantize_row(x, n, static_cast<uint8_t*>(out), scale, min);
  } else {
    auto* p = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < n; ++i) p[i] = type == KvType::kFloat16 ? float_to_f16(x[i]) : float_to_bf16(x[i]);
  }
}

void store_kv(const KvLayer& kv, const float* k, int64_t k_token_stride, int64_t k_head_stride, const float* v,
              int64_t v_token_stride, int64_t v_head_stride, const int64_t* slots, int64_t tokens) {
  auto kernel = kv_store_row_scalar;
#if defined(__x86_64__)
  if (active_isa() >= Isa::kAvx2) kernel = kv_store_row_avx2;
#endif
  const auto store = [&](const KvPages& pages, const float* x, int64_t row) {
    char* out = static_cast<char*>(pages.data) + row * kv.size * kv_element_bytes(kv.type);
    const bool coded = kv.type == KvType::kInt8;
    kernel(kv.type, x, kv.size, out, coded ? pages.scale + row : nullptr, coded ? pages.min + row : nullptr);
  };
  constexpr int64_t kTaskElements = 8192;
  const int64_t chunk = std::max<int64_t>(1, kTaskElements / (2 * kv.heads * kv.size));
  parallel_for((tokens + chunk - 1) / chunk, [&](int64_t task) {
    for (int64_t t = task * chunk; t < std::min(tokens, (task + 1) * chunk); ++t) {
      for (int64_t h = 0; h < kv.heads; ++h) {
        const int64_t row = kv.row(slots[t] / kv.block, h, slots[t] % kv.block);
        store(kv.k, k + t * k_token_stride + h * k_head_stride, row);
        store(kv.v, v + t * v_token_stride + h * v_head_stride, row);
      }
    }
  });
}

}  // namespace qwen_rt
