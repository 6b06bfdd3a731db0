// A checked view of a numpy array passed from Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace qwen_rt {

enum class DType { kFloat32, kFloat16, kBFloat16, kInt64, kInt32, kInt16, kUInt8 };

const char* dtype_name(DType dtype);

struct View {
  void* data = nullptr;
  int ndim = 0;
  int64_t shape[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 0};  // elements
  DType dtype = DType::kFloat32;

  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
};

// An array of `ndim` (<= 4) dimensions whose last one is contiguous. Throws std::invalid_argument naming `what`.
View view_any(pybind11::handle tensor, int ndim, const char* what);
View view(pybind11::handle tensor, DType expected, int ndim, const char* what);
// As view(), and the whole array must be contiguous.
View view_contiguous(pybind11::handle tensor, DType expected, int ndim, const char* what);
// What holds an array's memory: the first in the chain of its bases that is not an array, or the last array.
pybind11::object memory_behind(pybind11::handle tensor);
// Throws std::invalid_argument unless condition; message "what: ...".
void require(bool condition, const char* message);

}  // namespace qwen_rt
