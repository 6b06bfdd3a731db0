// Registering an operator: SIM_OP(aclnnName, on, "documentation", check, run).
//
//   on             kBoth or kOnly910B, from the product table of the operator's documentation
//   documentation  path of its page in CANN's open repositories (gitcode.com/cann), `docs/aclnnName.md` under it
//   check          the restrictions that the page states, on descriptors; throws Refused. kNoCheck: none beyond types
//   run            the operator; on a worker thread
//
// The two exported C functions get their signature from `run`. `check` takes the same arguments, packed.
#pragma once

#include <type_traits>

#include "abi.h"

namespace cannsim {

enum On { kBoth, kOnly910B };
constexpr std::nullptr_t kNoCheck = nullptr;

struct OpInfo {
  const char* name;
  On on;
  const char* documentation;
};

struct Registered {
  explicit Registered(const OpInfo& info);
};

// Throws Refused: "aclnnName: text".
void require(bool holds, const std::string& text, int code = kParamInvalid);

// --- wording shared by checks
bool is_float(aclDataType type);  // FLOAT16, BFLOAT16, FLOAT
bool is_half(aclDataType type);   // FLOAT16, BFLOAT16
bool is_index(aclDataType type);  // INT32, INT64
void require_float(const Desc& d, const char* name);
void require_half(const Desc& d, const char* name);
void require_same_type(const Desc& a, const Desc& b, const char* names);
void require_same_shape(const Desc& a, const Desc& b, const char* names);
void require_contiguous(const Desc& d, const char* name);

// --- results
// 16-bit inputs are widened to float32, the result is rounded to the output's type once.
inline Tensor wide(const Tensor& t) {
  return t.defined() && at::isReducedFloatingType(t.scalar_type()) ? t.to(at::kFloat) : t;
}
void put(const Tensor& out, const Tensor& value);

int run_checked(const OpInfo& info, const std::function<void()>& body);
void require_types(const OpInfo& info, const Desc& desc);

template <class T>
void require_types(const OpInfo&, const T&) {}
inline void require_types(const OpInfo& info, const Descs& descs) {
  for (const Desc& d : descs) require_types(info, d);
}

template <auto Check, auto Run>
struct Entry;
template <auto Check, class... A, void (*Run)(A...)>
struct Entry<Check, Run> {
  template <const OpInfo* kInfo>
  static int workspace(typename Arg<std::decay_t<A>>::C... args, uint64_t* bytes, aclOpExecutor** executor) {
    return run_checked(*kInfo, [&] {
      auto packed = std::make_tuple(Arg<std::decay_t<A>>::pack(args)...);
      std::apply([](const auto&... p) { (require_types(*kInfo, p), ...); }, packed);
      if constexpr (!std::is_null_pointer_v<decltype(Check)>) std::apply(Check, packed);
      *bytes = 0;
      *executor = new aclOpExecutor{kInfo->name,
                                    [packed = std::move(packed)] { call(packed, std::index_sequence_for<A...>()); }};
    });
  }
  template <class Packed, size_t... I>
  static void call(const Packed& packed, std::index_sequence<I...>) {
    Run(Arg<std::decay_t<A>>::unpack(std::get<I>(packed))...);
  }
};

int launch(aclOpExecutor* executor, aclrtStream stream);

}  // namespace cannsim

// aclnn<Op>GetWorkspaceSize has another C signature for every operator: the exported symbol is one jump to the template
// instance, arguments untouched.
#if defined(__x86_64__)
#define CANNSIM_JUMP(symbol, target) "\t" symbol ": jmp *" target "(%rip)\n"
#elif defined(__aarch64__)
#define CANNSIM_JUMP(symbol, target) \
  "\t" symbol ": adrp x16, " target "\n\tldr x16, [x16, :lo12:" target "]\n\tbr x16\n"
#else
#error "no jump for this architecture"
#endif

#define SIM_OP(name, on, documentation, check, ...)                                                               \
  namespace {                                                                                                     \
  constexpr cannsim::OpInfo info_##name{#name, cannsim::on, documentation};                                       \
  const cannsim::Registered registered_##name(info_##name);                                                       \
  constexpr auto run_##name = __VA_ARGS__;                                                                        \
  }                                                                                                               \
  extern "C" {                                                                                                    \
  __attribute__((visibility("hidden"), used)) void* entry_##name =                                                \
      reinterpret_cast<void*>(&cannsim::Entry<check, +run_##name>::template workspace<&info_##name>);             \
  }                                                                                                               \
  __asm__(".pushsection .text\n.globl " #name "GetWorkspaceSize\n.type " #name                                    \
          "GetWorkspaceSize,%function\n" CANNSIM_JUMP(#name "GetWorkspaceSize", "entry_" #name) ".popsection\n"); \
  CANNSIM_API int name(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {                            \
    return cannsim::launch(executor, stream);                                                                     \
  }
