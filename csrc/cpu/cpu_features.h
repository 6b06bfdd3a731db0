// Which instruction set the kernels use; chosen at run time, changeable for tests.
#pragma once

#include <string>

namespace qwen_rt {

// kAvx2: AVX2, FMA, F16C. kAvx512: also AVX-512 F, BW, DQ, VL and VNNI. kNeon: AArch64 with FEAT_DotProd. An operation
// without a kernel for one uses the one below: AVX-512, AVX2, scalar; NEON, scalar.
enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3 };
constexpr Isa kIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kNeon};

// Whether this processor (and the operating system's saved state) offers `isa`.
bool has_isa(Isa isa);
// The best it offers, of those that a real machine has run: never kNeon so far (docs/hardware.md).
Isa default_isa();
// The one in use: default_isa() unless set_active_isa() chose another.
Isa active_isa();
// Returns false, and changes nothing, when the processor lacks `isa`.
bool set_active_isa(Isa isa);
const char* isa_name(Isa isa);
// The instruction set called `name`; throws std::invalid_argument that lists the names.
Isa isa_named(const std::string& name);

}  // namespace qwen_rt
