// A decode step recorded as a list of native calls, to run again without Python between them.
//
// While a Program records (on its thread), an operation bound through submit() is not run but added to the list, with
// the addresses it was given; the memory behind them is kept alive. What depends on data that changes between runs
// (token ids, lengths, slots) is checked inside the call, so it is checked each time.
//
// A program is recorded for a number of rows and runs for that many or fewer: each call asks live_rows() how many of its
// rows count. A call that does not ask computes all of them, which is as right and only slower.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <vector>

namespace qwen_rt {

class Program {
 public:
  explicit Program(int64_t rows) : rows_(rows) {}
  ~Program();
  void begin();  // throws std::logic_error while another program records on this thread
  void end();
  void add(std::function<void()> call, std::initializer_list<pybind11::handle> tensors);
  // A step that is not native: a Python callable without arguments.
  void add_python(pybind11::function call);
  // The first `rows` rows, 1 .. as recorded. Called with the interpreter lock, which is released while native calls
  // run. Throws what a call throws.
  void run(int64_t rows) const;
  size_t size() const { return calls_.size(); }

 private:
  const int64_t rows_;
  std::vector<std::function<void()>> calls_;
  std::vector<pybind11::object> kept_;
};

// Rows to compute of a tensor whose first axis has `recorded`: those of the run where that axis is the program's rows.
int64_t live_rows(int64_t recorded);

// The program that records on this thread, or null.
Program* recording();

// Runs `call` without the interpreter lock, or records it where a program is recording.
template <class F>
void submit(std::initializer_list<pybind11::handle> tensors, const F& call) {
  if (Program* program = recording()) {
    program->add(call, tensors);
    return;
  }
  pybind11::gil_scoped_release nogil;
  call();
}

void bind_program(pybind11::module_& m);

}  // namespace qwen_rt
