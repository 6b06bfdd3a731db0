#include "kernel_object.h"

#include <structmember.h>

#include <climits>
#include <cmath>
#include <cstring>

namespace py = pybind11;

namespace qwen_rt {
namespace {

struct KernelObject {
  PyObject_HEAD
  vectorcallfunc call;
  DeviceKernel* kernel;
  PyObject* name;
  PyObject* signature;
  DeviceKind kind;
  Py_ssize_t count;
  char letters[kMaxParameters + 1];
};

PyTypeObject* kernel_type = nullptr;

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

bool fail_argument(const KernelObject* k, PyObject* type, Py_ssize_t i, const char* what, PyObject* got) {
  PyErr_Format(type, "%U: argument %zd must be %s, got %.200s", k->name, i, what, Py_TYPE(got)->tp_name);
  return false;
}

// An int that fits `bits`; no floats, no bools by accident of a caller's arithmetic.
bool read_int(const KernelObject* k, Py_ssize_t i, PyObject* o, int bits, long long& out) {
  if (!PyLong_Check(o)) return fail_argument(k, PyExc_TypeError, i, "an int", o);
  int overflow = 0;
  out = PyLong_AsLongLongAndOverflow(o, &overflow);
  if (overflow || (bits == 32 && (out < INT_MIN || out > INT_MAX))) {
    PyErr_Format(PyExc_OverflowError, "%U: argument %zd does not fit %d bits", k->name, i, bits);
    return false;
  }
  return true;
}

// A tensor on this kind of device, an address, or None (null).
bool read_pointer(const KernelObject* k, Py_ssize_t i, PyObject* o, void*& out) {
  static PyObject* data_ptr = interned("data_ptr");
  static PyObject* is_cpu = interned("is_cpu");
  static PyObject* is_cuda = interned("is_cuda");  // true for HIP as well
  if (o == Py_None) {
    out = nullptr;
    return true;
  }
  if (PyLong_Check(o)) {
    out = PyLong_AsVoidPtr(o);
    return !PyErr_Occurred();
  }
  PyObject* here = PyObject_GetAttr(o, k->kind == DeviceKind::kEmulator ? is_cpu : is_cuda);
  if (!here) {
    PyErr_Clear();
    return fail_argument(k, PyExc_TypeError, i, "a tensor, an address or None", o);
  }
  const bool right = here == Py_True;
  Py_DECREF(here);
  if (!right) return fail_argument(k, PyExc_ValueError, i, "a tensor on the kernel's device", o);
  PyObject* address = PyObject_CallMethodNoArgs(o, data_ptr);
  if (!address) return false;
  out = PyLong_AsVoidPtr(address);
  Py_DECREF(address);
  return !PyErr_Occurred();
}

bool read_unsigned(const KernelObject* k, const char* what, PyObject* o, unsigned& out) {
  const long long v = PyLong_Check(o) ? PyLong_AsLongLong(o) : -1;
  if (PyErr_Occurred()) PyErr_Clear();
  if (v < 0 || v > INT_MAX) {
    PyErr_Format(PyExc_ValueError, "%U: %s must be an int in 0 .. 2^31 - 1, got %R", k->name, what, o);
    return false;
  }
  out = static_cast<unsigned>(v);
  return true;
}

bool read_shape(const KernelObject* k, const char* what, PyObject* o, unsigned (&out)[3]) {
  out[0] = out[1] = out[2] = 1;
  if (PyLong_Check(o)) {
    if (!read_unsigned(k, what, o, out[0])) return false;
  } else {
    if (!PyTuple_Check(o) || PyTuple_GET_SIZE(o) < 1 || PyTuple_GET_SIZE(o) > 3) {
      PyErr_Format(PyExc_TypeError, "%U: %s must be an int or a tuple of up to three, got %R", k->name, what, o);
      return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(o); ++i) {
      if (!read_unsigned(k, what, PyTuple_GET_ITEM(o, i), out[i])) return false;
    }
  }
  if (!out[0] || !out[1] || !out[2] || out[1] > 65535 || out[2] > 65535) {
    PyErr_Format(PyExc_ValueError, "%U: %s %R: each at least 1, the second and third at most 65535", k->name, what, o);
    return false;
  }
  return true;
}

bool read_keywords(const KernelObject* k, PyObject* const* values, PyObject* names, LaunchShape& shape) {
  for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); ++i) {
    PyObject* key = PyTuple_GET_ITEM(names, i);
    if (PyUnicode_CompareWithASCIIString(key, "shared") == 0) {
      if (!read_unsigned(k, "shared", values[i], shape.dynamic_shared)) return false;
    } else if (PyUnicode_CompareWithASCIIString(key, "stream") == 0) {
      if (!PyLong_Check(values[i])) {
        PyErr_Format(PyExc_TypeError, "%U: stream must be an int (a stream's address)", k->name);
        return false;
      }
      shape.stream = reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(values[i]));
      if (PyErr_Occurred()) return false;
    } else {
      PyErr_Format(PyExc_TypeError, "%U: unexpected keyword %R (shared, stream)", k->name, key);
      return false;
    }
  }
  return true;
}

PyObject* call_kernel(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* names) {
  auto* k = reinterpret_cast<KernelObject*>(self);
  const Py_ssize_t n = PyVectorcall_NARGS(nargsf);
  if (n != k->count + 2) {
    PyErr_Format(PyExc_TypeError, "%U(grid, block, *args): \"%U\" takes %zd arguments, got %zd", k->name, k->signature,
                 k->count, n - 2);
    return nullptr;
  }
  LaunchShape shape{};
  unsigned block[3];
  if (!read_shape(k, "grid", args[0], shape.grid) || !read_shape(k, "block", args[1], block)) return nullptr;
  if (block[1] != 1 || block[2] != 1) {
    PyErr_Format(PyExc_ValueError, "%U: blocks are one-dimensional, got %R", k->name, args[1]);
    return nullptr;
  }
  shape.block = block[0];
  if (static_cast<int>(shape.block) > k->kernel->facts.max_threads) {
    PyErr_Format(PyExc_ValueError, "%U: a block of %u threads exceeds the kernel's launch bound of %d", k->name,
                 shape.block, k->kernel->facts.max_threads);
    return nullptr;
  }
  if (!read_keywords(k, args + n, names, shape)) return nullptr;

  union Value {
    void* p;
    int64_t l;
    int32_t i;
    float f;
  } values[kMaxParameters];
  void* pointers[kMaxParameters];
  for (Py_ssize_t i = 0; i < k->count; ++i) {
    PyObject* o = args[i + 2];
    long long whole = 0;
    switch (k->letters[i]) {
      case 'P':
        if (!read_pointer(k, i, o, values[i].p)) return nullptr;
        break;
      case 'i':
        if (!read_int(k, i, o, 32, whole)) return nullptr;
        values[i].i = static_cast<int32_t>(whole);
        break;
      case 'l':
        if (!read_int(k, i, o, 64, whole)) return nullptr;
        values[i].l = whole;
        break;
      default:
        if (!PyFloat_Check(o) && !PyLong_Check(o)) {
          fail_argument(k, PyExc_TypeError, i, "a float", o);
          return nullptr;
        }
        values[i].f = static_cast<float>(PyFloat_AsDouble(o));
        if (PyErr_Occurred()) return nullptr;
    }
    pointers[i] = &values[i];
  }
  try {
    if (k->kind == DeviceKind::kEmulator) {
      const py::gil_scoped_release nogil;
      k->kernel->launch(shape, pointers);
    } else {
      k->kernel->launch(shape, pointers);
    }
  } catch (const std::exception& e) {
    set_backend_error(e.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

void free_kernel(PyObject* self) {
  auto* k = reinterpret_cast<KernelObject*>(self);
  PyTypeObject* type = Py_TYPE(self);
  delete k->kernel;
  Py_XDECREF(k->name);
  Py_XDECREF(k->signature);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* show_kernel(PyObject* self) {
  const auto* k = reinterpret_cast<KernelObject*>(self);
  return PyUnicode_FromFormat("<kernel %U(%U)>", k->name, k->signature);
}

template <int KernelFacts::*Field>
PyObject* get_fact(PyObject* self, void*) {
  return PyLong_FromLong(reinterpret_cast<KernelObject*>(self)->kernel->facts.*Field);
}

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(KernelObject, call), READONLY, nullptr},
    {"name", T_OBJECT_EX, offsetof(KernelObject, name), READONLY, "its name in the image"},
    {"signature", T_OBJECT_EX, offsetof(KernelObject, signature), READONLY, "one letter a parameter: P i l f"},
    {nullptr, 0, 0, 0, nullptr},
};

PyGetSetDef facts[] = {
    {"max_threads", get_fact<&KernelFacts::max_threads>, nullptr, "its launch bound", nullptr},
    {"registers", get_fact<&KernelFacts::registers>, nullptr, "registers a thread; 0 in emulation", nullptr},
    {"local_bytes", get_fact<&KernelFacts::local_bytes>, nullptr, "bytes of local memory a thread (spills)", nullptr},
    {"static_shared", get_fact<&KernelFacts::static_shared>, nullptr, "bytes of static shared memory", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(free_kernel)},
    {Py_tp_repr, reinterpret_cast<void*>(show_kernel)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, members},
    {Py_tp_getset, facts},
    {0, nullptr},
};

PyType_Spec spec = {"qwen_rt._gpu.Kernel", sizeof(KernelObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
                    slots};

}  // namespace

void set_backend_error(const char* message) {
  try {
    const py::object type = py::module_::import("qwen_rt.errors").attr("BackendError");
    PyErr_SetString(type.ptr(), message);
  } catch (py::error_already_set& e) {
    e.restore();
  }
}

void bind_kernel(py::module_& m) {
  if (!kernel_type) kernel_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  if (!kernel_type) throw py::error_already_set();
  m.add_object("Kernel", reinterpret_cast<PyObject*>(kernel_type));
}

py::object make_kernel(std::unique_ptr<DeviceKernel> kernel, DeviceKind kind, const std::string& name,
                       const std::string& signature) {
  PyObject* o = kernel_type->tp_alloc(kernel_type, 0);
  if (!o) throw py::error_already_set();
  auto* k = reinterpret_cast<KernelObject*>(o);
  k->call = call_kernel;
  k->kernel = kernel.release();
  k->name = py::str(name).release().ptr();
  k->signature = py::str(signature).release().ptr();
  k->kind = kind;
  k->count = static_cast<Py_ssize_t>(signature.size());
  std::memcpy(k->letters, signature.c_str(), signature.size() + 1);
  return py::reinterpret_steal<py::object>(o);
}

}  // namespace qwen_rt
