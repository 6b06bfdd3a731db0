// Python bindings of the CPU kernels: every shape, dtype and index is checked here, before a kernel runs.
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "cpu_features.h"
#include "linear.h"
#include "memory.h"
#include "pool.h"
#include "program.h"
#include "table.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace qwen_rt {

void bind_load(py::module_& m);
void bind_ops(py::module_& m);

namespace {

WeightKind kind_named(const std::string& name) {
  WeightKind kind;
  if (!weight_kind(name, &kind)) throw std::invalid_argument("unknown weight kind " + name);
  return kind;
}

DType storage_dtype(WeightKind kind) {
  return kind == WeightKind::kFloat32 ? DType::kFloat32 : kind == WeightKind::kFloat16 ? DType::kFloat16 : DType::kBFloat16;
}

Aux aux_kind(const std::string& name) {
  if (name == "none") return Aux::kNone;
  if (name == "zeros") return Aux::kZeros;
  if (name == "mins") return Aux::kMins;
  throw std::invalid_argument("unknown aux kind " + name);
}

void check_span(const PackedLinear& w, int64_t start, int64_t rows) {
  require(rows > 0 && start >= 0 && start + rows <= w.n, "pack: rows out of range");
  require(start % kPanel == 0 && (rows % kPanel == 0 || start + rows == w.n), "pack: rows must be multiples of 16");
}

void pack_rows_grouped(PackedLinear& w, int64_t start, py::handle codes, py::handle scales, py::handle zeros,
                       py::handle mins) {
  require(w.grouped(), "pack_grouped: the weight is dense");
  const View q = view_contiguous(codes, DType::kUInt8, 2, "codes");
  const View s = view_contiguous(scales, DType::kFloat16, 2, "scales");
  const int64_t rows = q.shape[0];
  check_span(w, start, rows);
  require(q.shape[1] == w.k, "pack_grouped: codes must be [rows, K]");
  require(s.shape[0] == rows && s.shape[1] == w.groups(), "pack_grouped: scales must be [rows, K / group]");
  require(zeros.is_none() == (w.aux != Aux::kZeros), "pack_grouped: zeros do not match the format");
  require(mins.is_none() == (w.aux != Aux::kMins), "pack_grouped: mins do not match the format");
  View z, m;
  if (w.aux == Aux::kZeros) z = view_contiguous(zeros, DType::kUInt8, 2, "zeros");
  if (w.aux == Aux::kMins) m = view_contiguous(mins, DType::kFloat16, 2, "mins");
  for (const View* v : {&z, &m}) {
    require(!v->data || (v->shape[0] == rows && v->shape[1] == w.groups()), "pack_grouped: zeros/mins shape");
  }
  py::gil_scoped_release nogil;
  pack_grouped(w, start, rows, q.ptr<uint8_t>(), s.ptr<uint16_t>(), z.ptr<uint8_t>(), m.ptr<uint16_t>());
}

void pack_rows_dense(PackedLinear& w, int64_t start, py::handle values) {
  require(!w.grouped(), "pack_dense: the weight is grouped");
  const View v = view(values, storage_dtype(w.kind), 2, "values");
  check_span(w, start, v.shape[0]);
  require(v.shape[1] == w.k, "pack_dense: values must be [rows, K]");
  py::gil_scoped_release nogil;
  pack_dense(w, start, v.shape[0], v.data, v.stride[0]);
}

void set_bias(PackedLinear& w, py::handle bias) {
  const View b = view_contiguous(bias, DType::kFloat32, 1, "bias");
  require(b.shape[0] == w.n, "bias must be [N]");
  w.bias.reset(new float[w.n]);
  std::copy(b.ptr<float>(), b.ptr<float>() + w.n, w.bias.get());
}

void set_perm(PackedLinear& w, py::handle perm) {
  const View p = view_contiguous(perm, DType::kInt32, 1, "perm");
  require(p.shape[0] == w.k, "perm must be [K]");
  std::unique_ptr<bool[]> seen(new bool[w.k]());
  for (int64_t i = 0; i < w.k; ++i) {
    const int32_t j = p.ptr<int32_t>()[i];
    require(j >= 0 && j < w.k && !seen[j], "perm must be a permutation of 0 .. K-1");
    seen[j] = true;
  }
  w.perm.reset(new int32_t[w.k]);
  std::copy(p.ptr<int32_t>(), p.ptr<int32_t>() + w.k, w.perm.get());
}

void linear_op(py::handle x, const PackedLinear& w, py::handle y) {
  const View in = view(x, DType::kFloat32, 2, "x");
  const View out = view(y, DType::kFloat32, 2, "y");
  require(in.shape[1] == w.k, "linear: x must be [T, K]");
  require(out.shape[0] == in.shape[0] && out.shape[1] == w.n, "linear: y must be [T, N]");
  submit({x, y}, [in, out, &w] {
    linear(w, in.ptr<float>(), in.stride[0], live_rows(in.shape[0]), out.ptr<float>(), out.stride[0]);
  });
}

void swiglu_op(py::handle x, const PackedLinear& w, py::handle y) {
  const View in = view(x, DType::kFloat32, 2, "x");
  const View out = view(y, DType::kFloat32, 2, "y");
  require(in.shape[1] == w.k, "swiglu: x must be [T, K]");
  require(out.shape[0] == in.shape[0] && 2 * out.shape[1] == w.n, "swiglu: y must be [T, N / 2]");
  submit({x, y}, [in, out, &w] {
    swiglu(w, in.ptr<float>(), in.stride[0], live_rows(in.shape[0]), out.ptr<float>(), out.stride[0]);
  });
}

// Rows of a packed weight or of a table in its file.
template <class W, class Rows>
void embedding_of(py::handle ids, const W& w, py::handle y, const Rows& rows_of) {
  const View in = view_contiguous(ids, DType::kInt64, 1, "ids");
  const View out = view_contiguous(y, DType::kFloat32, 2, "y");
  require(out.shape[0] == in.shape[0] && out.shape[1] == w.k, "embedding: y must be [T, K]");
  submit({ids, y}, [in, out, &w, rows_of] {
    const int64_t *id = in.ptr<int64_t>(), rows = live_rows(in.shape[0]);
    for (int64_t i = 0; i < rows; ++i) require(id[i] >= 0 && id[i] < w.n, "embedding: id out of range");
    rows_of(w, id, rows, out.ptr<float>());
  });
}

void embedding_op(py::handle ids, const PackedLinear& w, py::handle y) { embedding_of(ids, w, y, embedding); }

void table_embedding_op(py::handle ids, const Table& w, py::handle y) {
  embedding_of(ids, w, y,
               [](const Table& t, const int64_t* id, int64_t count, float* out) { t.rows(id, count, out); });
}

}  // namespace
}  // namespace qwen_rt

PYBIND11_MODULE(_cpu, m) {
  using namespace qwen_rt;
  m.doc() = "qwen_rt CPU kernels; tensors are numpy arrays, checked here";
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("n"));
  m.def("set_spinning", &set_spinning, py::arg("on"), "Whether threads wait for the next job awake.");
  m.def("default_isa", [] { return isa_name(default_isa()); });
  m.def("active_isa", [] { return isa_name(active_isa()); });
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (!set_active_isa(isa_named(name))) throw std::invalid_argument("this processor lacks " + name);
      },
      py::arg("name"), "Choose another instruction set than the default.");
  m.def("activation_bits", &activation_bits);
  m.def("set_activation_bits", &set_activation_bits, py::arg("bits"),
        "8 or 16: what more than EXACT_ROWS rows of integer weights meet.");
  m.attr("EXACT_ROWS") = kExactRows;
  py::class_<PackedLinear>(m, "PackedLinear")
      .def(py::init([](const std::string& kind, const std::string& aux, int64_t n, int64_t k, int64_t group) {
             return std::make_unique<PackedLinear>(kind_named(kind), aux_kind(aux), n, k, group);
           }),
           py::arg("kind"), py::arg("aux"), py::arg("n"), py::arg("k"), py::arg("group"))
      .def("pack_grouped", &pack_rows_grouped, py::arg("start"), py::arg("codes"), py::arg("scales"),
           py::arg("zeros") = py::none(), py::arg("mins") = py::none())
      .def("pack_dense", &pack_rows_dense, py::arg("start"), py::arg("values"))
      .def("set_bias", &set_bias, py::arg("bias"))
      .def("set_perm", &set_perm, py::arg("perm"))
      .def_property_readonly("nbytes", &PackedLinear::nbytes);
  py::class_<Table>(m, "Table", "Rows of a matrix where its file has them.")
      .def(py::init<const std::string&, int64_t, int64_t, int64_t, const std::string&>(), py::arg("path"),
           py::arg("offset"), py::arg("n"), py::arg("k"), py::arg("kind"))
      .def("finite", &Table::finite, py::call_guard<py::gil_scoped_release>(), "Whether all values are; reads them all.");
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol(), "Memory for a result, of one that is gone if there is such.")
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_buffer([](Buffer& b) { return py::buffer_info(b.data(), 1, "B", 1, {b.size()}, {1}); });
  m.def("linear", &linear_op, py::arg("x"), py::arg("w"), py::arg("y"));
  m.def("swiglu", &swiglu_op, py::arg("x"), py::arg("w"), py::arg("y"), "silu_mul of the linear, in one.");
  m.def("embedding", &embedding_op, py::arg("ids"), py::arg("w"), py::arg("y"));
  m.def("embedding", &table_embedding_op, py::arg("ids"), py::arg("w"), py::arg("y"));
  bind_program(m);
  bind_ops(m);
  bind_load(m);
}
