// The Python object that is called to launch a kernel: no allocation between the call and the driver.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "device.h"

namespace qwen_rt {

constexpr size_t kMaxParameters = 48;

// Registers the type (`_gpu.Kernel`) in a module; once.
void bind_kernel(pybind11::module_& m);
// kernel(grid, block, *args, shared=0, stream=0): see driver.py.
pybind11::object make_kernel(std::unique_ptr<DeviceKernel> kernel, DeviceKind kind, const std::string& name,
                             const std::string& signature);
// Raises qwen_rt.errors.BackendError in Python.
void set_backend_error(const char* message);

}  // namespace qwen_rt
