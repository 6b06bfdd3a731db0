#include "tensor_arg.h"

#include <pybind11/numpy.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace qwen_rt {
namespace {

[[noreturn]] void fail(const char* what, const std::string& why) {
  throw std::invalid_argument(std::string(what) + ": " + why);
}

using Npy = py::detail::npy_api;

// ml_dtypes gives bfloat16 a number of its own in every process.
bool is_bfloat16(const py::dtype& dtype) {
  static int number = -1;  // under the interpreter lock
  if (dtype.num() == number) return true;
  if (dtype.kind() != 'V' || dtype.itemsize() != 2 || py::str(dtype.attr("name")).cast<std::string>() != "bfloat16") {
    return false;
  }
  number = dtype.num();
  return true;
}

bool find_dtype(const py::dtype& dtype, DType* out) {
  if (dtype.byteorder() != '=' && dtype.byteorder() != '|') return false;
  switch (dtype.num()) {
    case Npy::NPY_FLOAT_:
      *out = DType::kFloat32;
      return true;
    case Npy::NPY_UBYTE_:
      *out = DType::kUInt8;
      return true;
  }
  if (dtype.kind() == 'i' && dtype.itemsize() > 1) {
    *out = dtype.itemsize() == 8 ? DType::kInt64 : dtype.itemsize() == 4 ? DType::kInt32 : DType::kInt16;
    return true;
  }
  const bool half = dtype.kind() == 'f' && dtype.itemsize() == 2;
  *out = half ? DType::kFloat16 : DType::kBFloat16;
  return half || is_bfloat16(dtype);
}

}  // namespace

const char* dtype_name(DType dtype) {
  const char* table[] = {"float32", "float16", "bfloat16", "int64", "int32", "int16", "uint8"};
  return table[static_cast<int>(dtype)];
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

View view_any(py::handle tensor, int ndim, const char* what) {
  if (!py::isinstance<py::array>(tensor)) {
    fail(what, "expected a numpy array, got " + std::string(py::str(py::type::handle_of(tensor).attr("__name__"))));
  }
  const auto a = py::reinterpret_borrow<py::array>(tensor);
  View v;
  if (!find_dtype(a.dtype(), &v.dtype)) fail(what, "dtype " + std::string(py::str(a.dtype())) + " is not supported");
  v.ndim = static_cast<int>(a.ndim());
  if (v.ndim != ndim) {
    fail(what, "expected " + std::to_string(ndim) + " dimensions, got shape " +
                   std::string(py::str(tensor.attr("shape"))));
  }
  const int64_t size = a.itemsize();
  for (int i = 0; i < ndim; ++i) v.shape[i] = a.shape(i);
  for (int i = ndim - 1; i >= 0; --i) {
    if (a.size() == 0) {  // numpy gives arrays without elements any strides
      v.stride[i] = i == ndim - 1 ? 1 : v.stride[i + 1] * v.shape[i + 1];
      continue;
    }
    v.stride[i] = a.strides(i) / size;
    if (a.strides(i) % size) fail(what, "its strides must be whole elements");
  }
  if (ndim > 0 && v.stride[ndim - 1] != 1 && v.shape[ndim - 1] > 1) fail(what, "last dimension must be contiguous");
  if (!(a.flags() & Npy::NPY_ARRAY_ALIGNED_)) fail(what, "must be aligned");
  v.data = const_cast<void*>(a.data());
  return v;
}

View view(py::handle tensor, DType expected, int ndim, const char* what) {
  View v = view_any(tensor, ndim, what);
  if (v.dtype != expected) {
    fail(what, std::string("expected ") + dtype_name(expected) + ", got " + dtype_name(v.dtype));
  }
  return v;
}

View view_contiguous(py::handle tensor, DType expected, int ndim, const char* what) {
  View v = view(tensor, expected, ndim, what);
  int64_t run = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (v.shape[i] > 1 && v.stride[i] != run) fail(what, "must be contiguous");
    run *= v.shape[i];
  }
  return v;
}

py::object memory_behind(py::handle tensor) {
  auto at = py::reinterpret_borrow<py::object>(tensor);
  while (py::isinstance<py::array>(at)) {
    py::object base = py::reinterpret_borrow<py::array>(at).base();
    if (!base || base.is_none()) break;
    at = std::move(base);
  }
  return at;
}

}  // namespace qwen_rt
