#include <dlfcn.h>

#include "device.h"

namespace qwen_rt {

Library::Library(const std::vector<std::string>& names, const std::string& hint) {
  for (const std::string& n : names) {
    handle_ = dlopen(n.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (handle_) {
      name_ = n;
      return;
    }
  }
  std::string reasons;
  for (const std::string& n : names) {
    handle_ = dlopen(n.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_) {
      name_ = n;
      return;
    }
    const char* why = dlerror();
    reasons += (reasons.empty() ? "" : "; ") + std::string(why ? why : n);
  }
  throw DeviceError(reasons + hint);
}

void* Library::lookup(const char* symbol) const { return dlsym(handle_, symbol); }

void* Library::require(const char* symbol) const {
  void* p = lookup(symbol);
  if (!p) throw DeviceError(name_ + " has no " + symbol + ": a newer driver is needed");
  return p;
}

}  // namespace qwen_rt
