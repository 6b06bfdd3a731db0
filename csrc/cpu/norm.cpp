#include "norm.h"

#include <algorithm>
#include <cmath>

#include "cpu_features.h"
#include "pool.h"

namespace qwen_rt {

void rms_norm_row_scalar(const float* x, const float* residual, const float* weight, float eps, int64_t size,
                         float* normed, float* summed) {
  double squares = 0.0;
  for (int64_t d = 0; d < size; ++d) {
    const float s = residual ? x[d] + residual[d] : x[d];
    if (summed) summed[d] = s;
    squares += static_cast<double>(s) * s;
  }
  const float scale = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(size) + eps));
  const float* s = summed ? summed : x;
  for (int64_t d = 0; d < size; ++d) normed[d] = s[d] * scale * weight[d];
}

void rms_norm(const RmsNormArgs& a) {
  auto kernel = rms_norm_row_scalar;
#if defined(__x86_64__)
  if (active_isa() >= Isa::kAvx2) kernel = rms_norm_row_avx2;
#endif
  constexpr int64_t kTaskElements = 8192;
  const int64_t rows = a.outer * a.inner;
  const int64_t chunk = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, a.size));
  parallel_for((rows + chunk - 1) / chunk, [&](int64_t task) {
    for (int64_t r = task * chunk; r < std::min(rows, (task + 1) * chunk); ++r) {
      const int64_t o = r / a.inner, i = r % a.inner;
      kernel(a.x.row(o, i), a.residual.data ? a.residual.row(o, i) : nullptr, a.weight, a.eps, a.size,
             a.normed.row(o, i), a.summed.data ? a.summed.row(o, i) : nullptr);
    }
  });
}

}  // namespace qwen_rt
