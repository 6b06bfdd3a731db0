// Bindings of what loading uses: GGUF's blocks and strings, GPTQ's words, finiteness, merges of a vocabulary.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "gguf.h"
#include "gptq.h"
#include "half.h"
#include "merges.h"
#include "pool.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace qwen_rt {
namespace {

void require_of(bool condition, const std::string& message) { require(condition, message.c_str()); }

// Contiguous host memory of `bytes` behind a buffer object; null for None.
uint8_t* memory_of(py::handle object, int64_t bytes, bool writable, const char* what) {
  if (object.is_none()) return nullptr;
  const py::buffer_info info = py::reinterpret_borrow<py::buffer>(object).request(writable);
  py::ssize_t run = info.itemsize;
  for (py::ssize_t i = info.ndim - 1; i >= 0; run *= info.shape[i--]) {
    require_of(info.shape[i] < 2 || info.strides[i] == run, std::string(what) + " must be contiguous");
  }
  require_of(info.size * info.itemsize == bytes, std::string(what) + " must have " + std::to_string(bytes) + " bytes");
  return static_cast<uint8_t*>(info.ptr);
}

void gguf_decode_op(const std::string& name, py::buffer data, py::buffer codes, py::buffer scales, py::object mins) {
  const GgufType* type = gguf_type(name.c_str());
  require_of(type, "gguf_decode: no quantised type " + name);
  require_of(type->has_mins != mins.is_none(), "gguf_decode: mins do not match " + name);
  const py::buffer_info info = codes.request();
  const int64_t elements = info.size * info.itemsize, blocks = elements / type->block;
  require_of(elements % type->block == 0, "gguf_decode: codes must be whole blocks of " + name);
  const uint8_t* in = memory_of(data, blocks * type->bytes, false, "data");
  uint8_t* out = memory_of(codes, elements, true, "codes");
  const int64_t aux_bytes = elements / type->group * 2;
  auto* s = reinterpret_cast<uint16_t*>(memory_of(scales, aux_bytes, true, "scales"));
  auto* m = reinterpret_cast<uint16_t*>(memory_of(mins, aux_bytes, true, "mins"));
  py::gil_scoped_release nogil;
  gguf_decode(*type, in, blocks, out, s, m);
}

// Whether rows [start, start + rows) of a weight, which a file has from `offset` on, fill whole panels.
bool fill_panels(const PackedLinear& w, int64_t start, int64_t rows, int64_t offset) {
  require(rows > 0 && rows <= w.n && start >= 0 && start <= w.n - rows, "rows out of range");
  require(offset >= 0 && offset <= int64_t{1} << 60, "offset out of range");
  return start % kPanel == 0 && (rows % kPanel == 0 || start + rows == w.n);
}

// A weight, its first row, a GGUF type, an open file and where in it the blocks begin, rows.
using BlocksOf = std::tuple<PackedLinear*, int64_t, std::string, int, int64_t, int64_t>;

// The number of the first part that does not fill whole panels, cannot be read or has a scale that is not finite; their
// count where there is none.
int64_t pack_blocks_op(const std::vector<BlocksOf>& parts) {
  std::vector<GgufRows> rows;
  bool whole = true;
  for (const auto& [w, start, name, file, offset, count] : parts) {
    const GgufType* type = gguf_type(name.c_str());
    require_of(w && type && gguf_fits(*type, *w), "pack_blocks: the weight is not made of " + name);
    whole = fill_panels(*w, start, count, offset) && whole;
    if (whole) rows.push_back({w, start, count, type, file, offset});
  }
  py::gil_scoped_release nogil;
  return gguf_pack(rows);
}

// A weight, its first output, an open file, where in it the words of that begin and how many outputs a row of words has;
// scales, zero points or None, and the stored group of each.
using WordsOf = std::tuple<PackedLinear*, int64_t, int, int64_t, int64_t, py::object, py::object, py::object>;

int64_t pack_words_op(const std::vector<WordsOf>& parts) {
  std::vector<GptqWords> words;
  bool whole = true;
  for (const auto& [w, start, file, offset, stride, scales, zeros, source] : parts) {
    require(w && gptq_fits(*w, !zeros.is_none()), "pack_words: the weight is not made of such words");
    const View s = view(scales, DType::kFloat16, 2, "scales"), g = view_contiguous(source, DType::kInt64, 1, "source");
    const int64_t count = s.shape[1];
    GptqWords part{w, start, count, file, offset, stride, s.ptr<uint16_t>(), nullptr, g.ptr<int64_t>(), s.stride[0], 0};
    require(stride >= count && stride <= 1 << 28, "pack_words: a row of words must have all outputs");
    if (!zeros.is_none()) {
      const View z = view(zeros, DType::kUInt8, 2, "zeros");
      require(z.shape[0] == s.shape[0] && z.shape[1] == count, "pack_words: zeros must have the shape of scales");
      part.zeros = z.ptr<uint8_t>();
      part.zeros_stride = z.stride[0];
    }
    require(g.numel() == w->groups(), "pack_words: source must name a stored group for each one");
    for (int64_t i = 0; i < g.numel(); ++i) {
      require(part.source[i] >= 0 && part.source[i] < s.shape[0], "pack_words: source names a group that is not there");
    }
    whole = fill_panels(*w, start, count, offset) && whole;
    if (whole) words.push_back(part);
  }
  py::gil_scoped_release nogil;
  return gptq_pack(words);
}

// The bytes of a vector's elements.
template <class T>
py::bytes bytes_of(const std::vector<T>& values) {
  return py::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// (at most n strings from the start of `data` joined, their lengths as int64, bytes they take); those end before one that
// does not lie in it whole.
py::tuple gguf_strings_op(const py::bytes& data, int64_t n) {
  const std::string_view bytes = data;
  std::string joined;
  std::vector<int64_t> lengths;
  int64_t at = 0;
  {
    py::gil_scoped_release nogil;
    joined.reserve(bytes.size());
    for (std::string_view text; static_cast<int64_t>(lengths.size()) < n && gguf_string(bytes.substr(at), &text);) {
      joined.append(text);
      lengths.push_back(static_cast<int64_t>(text.size()));
      at += 8 + lengths.back();
    }
  }
  return py::make_tuple(py::bytes(joined), bytes_of(lengths), at);
}

template <class T>
bool all_finite_in(const T* values, int64_t n, T exponent) {
  constexpr int64_t kTask = 1 << 17;
  std::atomic<bool> finite{true};
  parallel_for((n + kTask - 1) / kTask, [&](int64_t i) {
    if (!all_finite(values + i * kTask, std::min(kTask, n - i * kTask), exponent)) finite.store(false);
  });
  return finite.load();
}

bool all_finite_op(py::buffer bits, uint64_t exponent) {
  const py::buffer_info info = bits.request();
  const void* p = memory_of(bits, info.size * info.itemsize, false, "bits");
  py::gil_scoped_release nogil;
  switch (info.itemsize) {
    case 2:
      return all_finite_in(static_cast<const uint16_t*>(p), info.size, static_cast<uint16_t>(exponent));
    case 4:
      return all_finite_in(static_cast<const uint32_t*>(p), info.size, static_cast<uint32_t>(exponent));
    case 8:
      return all_finite_in(static_cast<const uint64_t*>(p), info.size, exponent);
  }
  throw std::invalid_argument("all_finite: elements must have 2, 4 or 8 bytes");
}

// Of qwen_rt.texts.Texts.
Strings strings_of(const py::bytes& data, py::handle ends, const char* what) {
  const std::string_view text = data;
  const View at = view_contiguous(ends, DType::kInt64, 1, what);
  const Strings strings{text.data(), at.ptr<int64_t>(), at.numel()};
  for (int64_t i = 0, last = 0; i < strings.n; last = strings.ends[i++]) {
    const bool inside = strings.ends[i] >= last && strings.ends[i] <= static_cast<int64_t>(text.size());
    require_of(inside, std::string(what) + " must lie in the text, in order");
  }
  return strings;
}

// A new reference: objects of a vocabulary are made by the hundred thousand.
py::object made(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

void put(const py::dict& dict, const py::object& key, const py::object& value) {
  if (PyDict_SetItem(dict.ptr(), key.ptr(), value.ptr())) throw py::error_already_set();
}

// What qwen_rt.tokenizer.vocab.Vocab is made of, or None.
py::object merge_ranks_op(const py::bytes& tokens, py::handle token_ends, py::handle token_ids, const py::bytes& merges,
                          py::handle merge_ends, int64_t longest, int64_t end_of_ids) {
  const Strings texts = strings_of(tokens, token_ends, "token_ends"), pairs = strings_of(merges, merge_ends, "merge_ends");
  const View token_id = view_contiguous(token_ids, DType::kInt64, 1, "ids");
  const auto* ids = token_id.ptr<int64_t>();
  require(token_id.numel() == texts.n, "merge_ranks: ids must have one for each token");
  Vocabulary found;
  bool good;
  {
    py::gil_scoped_release nogil;
    good = found.read(texts, ids, pairs, longest, end_of_ids);
  }
  if (!good) return py::none();
  py::dict ranks, unmerged;
  py::object rank_ids = py::none();
  if (!found.ids_are_ranks) rank_ids = py::list(found.ranked);
  for (int64_t at = 0; at < texts.n; ++at) {
    const int32_t i = found.order[at];
    const std::string_view bytes = found.tokens()[i];
    const py::object key = made(PyBytes_FromStringAndSize(bytes.data(), static_cast<py::ssize_t>(bytes.size())));
    py::object id = made(PyLong_FromLongLong(ids[i]));
    if (at >= found.ranked) {
      put(unmerged, id, key);
      continue;
    }
    put(ranks, key, found.ids_are_ranks ? id : made(PyLong_FromLongLong(at)));
    if (!found.ids_are_ranks) PyList_SET_ITEM(rank_ids.ptr(), at, id.release().ptr());
  }
  return py::make_tuple(ranks, rank_ids, unmerged);
}

}  // namespace

void bind_load(py::module_& m) {
  m.def("gguf_decode", &gguf_decode_op, py::arg("type"), py::arg("data"), py::arg("codes"), py::arg("scales"),
        py::arg("mins"), "Blocks of a quantised GGUF type into uint8 codes, float16 scales and mins (or None).");
  m.def("all_finite", &all_finite_op, py::arg("bits"), py::arg("exponent"),
        "Whether no float has all bits of `exponent` set; bits are integers of the float's width, contiguous.");
  m.def("pack_blocks", &pack_blocks_op, py::arg("parts"),
        "Rows packed from blocks of a quantised GGUF type: parts (w, start, type, file, offset, rows), where an open file (its "
        "descriptor) has them from an offset on. The number of the first part that does not fill whole panels, cannot be read "
        "or is not finite; their count where there is none.");
  m.def("pack_words", &pack_words_op, py::arg("parts"),
        "As pack_blocks, outputs packed from GPTQ's words: parts (w, start, file, offset, stride, scales, zeros, source), where "
        "the first output's words lie from the offset on, and rows of words have `stride` outputs.");
  m.def("gguf_strings", &gguf_strings_op, py::arg("data"), py::arg("n"),
        "(at most n strings from the start of data joined, their lengths as int64, bytes they take).");
  m.def("merge_ranks", &merge_ranks_op, py::arg("tokens"), py::arg("token_ends"), py::arg("ids"), py::arg("merges"),
        py::arg("merge_ends"), py::arg("longest"), py::arg("end_of_ids"),
        "(ranks, rank ids, unmerged) of a vocabulary and its merges; None where the definition must say what is wrong.");
}

}  // namespace qwen_rt
