// The case that runs now: what a report names, whoever makes it.
#pragma once

#include <cstdint>

namespace check {

struct Running {
  const char* operation = "";
  int64_t index = -1;
  uint64_t seed = 0;
  const char* isa = "";
  char text[400] = "";
};

inline Running running;

}  // namespace check
