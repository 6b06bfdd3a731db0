// Which instruction set the kernels use; chosen at run time, changeable for tests.
#pragma once

namespace qwen_rt {

enum class Isa { kScalar = 0, kAvx2 = 1 };

// Best instruction set this processor (and the operating system's saved state) offers.
Isa best_isa();
// The one in use: best_isa() unless set_active_isa() chose a lower one.
Isa active_isa();
// Returns false, and changes nothing, when the processor lacks `isa`.
bool set_active_isa(Isa isa);
const char* isa_name(Isa isa);

}  // namespace qwen_rt
