#include "cpu_features.h"

#include <atomic>
#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace qwen_rt {

bool has_isa(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2 || isa == Isa::kAvx512) {
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(QWEN_RT_EMULATED_AVX512)  // tests/native/emulated_avx512
    const bool avx512 = true;
#else
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
#endif
    return avx2 && (isa == Isa::kAvx2 || avx512);
  }
#elif defined(__aarch64__) && defined(__linux__)
  if (isa == Isa::kNeon) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__aarch64__) && defined(__APPLE__)
  if (isa == Isa::kNeon) {
    int there = 0;
    size_t size = sizeof(there);
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &there, &size, nullptr, 0) == 0 && there;
  }
#endif
  return isa == Isa::kScalar;
}

Isa default_isa() {
  static const Isa best = has_isa(Isa::kAvx512) ? Isa::kAvx512 : has_isa(Isa::kAvx2) ? Isa::kAvx2 : Isa::kScalar;
  return best;
}

static std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{default_isa()};
  return isa;
}

Isa active_isa() { return chosen().load(std::memory_order_relaxed); }

bool set_active_isa(Isa isa) {
  if (!has_isa(isa)) return false;
  chosen().store(isa);
  return true;
}

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "neon"};
  return kNames[static_cast<int>(isa)];
}

Isa isa_named(const std::string& name) {
  for (Isa isa : kIsas) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("no instruction set is called " + name + "; there are scalar, avx2, avx512 and neon");
}

}  // namespace qwen_rt
