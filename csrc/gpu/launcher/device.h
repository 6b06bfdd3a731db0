// Devices behind one interface: CUDA by its driver API, HIP by its module API, and the emulator. No toolkit header or
// library is needed to build this; the vendor's library is opened when a device is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace qwen_rt {

// A device that cannot serve, with the vendor's own words. Python sees qwen_rt.errors.BackendError.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct DeviceFacts {  // 0 or "" where the vendor does not say
  int index = 0;
  std::string name;
  uint64_t total_memory = 0;   // bytes
  int major = 0, minor = 0;    // CUDA compute capability
  int multiprocessors = 0;     // CUDA SMs
  int max_dynamic_shared = 0;  // bytes a block may ask for
  int warp = 0;
  int driver_version = 0;  // CUDA 1000 major + 10 minor; HIP as the runtime numbers itself
};

struct KernelFacts {
  int max_threads = 1024;  // its launch bound
  int registers = 0;       // a thread; 0 unknown
  int local_bytes = 0;     // spilled or indexed locals, a thread
  int static_shared = 0;   // bytes
};

struct LaunchShape {
  unsigned grid[3];
  unsigned block;
  unsigned dynamic_shared;  // bytes
  uintptr_t stream;
};

// One kernel on one device. launch() may be called from any thread that holds the GIL, or none for the emulator.
class DeviceKernel {
 public:
  virtual ~DeviceKernel() = default;
  virtual void launch(const LaunchShape& shape, void** args) = 0;
  KernelFacts facts;
};

class DeviceModule {
 public:
  virtual ~DeviceModule() = default;
  // signature: one letter a parameter, P i l f; checked against the image where the driver can tell.
  virtual std::unique_ptr<DeviceKernel> kernel(const std::string& name, const std::string& signature) = 0;
  virtual std::vector<std::string> names() const { return {}; }  // empty where the driver cannot list them
};

enum class DeviceKind { kCuda, kHip, kEmulator };

class Device {
 public:
  virtual ~Device() = default;
  virtual DeviceKind kind() const = 0;
  // A cubin, fatbin, PTX text or code object; nothing for the emulator, whose kernels came with its library.
  virtual std::shared_ptr<DeviceModule> load(const std::string& image) = 0;
  DeviceFacts facts;
};

enum class ThreadOrder { kForward = 0, kReverse = 1, kRandom = 2 };

// All devices, without making a context on any. DeviceError: the library is not there, or the driver's reason.
std::vector<DeviceFacts> cuda_devices();
std::vector<DeviceFacts> hip_devices();

// torch's own primary context of that device; the device must exist.
std::shared_ptr<Device> open_cuda(int index);
std::shared_ptr<Device> open_hip(int index);
// path: a library built from csrc/gpu/*.cu and emu.cpp. max_dynamic_shared in bytes, 0 for the emulator's 64 KiB.
std::shared_ptr<Device> open_emulator(const std::string& path, ThreadOrder order, uint64_t seed,
                                      size_t max_dynamic_shared);

// dlopen/dlsym with errors as DeviceError.
class Library {
 public:
  // The first of `names` that opens; one that is loaded already (torch's) is preferred. `hint` ends the error message.
  Library(const std::vector<std::string>& names, const std::string& hint);
  template <class F>
  void get(F*& function, const char* symbol) const {
    function = reinterpret_cast<F*>(require(symbol));
  }
  template <class F>
  void find(F*& function, const char* symbol) const {  // null where it is missing
    function = reinterpret_cast<F*>(lookup(symbol));
  }
  const std::string& name() const { return name_; }

 private:
  void* require(const char* symbol) const;
  void* lookup(const char* symbol) const;
  void* handle_ = nullptr;  // never closed: torch or a kernel may still be inside
  std::string name_;
};

}  // namespace qwen_rt
