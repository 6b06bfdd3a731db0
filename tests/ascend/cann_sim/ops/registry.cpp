#include "registry.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cstdio>

namespace cannsim {
namespace {

std::vector<const OpInfo*>& all() {
  static std::vector<const OpInfo*> ops;
  return ops;
}

}  // namespace

Registered::Registered(const OpInfo& info) { all().push_back(&info); }

void require(bool holds, const std::string& text, int code) {
  if (!holds) throw Refused(code, text);
}

bool is_float(aclDataType t) { return t == ACL_FLOAT || is_half(t); }
bool is_half(aclDataType t) { return t == ACL_FLOAT16 || t == ACL_BF16; }
bool is_index(aclDataType t) { return t == ACL_INT32 || t == ACL_INT64; }

void require_float(const Desc& d, const char* name) {
  require(static_cast<bool>(d), std::string(name) + " is null", kParamNullptr);
  require(is_float(d.type()), std::string(name) + " must be FLOAT16, BFLOAT16 or FLOAT, not " + type_name(d.type()));
}
void require_half(const Desc& d, const char* name) {
  require(static_cast<bool>(d), std::string(name) + " is null", kParamNullptr);
  require(is_half(d.type()), std::string(name) + " must be FLOAT16 or BFLOAT16, not " + type_name(d.type()));
}
void require_same_type(const Desc& a, const Desc& b, const char* names) {
  require(a.type() == b.type(),
          std::string(names) + " must have one data type, not " + type_name(a.type()) + " and " + type_name(b.type()));
}
void require_same_shape(const Desc& a, const Desc& b, const char* names) {
  require(a.dims() == b.dims(), std::string(names) + " must have one shape, not " + a.shape() + " and " + b.shape());
}
void require_contiguous(const Desc& d, const char* name) {
  require(d.contiguous(), std::string(name) + " must be contiguous");
}

void put(const Tensor& out, const Tensor& value) {
  out.copy_(value.sizes() == out.sizes() ? value : value.expand_as(out));
}

void require_types(const OpInfo&, const Desc& desc) {
  if (!desc) return;
  scalar_type(desc.type());  // throws for types that are not simulated
  require(desc.type() != ACL_BF16 || chip().family == Family::k910B,
          std::string("BFLOAT16 is not supported on ") + chip().name);
}

int run_checked(const OpInfo& info, const std::function<void()>& body) {
  auto failed = [&](int code, const std::string& text) {
    return report(code, std::string(info.name) + ": " + text + " (" + info.documentation + ")");
  };
  try {
    require(info.on == kBoth || chip().family == Family::k910B, std::string("not supported on ") + chip().name,
            kRuntimeError);
    body();
    return ACL_SUCCESS;
  } catch (const Refused& e) {
    return failed(e.code, e.what());
  } catch (const std::exception& e) {
    return failed(kParamInvalid, e.what());
  }
}

int launch(aclOpExecutor* executor, aclrtStream stream) {
  if (!executor) return report(kParamNullptr, "an operator was launched without an executor");
  const std::string name = executor->name;
  auto run = std::move(executor->run);
  delete executor;
  return submit(stream, name, [name, run] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    try {
      run();
      return static_cast<int>(ACL_SUCCESS);
    } catch (const Refused& e) {
      return report(e.code, name + ": " + e.what());
    } catch (const std::exception& e) {
      return report(kVectorCoreException, name + ": " + e.what());
    }
  });
}

}  // namespace cannsim

// For `make list` and for documentation: one line an operator.
CANNSIM_API void cannsim_list_operators() {
  using cannsim::OpInfo;
  auto ops = cannsim::all();
  std::sort(ops.begin(), ops.end(), [](const OpInfo* a, const OpInfo* b) { return std::string(a->name) < b->name; });
  for (const OpInfo* op : ops)
    printf("%-36s %-10s %s\n", op->name, op->on == cannsim::kBoth ? "910A,910B" : "910B", op->documentation);
  fflush(stdout);
}
