#include "program.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "tensor_arg.h"

namespace py = pybind11;

namespace qwen_rt {
namespace {
thread_local Program* current = nullptr;
thread_local int64_t recorded_rows = -1, running_rows = -1;  // of the program that runs on this thread

struct Running {
  Running(int64_t recorded, int64_t running) {
    recorded_rows = recorded;
    running_rows = running;
  }
  ~Running() { recorded_rows = running_rows = -1; }
};
}  // namespace

int64_t live_rows(int64_t recorded) { return recorded == recorded_rows ? running_rows : recorded; }

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
  // What holds their memory, so that a recorder can see which tensors the step itself has let go of.
  for (py::handle t : tensors) kept_.push_back(memory_behind(t));
}

void Program::add_python(py::function call) {
  PyObject* raw = call.ptr();
  kept_.push_back(std::move(call));
  calls_.push_back([raw] {
    py::gil_scoped_acquire gil;
    py::reinterpret_borrow<py::object>(raw)();
  });
}

void Program::run(int64_t rows) const {
  if (rows < 1 || rows > rows_) {
    throw std::invalid_argument("a program recorded for " + std::to_string(rows_) + " rows cannot run " +
                                std::to_string(rows));
  }
  py::gil_scoped_release nogil;
  const Running scope(rows_, rows);
  for (const auto& call : calls_) call();
}

void bind_program(py::module_& m) {
  py::class_<Program>(m, "Program", "Native calls of a step, recorded between begin() and end() and run again by run().")
      .def(py::init<int64_t>(), py::arg("rows"))
      .def("begin", &Program::begin)
      .def("end", &Program::end)
      .def("add_python", &Program::add_python, py::arg("call"), "A step that is not native; no arguments.")
      .def("run", &Program::run, py::arg("rows"), "The first `rows` rows of the step, at most those recorded.")
      .def("__len__", &Program::size);
}

}  // namespace qwen_rt
