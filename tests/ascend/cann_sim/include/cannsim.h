// Shared by the software NPU's two libraries: libascendcl.so (runtime/) owns everything declared here,
// libopapi.so (ops/) calls it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "acl/acl.h"

#define CANNSIM_SHARED __attribute__((visibility("default")))
#define CANNSIM_API extern "C" CANNSIM_SHARED

namespace cannsim {

// Codes that CANN documents for the aclnn two-phase interface (aclnn return codes) and for the runtime.
constexpr int kParamNullptr = 161001;
constexpr int kParamInvalid = 161002;
constexpr int kRuntimeError = 361001;
constexpr int kTilingError = 561002;
constexpr int kStreamCaptured = 107025;
constexpr int kVectorCoreException = 507035;

// The two product families that differ in operators: "Atlas 训练系列产品" is the first 910 (910A, 910 Pro),
// "Atlas A2 训练系列产品/Atlas A2 推理系列产品" is the 910B.
enum class Family { k910A, k910B };

struct Chip {
  const char* name;  // what aclrtGetSocName reports
  Family family;
  int cube_cores;
  int vector_cores;
  uint64_t hbm_bytes;
  uint64_t l2_bytes;
};

// The chip that CANNSIM_SOC names; an unknown name ends the process with the list of known ones.
CANNSIM_SHARED const Chip& chip();

// Environment variable `name`, or `fallback` when unset or empty.
CANNSIM_SHARED const char* env(const char* name, const char* fallback);

// A refusal with CANN's status code; caught at the C boundary or by the stream's worker.
class Refused : public std::runtime_error {
 public:
  Refused(int code, const std::string& what) : std::runtime_error(what), code(code) {}
  int code;
};

// Prints "[cannsim] ERROR ...", keeps it for aclGetRecentErrMsg, aborts under CANNSIM_ON_ERROR=abort; returns `code`.
CANNSIM_SHARED int report(int code, const std::string& message);

// One line on stderr under CANNSIM_TRACE=1.
CANNSIM_SHARED void trace(const char* format, ...) __attribute__((format(printf, 1, 2)));

using Work = std::function<int()>;

// Hands `work` to the stream: its worker thread runs it in order; while the stream captures, it becomes a graph node
// instead. The closure owns its arguments (device memory it only points into: a replay reads it again).
CANNSIM_SHARED int submit(aclrtStream stream, const std::string& name, Work work);

// Host address behind a device address. Only a stream's worker thread may ask, for memory of its own device.
// Throws Refused, naming `who`, for freed, foreign, overrun or host memory and for a call from any other thread.
CANNSIM_SHARED void* resolve(const void* device_address, size_t bytes, const std::string& who);

}  // namespace cannsim
