// Which instruction set the kernels use; chosen at run time, changeable for tests.
#pragma once

#include <string>

namespace qwen_rt {

// kAvx2: AVX2, FMA, F16C. kAvx512: also AVX-512 F, BW, DQ, VL and VNNI. Each includes those before it; an operation
// without a kernel for one uses the one below.
enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// Best instruction set this processor (and the operating system's saved state) offers.
Isa best_isa();
// The one in use: best_isa() unless set_active_isa() chose a lower one.
Isa active_isa();
// Returns false, and changes nothing, when the processor lacks `isa`.
bool set_active_isa(Isa isa);
const char* isa_name(Isa isa);
// The instruction set called `name`; throws std::invalid_argument that lists the names.
Isa isa_named(const std::string& name);

}  // namespace qwen_rt
