// Bindings of every operation but the matrix product. A cache layer and a step are checked once, as objects; the calls
// of a layer then check their own tensors and that the step lies within the cache.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "kv.h"
#include "norm.h"
#include "pool.h"
#include "program.h"
#include "rope.h"
#include "sample.h"
#include "silu.h"
#include "tensor_arg.h"

namespace py = pybind11;

namespace qwen_rt {
namespace {

void require_of(bool condition, const std::string& message) { require(condition, message.c_str()); }

// As above, the message made only when it is needed: for what is checked many times a step.
template <class Message, class = decltype(std::declval<Message>()())>
void require_of(bool condition, const Message& message) {
  if (!condition) require_of(false, message());
}

bool same_shape(const View& a, const View& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// --- cache and step --------------------------------------------------------------------------------------------------

struct BoundKvLayer {
  KvLayer kv{};
  std::vector<py::object> tensors;  // keep the memory alive

  BoundKvLayer(py::object k, py::object v, py::object k_scale, py::object k_min, py::object v_scale, py::object v_min) {
    const View first = view_any(k, 4, "k");
    switch (first.dtype) {
      case DType::kFloat32:
        kv.type = KvType::kFloat32;
        break;
      case DType::kFloat16:
        kv.type = KvType::kFloat16;
        break;
      case DType::kBFloat16:
        kv.type = KvType::kBFloat16;
        break;
      case DType::kUInt8:
        kv.type = KvType::kInt8;
        break;
      default:
        require(false, "k: a cache is float32, float16, bfloat16 or uint8");
    }
    kv.num_blocks = first.shape[0];
    kv.heads = first.shape[1];
    kv.block = first.shape[2];
    kv.size = first.shape[3];
    require(first.numel() > 0, "k: the cache is empty");
    const int64_t rows = kv.heads * kv.block;
    kv.block_rows = kv.num_blocks > 1 ? first.stride[0] / kv.size : rows;
    require(kv.block_rows >= rows, "k: its blocks overlap");
    kv.k = pages(first, k, k_scale, k_min, "k");
    kv.v = pages(first, v, v_scale, v_min, "v");
  }

 private:
  // That blocks of rows of `row` elements are contiguous, and as far apart as those of k.
  void require_blocks(const View& a, int64_t row, const std::string& what) const {
    const int64_t strides[] = {kv.block_rows * row, kv.block * row, row};
    for (int i = 0; i < 3; ++i) {
      require_of(a.shape[i] == 1 || a.stride[i] == strides[i],
                 what + ": blocks must be contiguous, and as far apart as those of k");
    }
  }

  KvPages pages(const View& first, py::object data, py::object scale, py::object min, const std::string& what) {
    KvPages out{};
    const View d = view(data, first.dtype, 4, what.c_str());
    require(same_shape(d, first), "v: must have the shape of k");
    require_blocks(d, kv.size, what);
    out.data = d.data;
    tensors.push_back(std::move(data));
    const bool coded = kv.type == KvType::kInt8;
    require_of(coded != scale.is_none() && coded != min.is_none(), what + ": scale and min go with uint8 codes only");
    if (!coded) return out;
    const auto aux = [&](py::object& t, const std::string& name) {
      const View a = view(t, DType::kFloat32, 3, name.c_str());
      require_of(std::equal(a.shape, a.shape + 3, first.shape), name + ": must be [num_blocks, heads, block]");
      require_blocks(a, 1, name);
      tensors.push_back(std::move(t));
      return a.ptr<float>();
    };
    out.scale = aux(scale, what + "_scale");
    out.min = aux(min, what + "_min");
    return out;
  }
};

// A BatchMeta as the kernels read it.
struct Step {
  std::vector<int64_t> q_start{0}, kv_lens, slots;
  std::vector<int32_t> block_table;
  int64_t table_stride = 0, block, num_blocks = 0;  // num_blocks: one more than the highest id in use

  Step(const std::vector<int64_t>& q_lens, std::vector<int64_t> kv_lens_in,
       const std::vector<std::vector<int64_t>>& tables, std::vector<int64_t> slots_in, int64_t block_size)
      : kv_lens(std::move(kv_lens_in)), slots(std::move(slots_in)), block(block_size) {
    require(block > 0, "step: block_size must be positive");
    require(q_lens.size() == kv_lens.size() && q_lens.size() == tables.size(),
            "step: q_lens, kv_lens and block_table differ in length");
    require(!q_lens.empty(), "step: no sequence");
    constexpr int64_t kMaxTokens = int64_t{1} << 40;
    const auto name = [](size_t b) { return "step: sequence " + std::to_string(b); };
    for (size_t b = 0; b < q_lens.size(); ++b) {
      require_of(q_lens[b] >= 1 && q_lens[b] <= kv_lens[b] && kv_lens[b] < kMaxTokens,
                 [&] { return name(b) + ": q_len must be within 1 .. kv_len"; });
      const int64_t used = (kv_lens[b] + block - 1) / block;
      require_of(used <= static_cast<int64_t>(tables[b].size()),
                 [&] { return name(b) + ": its blocks cannot hold kv_len keys"; });
      table_stride = std::max(table_stride, used);
      q_start.push_back(q_start.back() + q_lens[b]);
    }
    require_of(q_start.back() == static_cast<int64_t>(slots.size()),
               "step: " + std::to_string(slots.size()) + " slots for " + std::to_string(q_start.back()) + " rows");
    block_table.resize(q_lens.size() * table_stride);
    for (size_t b = 0; b < q_lens.size(); ++b) {
      for (int64_t i = 0; i * block < kv_lens[b]; ++i) {
        const int64_t id = tables[b][i];
        require_of(id >= 0 && id < INT32_MAX, [&] { return name(b) + ": bad block id " + std::to_string(id); });
        block_table[b * table_stride + i] = static_cast<int32_t>(id);
        num_blocks = std::max(num_blocks, id + 1);
      }
      for (int64_t i = 0; i < q_lens[b]; ++i) {
        const int64_t pos = kv_lens[b] - q_lens[b] + i, slot = slots[q_start[b] + i];
        require_of(slot == tables[b][pos / block] * block + pos % block, [&] {
          return name(b) + ": slot " + std::to_string(slot) + " is not where its block table puts position " +
                 std::to_string(pos);
        });
      }
    }
  }

  int64_t rows() const { return q_start.back(); }

  void check(const KvLayer& kv, const char* op) const {
    require_of(block == kv.block && num_blocks <= kv.num_blocks,
               [op] { return std::string(op) + ": the step's blocks are not of this cache"; });
  }
};

void store_kv_op(const BoundKvLayer& layer, py::handle k, py::handle v, const Step& step) {
  const KvLayer& kv = layer.kv;
  const View vk = view(k, DType::kFloat32, 3, "k"), vv = view(v, DType::kFloat32, 3, "v");
  submit({k, v}, [vk, vv, &kv, &step] {
    step.check(kv, "store_kv");
    require(same_shape(vk, vv) && live_rows(vk.shape[0]) == step.rows() && vk.shape[1] == kv.heads && vk.shape[2] == kv.size,
            "store_kv: k and v must be [T, Hkv, D] of the step and the cache");
    store_kv(kv, vk.ptr<float>(), vk.stride[0], vk.stride[1], vv.ptr<float>(), vv.stride[0], vv.stride[1],
             step.slots.data(), step.rows());
  });
}

void attention_op(py::handle q, const BoundKvLayer& layer, const Step& step, float scale, int64_t window,
                  py::handle out) {
  const KvLayer& kv = layer.kv;
  const View vq = view(q, DType::kFloat32, 3, "q"), vo = view(out, DType::kFloat32, 3, "out");
  require(same_shape(vq, vo), "attention: out must have the shape of q");
  require(window >= 0, "attention: window must be 0 (all keys) or positive");
  submit({q, out}, [vq, vo, &kv, &step, scale, window] {
    step.check(kv, "attention");
    require(live_rows(vq.shape[0]) == step.rows() && vq.shape[2] == kv.size && vq.shape[1] > 0 && vq.shape[1] % kv.heads == 0,
            "attention: q must be [T, Hq, D] of the step and the cache, Hq a multiple of Hkv");
    attention({vq.ptr<float>(), vq.stride[0], vq.stride[1], vo.ptr<float>(), vo.stride[0], vo.stride[1], vq.shape[1],
               &kv, static_cast<int64_t>(step.kv_lens.size()), step.q_start.data(), step.kv_lens.data(),
               step.block_table.data(), step.table_stride, scale, window});
  });
}

// --- element-wise ----------------------------------------------------------------------------------------------------

void rms_norm_op(py::handle x, py::handle weight, float eps, py::handle normed, py::handle residual,
                 py::handle summed) {
  const int ndim = py::cast<int>(x.attr("ndim"));
  require(ndim == 2 || ndim == 3, "rms_norm: x must be [T, D] or [T, H, D]");
  const View vx = view(x, DType::kFloat32, ndim, "x");
  const View vw = view_contiguous(weight, DType::kFloat32, 1, "weight");
  const auto rows = [&](py::handle t, const char* what) {
    const View v = view(t, DType::kFloat32, ndim, what);
    require_of(same_shape(v, vx), std::string(what) + ": must have the shape of x");
    return Rows{v.ptr<float>(), v.stride[0], ndim == 3 ? v.stride[1] : 0};
  };
  const int64_t size = vx.shape[ndim - 1];
  require(vw.shape[0] == size && size > 0, "rms_norm: weight must be [D]");
  require(residual.is_none() == summed.is_none(), "rms_norm: residual and summed go together");
  RmsNormArgs args{};
  args.x = rows(x, "x");
  args.normed = rows(normed, "normed");
  args.weight = vw.ptr<float>();
  args.eps = eps;
  args.outer = vx.shape[0];
  args.inner = ndim == 3 ? vx.shape[1] : 1;
  args.size = size;
  if (!residual.is_none()) {
    args.residual = rows(residual, "residual");
    args.summed = rows(summed, "summed");
  }
  const auto run = [args] {
    RmsNormArgs live = args;
    live.outer = live_rows(args.outer);
    rms_norm(live);
  };
  if (residual.is_none()) {
    submit({x, weight, normed}, run);
  } else {
    submit({x, weight, normed, residual, summed}, run);
  }
}

void rope_op(py::handle q, py::handle k, py::handle cos, py::handle sin) {
  const View vq = view(q, DType::kFloat32, 3, "q"), vk = view(k, DType::kFloat32, 3, "k");
  const View vc = view(cos, DType::kFloat32, 2, "cos"), vs = view(sin, DType::kFloat32, 2, "sin");
  require(vk.shape[0] == vq.shape[0] && vk.shape[2] == vq.shape[2], "rope: q and k must be [T, Hq, D] and [T, Hkv, D]");
  require(same_shape(vc, vs) && vc.shape[0] == vq.shape[0] && 2 * vc.shape[1] <= vq.shape[2],
          "rope: cos and sin must be [T, r] with 2 r <= D");
  submit({q, k, cos, sin}, [vq, vk, vc, vs] {
    rope({vq.ptr<float>(), vq.shape[1], vq.stride[0], vq.stride[1]},
         {vk.ptr<float>(), vk.shape[1], vk.stride[0], vk.stride[1]}, live_rows(vq.shape[0]), vc.ptr<float>(),
         vc.stride[0], vs.ptr<float>(), vs.stride[0], vc.shape[1]);
  });
}

void silu_mul_op(py::handle gate_up, py::handle out) {
  const View in = view(gate_up, DType::kFloat32, 2, "gate_up"), to = view(out, DType::kFloat32, 2, "out");
  require(to.shape[0] == in.shape[0] && in.shape[1] == 2 * to.shape[1],
          "silu_mul: gate_up must be [T, 2F], out [T, F]");
  submit({gate_up, out}, [in, to] {
    silu_mul(in.ptr<float>(), in.stride[0], live_rows(in.shape[0]), to.shape[1], to.ptr<float>(), to.stride[0]);
  });
}

// --- sampling --------------------------------------------------------------------------------------------------------

// A SampleRow's fields, with the memory its ids point to.
struct RowParams {
  SampleArgs args;
  std::vector<int64_t> bias_ids, banned, prompt_ids, output_ids;
  std::vector<double> bias_values;

  RowParams(py::handle row, int64_t vocab) {
    const auto number = [&](const char* name) { return row.attr(name).cast<double>(); };
    const auto ids = [&](const char* name, std::vector<int64_t>& to) {
      for (py::handle id : row.attr(name)) to.push_back(id.cast<int64_t>());
      check(to, vocab, name);
    };
    args.temperature = number("temperature");
    args.top_k = row.attr("top_k").cast<int64_t>();
    args.top_p = number("top_p");
    args.min_p = number("min_p");
    args.repetition_penalty = number("repetition_penalty");
    args.presence_penalty = number("presence_penalty");
    args.frequency_penalty = number("frequency_penalty");
    args.uniform = number("uniform");
    require(args.temperature >= 0.0, "sample: temperature must not be negative");
    require(args.repetition_penalty > 0.0, "sample: repetition_penalty must be positive");
    require(args.top_p >= 0.0 && args.min_p >= 0.0 && args.min_p <= 1.0, "sample: top_p and min_p must be in [0, 1]");
    require(args.uniform >= 0.0 && args.uniform < 1.0, "sample: uniform must be in [0, 1)");
    for (auto [id, value] : row.attr("logit_bias").cast<py::dict>()) {
      bias_ids.push_back(id.cast<int64_t>());
      bias_values.push_back(value.cast<double>());
    }
    check(bias_ids, vocab, "logit_bias");
    ids("banned", banned);
    const bool repetition = args.repetition_penalty != 1.0;
    if (repetition) ids("prompt_ids", prompt_ids);
    if (repetition || args.presence_penalty != 0.0 || args.frequency_penalty != 0.0) ids("output_ids", output_ids);
    const auto size = [](const auto& v) { return static_cast<int64_t>(v.size()); };
    args.bias_ids = bias_ids.data();
    args.bias_values = bias_values.data();
    args.num_bias = size(bias_ids);
    args.banned = banned.data();
    args.num_banned = size(banned);
    args.prompt_ids = prompt_ids.data();
    args.num_prompt = size(prompt_ids);
    args.output_ids = output_ids.data();
    args.num_output = size(output_ids);
  }
  RowParams(RowParams&&) = default;

 private:
  static void check(const std::vector<int64_t>& ids, int64_t vocab, const char* what) {
    for (int64_t id : ids) {
      require_of(id >= 0 && id < vocab,
                 [&] { return "sample: " + std::string(what) + ": no token " + std::to_string(id); });
    }
  }
};

std::vector<int64_t> sample_op(py::handle logits, py::sequence rows) {
  const View x = view(logits, DType::kFloat32, 2, "logits");
  require_of(x.shape[0] == static_cast<int64_t>(rows.size()), "sample: " + std::to_string(x.shape[0]) +
                                                                  " rows of logits for " + std::to_string(rows.size()) +
                                                                  " sampling rows");
  std::vector<RowParams> params;
  for (py::handle row : rows) params.emplace_back(row, x.shape[1]);
  std::vector<int64_t> out(params.size(), -1);
  {
    py::gil_scoped_release nogil;
    parallel_for(x.shape[0],
                 [&](int64_t r) { out[r] = sample_row(x.ptr<float>() + r * x.stride[0], x.shape[1], params[r].args); });
  }
  if (std::find(out.begin(), out.end(), -1) != out.end()) {
    py::object error = py::module_::import("qwen_rt.errors").attr("BackendError");
    PyErr_SetString(error.ptr(),
                    "the logits hold NaN or infinity, or every token is banned: the model's output is unusable");
    throw py::error_already_set();
  }
  return out;
}

}  // namespace

void bind_ops(py::module_& m) {
  const py::none none;
  py::class_<BoundKvLayer>(m, "KvLayer",
                           "One layer's pages: k, v [num_blocks, Hkv, block, D]; for uint8 codes also their "
                           "float32 scale and min [num_blocks, Hkv, block]. Blocks are contiguous; what is between "
                           "them is not touched.")
      .def(py::init<py::object, py::object, py::object, py::object, py::object, py::object>(), py::arg("k"),
           py::arg("v"), py::arg("k_scale") = none, py::arg("k_min") = none, py::arg("v_scale") = none,
           py::arg("v_min") = none);
  py::class_<Step>(m, "Step",
                   "A BatchMeta, checked: ValueError unless lengths agree, tables reach and slots are in place.")
      .def(py::init<const std::vector<int64_t>&, std::vector<int64_t>, const std::vector<std::vector<int64_t>>&,
                    std::vector<int64_t>, int64_t>(),
           py::arg("q_lens"), py::arg("kv_lens"), py::arg("block_table"), py::arg("slots"), py::arg("block_size"))
      .def("assign",
           [](Step& self, const std::vector<int64_t>& q_lens, std::vector<int64_t> kv_lens,
              const std::vector<std::vector<int64_t>>& tables, std::vector<int64_t> slots) {
             self = Step(q_lens, std::move(kv_lens), tables, std::move(slots), self.block);
           },
           py::arg("q_lens"), py::arg("kv_lens"), py::arg("block_table"), py::arg("slots"),
           "Become another step, in place: programs recorded with this one see it. When it is not one, nothing changes.");
  m.def("store_kv", &store_kv_op, py::arg("kv"), py::arg("k"), py::arg("v"), py::arg("step"));
  m.def("attention", &attention_op, py::arg("q"), py::arg("kv"), py::arg("step"), py::arg("scale"), py::arg("window"),
        py::arg("out"), "window 0: all keys.");
  m.def("rms_norm", &rms_norm_op, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("normed"),
        py::arg("residual") = none, py::arg("summed") = none,
        "x [T, D] or [T, H, D]; writes normed and, with a residual, summed = x + residual.");
  m.def("rope", &rope_op, py::arg("q"), py::arg("k"), py::arg("cos"), py::arg("sin"), "In place.");
  m.def("silu_mul", &silu_mul_op, py::arg("gate_up"), py::arg("out"));
  m.def("sample", &sample_op, py::arg("logits"), py::arg("rows"),
        "One id for each row of float32 logits [R, V] (overwritten) and SampleRow. BackendError for unusable logits.");
}

}  // namespace qwen_rt
