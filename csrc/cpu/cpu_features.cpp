#include "cpu_features.h"

#include <atomic>

namespace qwen_rt {

Isa best_isa() {
#if defined(__x86_64__)
  static const bool avx2 = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }();
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kScalar;
}

static std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

Isa active_isa() { return chosen().load(std::memory_order_relaxed); }

bool set_active_isa(Isa isa) {
  if (static_cast<int>(isa) > static_cast<int>(best_isa())) return false;
  chosen().store(isa);
  return true;
}

const char* isa_name(Isa isa) { return isa == Isa::kAvx2 ? "avx2" : "scalar"; }

}  // namespace qwen_rt
