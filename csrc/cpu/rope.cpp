#include "rope.h"

#include <algorithm>

#include "cpu_features.h"
#include "pool.h"

namespace qwen_rt {

void rope_row_scalar(float* x, const float* cos, const float* sin, int64_t r) {
  for (int64_t d = 0; d < r; ++d) {
    const float x1 = x[d], x2 = x[d + r];
    x[d] = x1 * cos[d] - x2 * sin[d];
    x[d + r] = x2 * cos[d] + x1 * sin[d];
  }
}

void rope(const Heads& q, const Heads& k, int64_t tokens, const float* cos, int64_t cos_stride, const float* sin,
          int64_t sin_stride, int64_t r) {
  auto kernel = rope_row_scalar;
#if defined(__x86_64__)
  if (active_isa() >= Isa::kAvx2) kernel = rope_row_avx2;
#endif
  constexpr int64_t kTaskElements = 8192;
  const int64_t chunk = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, 2 * r * (q.heads + k.heads)));
  parallel_for((tokens + chunk - 1) / chunk, [&](int64_t task) {
    for (int64_t t = task * chunk; t < std::min(tokens, (task + 1) * chunk); ++t) {
      for (const Heads* x : {&q, &k}) {
        for (int64_t h = 0; h < x->heads; ++h) {
          kernel(x->data + t * x->token_stride + h * x->head_stride, cos + t * cos_stride, sin + t * sin_stride, r);
        }
      }
    }
  });
}

}  // namespace qwen_rt
