// CUDA by its driver API (cuda.h's types and numbers are declared here, so that no toolkit is needed).
#include <cstring>
#include <map>
#include <mutex>

#include "device.h"

namespace qwen_rt {
namespace {

using Result = int;
using DeviceId = int;
using Context = void*;
using ModuleHandle = void*;
using FunctionHandle = void*;

constexpr Result kSuccess = 0;
constexpr int kJitInfoLog = 3, kJitInfoLogBytes = 4, kJitErrorLog = 5, kJitErrorLogBytes = 6;
constexpr int kFuncMaxThreads = 0, kFuncShared = 1, kFuncLocal = 3, kFuncRegisters = 4, kFuncMaxDynamicShared = 8;
constexpr int kDeviceWarp = 10, kDeviceMultiprocessors = 16, kDeviceMajor = 75, kDeviceMinor = 76, kDeviceOptIn = 97;
constexpr unsigned kDynamicSharedWithoutAsking = 48 << 10;  // less the static part
constexpr size_t kLogBytes = 16 << 10;

struct Api {
  Library library{{"libcuda.so.1", "libcuda.so"}, " (the NVIDIA driver is not installed, or not visible here)"};
  Result (*init)(unsigned);
  Result (*driver_version)(int*);
  Result (*error_string)(Result, const char**);
  Result (*error_name)(Result, const char**);
  Result (*device_count)(int*);
  Result (*device_get)(DeviceId*, int);
  Result (*device_name)(char*, int, DeviceId);
  Result (*device_memory)(size_t*, DeviceId);
  Result (*device_attribute)(int*, int, DeviceId);
  Result (*retain)(Context*, DeviceId);
  Result (*current)(Context*);
  Result (*push)(Context);
  Result (*pop)(Context*);
  Result (*load)(ModuleHandle*, const void*, unsigned, int*, void**);
  Result (*unload)(ModuleHandle);
  Result (*get_function)(FunctionHandle*, ModuleHandle, const char*);
  Result (*get_attribute)(int*, int, FunctionHandle);
  Result (*set_attribute)(FunctionHandle, int, int);
  Result (*launch)(FunctionHandle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                   void**);
  Result (*param_info)(FunctionHandle, size_t, size_t*, size_t*);  // from CUDA 12.4

  Api() {
    library.get(init, "cuInit");
    library.get(driver_version, "cuDriverGetVersion");
    library.get(error_string, "cuGetErrorString");
    library.get(error_name, "cuGetErrorName");
    library.get(device_count, "cuDeviceGetCount");
    library.get(device_get, "cuDeviceGet");
    library.get(device_name, "cuDeviceGetName");
    library.get(device_memory, "cuDeviceTotalMem_v2");
    library.get(device_attribute, "cuDeviceGetAttribute");
    library.get(retain, "cuDevicePrimaryCtxRetain");
    library.get(current, "cuCtxGetCurrent");
    library.get(push, "cuCtxPushCurrent_v2");
    library.get(pop, "cuCtxPopCurrent_v2");
    library.get(load, "cuModuleLoadDataEx");
    library.get(unload, "cuModuleUnload");
    library.get(get_function, "cuModuleGetFunction");
    library.get(get_attribute, "cuFuncGetAttribute");
    library.get(set_attribute, "cuFuncSetAttribute");
    library.get(launch, "cuLaunchKernel");
    library.find(param_info, "cuFuncGetParamInfo");
    check(init(0), "cuInit");
  }

  std::string words(Result r) const {
    const char* name = nullptr;
    const char* text = nullptr;
    error_name(r, &name);
    error_string(r, &text);
    return std::string(name ? name : "CUDA error " + std::to_string(r)) + (text ? std::string(": ") + text : "");
  }
  void check(Result r, const std::string& what) const {
    if (r != kSuccess) throw DeviceError(what + " failed: " + words(r));
  }
};

// A failed start is tried again at the next call: the reason may have gone (a container given its devices later).
const Api& api() {
  static const Api* instance = new Api();
  return *instance;
}

// Makes a context the thread's current one for a scope; nothing to do where it is already, as after any torch call.
class Use {
 public:
  Use(const Api& a, Context wanted) : api_(a) {
    Context now = nullptr;
    a.check(a.current(&now), "cuCtxGetCurrent");
    if (now == wanted) return;
    a.check(a.push(wanted), "cuCtxPushCurrent");
    pushed_ = true;
  }
  ~Use() {
    Context old;
    if (pushed_) api_.pop(&old);
  }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  const Api& api_;
  bool pushed_ = false;
};

struct LoadedModule {
  Context context;
  ModuleHandle handle;
  ~LoadedModule() {
    try {
      const Use use(api(), context);
      api().unload(handle);
    } catch (const DeviceError&) {  // the context is gone, and the module with it
    }
  }
};

class CudaKernel final : public DeviceKernel {
 public:
  CudaKernel(std::shared_ptr<LoadedModule> module, FunctionHandle function, std::string name, int most_shared)
      : api_(api()), module_(std::move(module)), function_(function), name_(std::move(name)), most_(most_shared) {
    const auto get = [&](int attribute) {
      int v = 0;
      api_.check(api_.get_attribute(&v, attribute, function_), name_ + ": cuFuncGetAttribute");
      return v;
    };
    facts.max_threads = get(kFuncMaxThreads);
    facts.static_shared = get(kFuncShared);
    facts.local_bytes = get(kFuncLocal);
    facts.registers = get(kFuncRegisters);
    const unsigned fixed = static_cast<unsigned>(facts.static_shared);
    allowed_ = fixed < kDynamicSharedWithoutAsking ? kDynamicSharedWithoutAsking - fixed : 0;
  }

  void launch(const LaunchShape& s, void** args) override {
    const Use use(api_, module_->context);
    if (s.dynamic_shared > allowed_) ask_shared(s.dynamic_shared);
    const Result r = api_.launch(function_, s.grid[0], s.grid[1], s.grid[2], s.block, 1, 1, s.dynamic_shared,
                                 reinterpret_cast<void*>(s.stream), args, nullptr);
    if (r != kSuccess) throw DeviceError(name_ + ": cuLaunchKernel failed: " + api_.words(r));
  }

 private:
  void ask_shared(unsigned bytes) {
    if (static_cast<int64_t>(bytes) + facts.static_shared > most_) {
      throw DeviceError(name_ + ": " + std::to_string(bytes) + " bytes of dynamic and " +
                        std::to_string(facts.static_shared) + " of static shared memory exceed this card's " +
                        std::to_string(most_));
    }
    api_.check(api_.set_attribute(function_, kFuncMaxDynamicShared, static_cast<int>(bytes)),
               name_ + ": cuFuncSetAttribute");
    allowed_ = bytes;
  }

  const Api& api_;
  std::shared_ptr<LoadedModule> module_;
  FunctionHandle function_;
  std::string name_;
  int most_;
  unsigned allowed_;
};

class CudaModule final : public DeviceModule {
 public:
  CudaModule(std::shared_ptr<LoadedModule> module, int most_shared) : module_(std::move(module)), most_(most_shared) {}

  std::unique_ptr<DeviceKernel> kernel(const std::string& name, const std::string& signature) override {
    const Use use(api(), module_->context);
    FunctionHandle f = nullptr;
    api().check(api().get_function(&f, module_->handle, name.c_str()), name + ": cuModuleGetFunction");
    if (api().param_info) check_parameters(f, name, signature);
    return std::make_unique<CudaKernel>(module_, f, name, most_);
  }

 private:
  static void check_parameters(FunctionHandle f, const std::string& name, const std::string& signature) {
    size_t offset = 0, size = 0, count = 0;
    while (api().param_info(f, count, &offset, &size) == kSuccess) {
      const char letter = count < signature.size() ? signature[count] : '?';
      const size_t expected = letter == 'P' || letter == 'l' ? 8 : 4;
      if (letter == '?' || size != expected) {
        throw DeviceError(name + ": parameter " + std::to_string(count) + " takes " + std::to_string(size) +
                          " bytes, which the signature \"" + signature + "\" does not say");
      }
      ++count;
    }
    if (count != signature.size()) {
      throw DeviceError(name + " takes " + std::to_string(count) + " parameters, not \"" + signature + "\"");
    }
  }

  std::shared_ptr<LoadedModule> module_;
  int most_;
};

DeviceFacts facts_of(const Api& a, int index) {
  DeviceId id = 0;
  a.check(a.device_get(&id, index), "cuDeviceGet");
  DeviceFacts f;
  f.index = index;
  char name[256] = {};
  a.check(a.device_name(name, sizeof name - 1, id), "cuDeviceGetName");
  f.name = name;
  size_t bytes = 0;
  a.check(a.device_memory(&bytes, id), "cuDeviceTotalMem");
  f.total_memory = bytes;
  const auto get = [&](int attribute) {
    int v = 0;
    a.check(a.device_attribute(&v, attribute, id), "cuDeviceGetAttribute");
    return v;
  };
  f.major = get(kDeviceMajor);
  f.minor = get(kDeviceMinor);
  f.multiprocessors = get(kDeviceMultiprocessors);
  f.max_dynamic_shared = get(kDeviceOptIn);
  f.warp = get(kDeviceWarp);
  a.check(a.driver_version(&f.driver_version), "cuDriverGetVersion");
  return f;
}

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) {
    const Api& a = api();
    int count = 0;
    a.check(a.device_count(&count), "cuDeviceGetCount");
    if (index < 0 || index >= count) {
      throw DeviceError("there is no CUDA device " + std::to_string(index) + ": the driver shows " +
                        std::to_string(count));
    }
    facts = facts_of(a, index);
    DeviceId id = 0;
    a.check(a.device_get(&id, index), "cuDeviceGet");
    a.check(a.retain(&context_, id), "cuDevicePrimaryCtxRetain");  // kept for the process: torch uses it as well
  }

  DeviceKind kind() const override { return DeviceKind::kCuda; }

  std::shared_ptr<DeviceModule> load(const std::string& image) override {
    const Api& a = api();
    const Use use(a, context_);
    std::vector<char> info(kLogBytes, 0), error(kLogBytes, 0);
    int options[] = {kJitInfoLog, kJitInfoLogBytes, kJitErrorLog, kJitErrorLogBytes};
    void* values[] = {info.data(), reinterpret_cast<void*>(kLogBytes), error.data(),
                      reinterpret_cast<void*>(kLogBytes)};
    ModuleHandle handle = nullptr;
    const Result r = a.load(&handle, image.c_str(), 4, options, values);  // c_str: PTX text must end in a zero
    if (r != kSuccess) {
      const std::string log = error[0] ? ": " + std::string(error.data()) : "";
      throw DeviceError("cuModuleLoadDataEx failed: " + a.words(r) + log);
    }
    auto loaded = std::make_shared<LoadedModule>();
    loaded->context = context_;
    loaded->handle = handle;
    return std::make_shared<CudaModule>(std::move(loaded), facts.max_dynamic_shared);
  }

 private:
  Context context_ = nullptr;
};

}  // namespace

std::vector<DeviceFacts> cuda_devices() {
  const Api& a = api();
  int count = 0;
  a.check(a.device_count(&count), "cuDeviceGetCount");
  std::vector<DeviceFacts> all;
  for (int i = 0; i < count; ++i) all.push_back(facts_of(a, i));
  return all;
}

std::shared_ptr<Device> open_cuda(int index) { return std::make_shared<CudaDevice>(index); }

}  // namespace qwen_rt
