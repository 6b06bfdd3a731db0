#include "tensor_arg.h"

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace qwen_rt {
namespace {

struct TorchNames {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* dtypes[7];

  TorchNames() {
    py::module_ torch = py::module_::import("torch");
    const char* names[7] = {"float32", "float16", "bfloat16", "int64", "int32", "int16", "uint8"};
    for (int i = 0; i < 7; ++i) dtypes[i] = py::object(torch.attr(names[i])).release().ptr();
  }
};

const TorchNames& names() {
  static const TorchNames* n = new TorchNames();  // outlives the interpreter
  return *n;
}

py::object take(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

[[noreturn]] void fail(const char* what, const std::string& why) {
  throw std::invalid_argument(std::string(what) + ": " + why);
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
  const TorchNames& n = names();
  PyObject* t = tensor.ptr();
  py::object dtype = take(PyObject_GetAttr(t, n.dtype));
  View v;
  int found = -1;
  for (int i = 0; i < 7; ++i) {
    if (dtype.ptr() == n.dtypes[i]) found = i;
  }
  if (found < 0) fail(what, "dtype " + std::string(py::str(dtype)) + " is not supported");
  v.dtype = static_cast<DType>(found);
  py::object shape = take(PyObject_GetAttr(t, n.shape));
  py::object stride = take(PyObject_CallMethodNoArgs(t, n.stride));
  if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(stride.ptr())) fail(what, "not a tensor");
  v.ndim = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
  if (v.ndim != ndim) {
    fail(what, "expected " + std::to_string(ndim) + " dimensions, got shape " + std::string(py::str(shape)));
  }
  for (int i = 0; i < ndim; ++i) {
    v.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    v.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
  }
  if (ndim > 0 && v.stride[ndim - 1] != 1 && v.shape[ndim - 1] > 1) fail(what, "last dimension must be contiguous");
  py::object is_cpu = take(PyObject_GetAttr(t, n.is_cpu));
  if (is_cpu.ptr() != Py_True) fail(what, "must be in host memory");
  py::object ptr = take(PyObject_CallMethodNoArgs(t, n.data_ptr));
  v.data = PyLong_AsVoidPtr(ptr.ptr());
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

}  // namespace qwen_rt
