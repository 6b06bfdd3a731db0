#include "program.h"

#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace qwen_rt {
namespace {
thread_local Program* current = nullptr;
}

Program* recording() { return current; }

Program::~Program() { end(); }

void Program::begin() {
  if (current) throw std::logic_error("a program is being recorded on this thread already");
  current = this;
}

void Program::end() {
  if (current == this) current = nullptr;
}

void Program::add(std::function<void()> call, std::initializer_list<py::handle> tensors) {
  calls_.push_back(std::move(call));
  for (py::handle t : tensors) kept_.push_back(py::reinterpret_borrow<py::object>(t));
}

void Program::add_python(py::function call) {
  PyObject* raw = call.ptr();
  kept_.push_back(std::move(call));
  calls_.push_back([raw] {
    py::gil_scoped_acquire gil;
    py::reinterpret_borrow<py::object>(raw)();
  });
}

void Program::run() const {
  py::gil_scoped_release nogil;
  for (const auto& call : calls_) call();
}

void bind_program(py::module_& m) {
  py::class_<Program>(m, "Program", "Native calls of a step, recorded between begin() and end() and run again by run().")
      .def(py::init<>())
      .def("begin", &Program::begin)
      .def("end", &Program::end)
      .def("add_python", &Program::add_python, py::arg("call"), "A step that is not native; no arguments.")
      .def("run", &Program::run)
      .def("__len__", &Program::size);
}

}  // namespace qwen_rt
