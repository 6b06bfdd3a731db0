// The host emulator as a device: a library built from csrc/gpu/*.cu and csrc/gpu/emu/emu.cpp.
#include <mutex>

#include "device.h"

namespace qwen_rt {
namespace {

constexpr int kInterfaceVersion = 1;  // of emu.h's C functions

struct Api {
  Library library;
  int (*version)();
  int (*warp)();
  int (*count)();
  const char* (*name)(int);
  const char* (*signature)(int);
  int (*find)(const char*);
  int (*bound)(int);
  void (*configure)(int, uint64_t, size_t);
  int (*launch)(int, unsigned, unsigned, unsigned, unsigned, size_t, void**);
  const char* (*error)();

  explicit Api(const std::string& path) : library({path}, "") {
    library.get(version, "qrt_emu_version");
    if (version() != kInterfaceVersion) {
      throw DeviceError(path + " is an emulator of interface " + std::to_string(version()) + ", not " +
                        std::to_string(kInterfaceVersion) + ": build it again");
    }
    library.get(warp, "qrt_emu_warp");
    library.get(count, "qrt_emu_count");
    library.get(name, "qrt_emu_name");
    library.get(signature, "qrt_emu_signature");
    library.get(find, "qrt_emu_find");
    library.get(bound, "qrt_emu_bound");
    library.get(configure, "qrt_emu_configure");
    library.get(launch, "qrt_emu_launch");
    library.get(error, "qrt_emu_error");
  }
};

struct Settings {
  int order;
  uint64_t seed;
  size_t max_dynamic_shared;
};

std::mutex& turn() {  // two devices may share one library: its settings hold for one launch
  static std::mutex* m = new std::mutex();
  return *m;
}

class EmulatorKernel final : public DeviceKernel {
 public:
  EmulatorKernel(std::shared_ptr<Api> api, Settings settings, int index)
      : api_(std::move(api)), settings_(settings), index_(index) {
    facts.max_threads = api_->bound(index);
  }
  void launch(const LaunchShape& s, void** args) override {
    const std::lock_guard<std::mutex> lock(turn());
    api_->configure(settings_.order, settings_.seed, settings_.max_dynamic_shared);
    if (api_->launch(index_, s.grid[0], s.grid[1], s.grid[2], s.block, s.dynamic_shared, args)) {
      throw DeviceError(api_->error());
    }
  }

 private:
  std::shared_ptr<Api> api_;
  Settings settings_;
  int index_;
};

class EmulatorModule final : public DeviceModule {
 public:
  EmulatorModule(std::shared_ptr<Api> api, Settings settings) : api_(std::move(api)), settings_(settings) {}
  std::unique_ptr<DeviceKernel> kernel(const std::string& name, const std::string& signature) override {
    const int i = api_->find(name.c_str());
    if (i < 0) throw DeviceError(name + ": not in " + api_->library.name() + " (is it registered with QRT_REGISTER?)");
    if (signature != api_->signature(i)) {
      throw DeviceError(name + " takes \"" + api_->signature(i) + "\", not \"" + signature + "\"");
    }
    return std::make_unique<EmulatorKernel>(api_, settings_, i);
  }
  std::vector<std::string> names() const override {
    std::vector<std::string> all;
    for (int i = 0; i < api_->count(); ++i) all.emplace_back(api_->name(i));
    return all;
  }

 private:
  std::shared_ptr<Api> api_;
  Settings settings_;
};

class Emulator final : public Device {
 public:
  Emulator(const std::string& path, Settings settings) : api_(std::make_shared<Api>(path)), settings_(settings) {
    facts.name = "host emulator, warp " + std::to_string(api_->warp());
    facts.warp = api_->warp();
    facts.max_dynamic_shared = static_cast<int>(settings.max_dynamic_shared ? settings.max_dynamic_shared : 64 << 10);
  }
  DeviceKind kind() const override { return DeviceKind::kEmulator; }
  std::shared_ptr<DeviceModule> load(const std::string&) override {
    return std::make_shared<EmulatorModule>(api_, settings_);
  }

 private:
  std::shared_ptr<Api> api_;
  Settings settings_;
};

}  // namespace

std::shared_ptr<Device> open_emulator(const std::string& path, ThreadOrder order, uint64_t seed,
                                      size_t max_dynamic_shared) {
  return std::make_shared<Emulator>(path, Settings{static_cast<int>(order), seed, max_dynamic_shared});
}

}  // namespace qwen_rt
