// Python's view of the launcher: devices, modules, kernels. qwen_rt/backends/gpu/driver.py is the face users see.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"
#include "kernel_object.h"

namespace py = pybind11;

namespace qwen_rt {
namespace {

py::dict as_dict(const DeviceFacts& f) {
  py::dict d;
  d["index"] = f.index;
  d["name"] = f.name;
  d["total_memory"] = f.total_memory;
  d["compute_capability"] = py::make_tuple(f.major, f.minor);
  d["multiprocessors"] = f.multiprocessors;
  d["max_dynamic_shared"] = f.max_dynamic_shared;
  d["warp"] = f.warp;
  d["driver_version"] = f.driver_version;
  return d;
}

py::list as_list(const std::vector<DeviceFacts>& all) {
  py::list l;
  for (const DeviceFacts& f : all) l.append(as_dict(f));
  return l;
}

const char* kind_name(DeviceKind kind) {
  return kind == DeviceKind::kCuda ? "cuda" : kind == DeviceKind::kHip ? "hip" : "emu";
}

struct PyModule {
  std::shared_ptr<DeviceModule> module;
  DeviceKind kind;
};

py::object get_kernel(const PyModule& m, const std::string& name, const std::string& signature) {
  if (signature.size() > kMaxParameters || signature.find_first_not_of("Pilf") != std::string::npos) {
    throw std::invalid_argument(name + ": a signature is up to " + std::to_string(kMaxParameters) +
                                " of the letters P i l f, got \"" + signature + "\"");
  }
  return make_kernel(m.module->kernel(name, signature), m.kind, name, signature);
}

ThreadOrder order_of(const std::string& name) {
  if (name == "forward") return ThreadOrder::kForward;
  if (name == "reverse") return ThreadOrder::kReverse;
  if (name == "random") return ThreadOrder::kRandom;
  throw std::invalid_argument("order must be forward, reverse or random, not " + name);
}

}  // namespace
}  // namespace qwen_rt

PYBIND11_MODULE(_gpu, m) {
  using namespace qwen_rt;
  m.doc() = "qwen_rt GPU launcher: CUDA, HIP and the host emulator, opened at run time";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const DeviceError& e) {
      set_backend_error(e.what());
    }
  });
  bind_kernel(m);
  py::class_<PyModule>(m, "Module")
      .def("kernel", &get_kernel, py::arg("name"), py::arg("signature"))
      .def("names", [](const PyModule& self) { return self.module->names(); });
  py::class_<Device, std::shared_ptr<Device>>(m, "Device")
      .def_property_readonly("kind", [](const Device& d) { return kind_name(d.kind()); })
      .def_property_readonly("facts", [](const Device& d) { return as_dict(d.facts); })
      .def(
          "load", [](Device& d, const py::bytes& image) { return PyModule{d.load(image), d.kind()}; },
          py::arg("image"));
  m.def("cuda_devices", [] { return as_list(cuda_devices()); });
  m.def("hip_devices", [] { return as_list(hip_devices()); });
  m.def("open_cuda", &open_cuda, py::arg("index"));
  m.def("open_hip", &open_hip, py::arg("index"));
  m.def(
      "open_emulator",
      [](const std::string& path, const std::string& order, uint64_t seed, size_t max_dynamic_shared) {
        return open_emulator(path, order_of(order), seed, max_dynamic_shared);
      },
      py::arg("path"), py::arg("order"), py::arg("seed"), py::arg("max_dynamic_shared"));
}
