// HIP by its module API: AMD's runtime and Hygon's (libgalaxyhip), the one torch has loaded where it has.
#include "device.h"

namespace qwen_rt {
namespace {

using Result = int;
using ModuleHandle = void*;
using FunctionHandle = void*;

constexpr Result kSuccess = 0;
constexpr int kFuncMaxThreads = 0, kFuncShared = 1, kFuncLocal = 3, kFuncRegisters = 4;
constexpr int kLdsBytes = 64 << 10;  // of a workgroup, on every gfx9 part
constexpr int kWave = 64;

struct Api {
  Library library{{"libgalaxyhip.so.5", "libgalaxyhip.so", "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5",
                   "libamdhip64.so"},
                  " (no HIP runtime: for a Hygon DCU, source /opt/dtk/env.sh first)"};
  Result (*init)(unsigned);
  Result (*runtime_version)(int*);
  const char* (*error_string)(Result);
  const char* (*error_name)(Result);
  Result (*device_count)(int*);
  Result (*get_device)(int*);
  Result (*set_device)(int);
  Result (*device_name)(char*, int, int);
  Result (*device_memory)(size_t*, int);
  Result (*load)(ModuleHandle*, const void*);
  Result (*unload)(ModuleHandle);
  Result (*get_function)(FunctionHandle*, ModuleHandle, const char*);
  Result (*get_attribute)(int*, int, FunctionHandle);
  Result (*launch)(FunctionHandle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                   void**);
  Result (*last_error)();

  Api() {
    library.get(init, "hipInit");
    library.get(runtime_version, "hipRuntimeGetVersion");
    library.get(error_string, "hipGetErrorString");
    library.get(error_name, "hipGetErrorName");
    library.get(device_count, "hipGetDeviceCount");
    library.get(get_device, "hipGetDevice");
    library.get(set_device, "hipSetDevice");
    library.get(device_name, "hipDeviceGetName");
    library.get(device_memory, "hipDeviceTotalMem");
    library.get(load, "hipModuleLoadData");
    library.get(unload, "hipModuleUnload");
    library.get(get_function, "hipModuleGetFunction");
    library.get(get_attribute, "hipFuncGetAttribute");
    library.get(launch, "hipModuleLaunchKernel");
    library.find(last_error, "hipGetLastError");
    check(init(0), "hipInit");
  }

  std::string words(Result r) const {
    if (last_error) last_error();  // torch must not find our error as its own
    const char* name = error_name(r);
    const char* text = error_string(r);
    return std::string(name ? name : "HIP error " + std::to_string(r)) + (text ? std::string(": ") + text : "");
  }
  void check(Result r, const std::string& what) const {
    if (r != kSuccess) throw DeviceError(what + " failed: " + words(r) + " (" + library.name() + ")");
  }
};

const Api& api() {
  static const Api* instance = new Api();
  return *instance;
}

// The thread's current device for a scope.
class Use {
 public:
  Use(const Api& a, int wanted) : api_(a) {
    a.check(a.get_device(&before_), "hipGetDevice");
    changed_ = before_ != wanted;
    if (changed_) a.check(a.set_device(wanted), "hipSetDevice");
  }
  ~Use() {
    if (changed_) api_.set_device(before_);
  }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  const Api& api_;
  int before_ = 0;
  bool changed_ = false;
};

struct LoadedModule {
  std::string image;  // kept: some runtimes load its kernels lazily from this memory
  int device = 0;
  ModuleHandle handle = nullptr;
  ~LoadedModule() {
    try {
      const Use use(api(), device);
      if (handle) api().unload(handle);
    } catch (const DeviceError&) {  // the device is gone
    }
  }
};

class HipKernel final : public DeviceKernel {
 public:
  HipKernel(std::shared_ptr<LoadedModule> module, FunctionHandle function, std::string name)
      : api_(api()), module_(std::move(module)), function_(function), name_(std::move(name)) {
    const auto get = [&](int attribute) {
      int v = 0;
      api_.check(api_.get_attribute(&v, attribute, function_), name_ + ": hipFuncGetAttribute");
      return v;
    };
    facts.max_threads = get(kFuncMaxThreads);
    facts.static_shared = get(kFuncShared);
    facts.local_bytes = get(kFuncLocal);
    facts.registers = get(kFuncRegisters);
  }

  void launch(const LaunchShape& s, void** args) override {
    if (static_cast<int64_t>(s.dynamic_shared) + facts.static_shared > kLdsBytes) {
      throw DeviceError(name_ + ": " + std::to_string(s.dynamic_shared) + " bytes of dynamic and " +
                        std::to_string(facts.static_shared) + " of static shared memory exceed the 65536 of a block");
    }
    const Use use(api_, module_->device);
    const Result r = api_.launch(function_, s.grid[0], s.grid[1], s.grid[2], s.block, 1, 1, s.dynamic_shared,
                                 reinterpret_cast<void*>(s.stream), args, nullptr);
    if (r != kSuccess) throw DeviceError(name_ + ": hipModuleLaunchKernel failed: " + api_.words(r));
  }

 private:
  const Api& api_;
  std::shared_ptr<LoadedModule> module_;
  FunctionHandle function_;
  std::string name_;
};

class HipModule final : public DeviceModule {
 public:
  explicit HipModule(std::shared_ptr<LoadedModule> module) : module_(std::move(module)) {}

  std::unique_ptr<DeviceKernel> kernel(const std::string& name, const std::string&) override {
    const Use use(api(), module_->device);
    FunctionHandle f = nullptr;
    api().check(api().get_function(&f, module_->handle, name.c_str()), name + ": hipModuleGetFunction");
    return std::make_unique<HipKernel>(module_, f, name);
  }

 private:
  std::shared_ptr<LoadedModule> module_;
};

DeviceFacts facts_of(const Api& a, int index) {
  DeviceFacts f;
  f.index = index;
  char name[256] = {};
  a.check(a.device_name(name, sizeof name - 1, index), "hipDeviceGetName");
  f.name = name;
  size_t bytes = 0;
  a.check(a.device_memory(&bytes, index), "hipDeviceTotalMem");
  f.total_memory = bytes;
  f.max_dynamic_shared = kLdsBytes;
  f.warp = kWave;
  a.check(a.runtime_version(&f.driver_version), "hipRuntimeGetVersion");
  return f;
}

int count_devices(const Api& a) {
  int count = 0;
  a.check(a.device_count(&count), "hipGetDeviceCount");
  return count;
}

class HipDevice final : public Device {
 public:
  explicit HipDevice(int index) {
    const Api& a = api();
    const int count = count_devices(a);
    if (index < 0 || index >= count) {
      throw DeviceError("there is no HIP device " + std::to_string(index) + ": the runtime shows " +
                        std::to_string(count));
    }
    facts = facts_of(a, index);
  }

  DeviceKind kind() const override { return DeviceKind::kHip; }

  std::shared_ptr<DeviceModule> load(const std::string& image) override {
    const Api& a = api();
    const Use use(a, facts.index);
    auto loaded = std::make_shared<LoadedModule>();
    loaded->image = image;
    loaded->device = facts.index;
    a.check(a.load(&loaded->handle, loaded->image.data()), "hipModuleLoadData");
    return std::make_shared<HipModule>(std::move(loaded));
  }
};

}  // namespace

std::vector<DeviceFacts> hip_devices() {
  const Api& a = api();
  std::vector<DeviceFacts> all;
  for (int i = 0, n = count_devices(a); i < n; ++i) all.push_back(facts_of(a, i));
  return all;
}

std::shared_ptr<Device> open_hip(int index) { return std::make_shared<HipDevice>(index); }

}  // namespace qwen_rt
