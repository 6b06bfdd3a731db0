// The aclnn C ABI: descriptors as torch_npu makes them, and their way to an operator's C++ arguments.
//
// aclnn<Op>GetWorkspaceSize checks its arguments on the calling thread and packs them; aclnn<Op> queues the packed
// call. A packed tensor (Desc) owns its shape and points into device memory, which is read only when the stream's
// worker runs the operator: a replayed graph therefore sees new contents.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cannsim.h"

struct aclTensor {
  std::vector<int64_t> dims, strides, storage_dims;
  int64_t offset;  // elements
  aclFormat format;
  aclDataType type;
  void* data;  // device address
};
struct aclScalar {
  at::Scalar value;
};
struct aclIntArray {
  std::vector<int64_t> values;
};
struct aclBoolArray {
  std::vector<bool> values;
};
struct aclFloatArray {
  std::vector<float> values;
};
struct aclTensorList {
  std::vector<const aclTensor*> tensors;
};
struct aclScalarList {
  std::vector<const aclScalar*> scalars;
};
struct aclOpExecutor {
  std::string name;
  std::function<void()> run;
};

namespace cannsim {

using at::Scalar;
using at::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::optional<std::vector<int64_t>>;
using Text = std::string;

at::ScalarType scalar_type(aclDataType type);
const char* type_name(aclDataType type);

// A tensor argument: null when the caller passed none.
class Desc {
 public:
  Desc() = default;
  explicit Desc(const aclTensor* tensor) {
    if (tensor) tensor_ = *tensor;
  }
  explicit operator bool() const { return tensor_.has_value(); }
  const aclTensor* operator->() const { return &*tensor_; }
  aclDataType type() const { return tensor_->type; }
  const std::vector<int64_t>& dims() const { return tensor_->dims; }
  int64_t rank() const { return static_cast<int64_t>(tensor_->dims.size()); }
  int64_t dim(int64_t i) const { return tensor_->dims.at(i < 0 ? i + rank() : i); }
  int64_t numel() const;
  bool contiguous() const;
  bool transposed() const;  // the last two dimensions are swapped views of contiguous memory
  bool nz() const;          // FRACTAL_NZ: storage [..., n1, k1, k0, n0]
  std::string shape() const;

  Tensor view() const;                    // on a worker thread: the elements, whatever the format
  void store_nz(const Tensor& nd) const;  // the other way: fills FRACTAL_NZ storage, padding with zeros

 private:
  Tensor storage(at::IntArrayRef dims, at::IntArrayRef strides, int64_t offset) const;
  std::optional<aclTensor> tensor_;
};

using Descs = std::vector<Desc>;

// C argument type, what is packed, what the operator gets. Scalars (int64_t, int, int8_t, bool, double, float,
// aclDataType) pass through; their widths must match the declaration exactly, nothing in C checks them.
template <class T>
struct Arg {
  using C = T;
  using Packed = T;
  static Packed pack(C v) { return v; }
  static const T& unpack(const Packed& v) { return v; }
};
template <>
struct Arg<Tensor> {
  using C = const aclTensor*;
  using Packed = Desc;
  static Packed pack(C v) { return Desc(v); }
  static Tensor unpack(const Packed& v) { return v ? v.view() : Tensor(); }
};
template <>
struct Arg<Desc> : Arg<Tensor> {
  static const Desc& unpack(const Packed& v) { return v; }
};
template <>
struct Arg<Tensors> {
  using C = const aclTensorList*;
  using Packed = Descs;
  static Packed pack(C v) {
    Descs out;
    if (v)
      for (const aclTensor* t : v->tensors) out.emplace_back(t);
    return out;
  }
  static Tensors unpack(const Packed& v) {
    Tensors out;
    for (const Desc& d : v) out.push_back(Arg<Tensor>::unpack(d));
    return out;
  }
};
template <>
struct Arg<Scalar> {
  using C = const aclScalar*;
  using Packed = std::optional<Scalar>;
  static Packed pack(C v) { return v ? Packed(v->value) : std::nullopt; }
  static Scalar unpack(const Packed& v) { return v ? *v : Scalar(1); }  // optional scalars are factors (alpha)
};
template <>
struct Arg<std::optional<Scalar>> : Arg<Scalar> {
  static const Packed& unpack(const Packed& v) { return v; }
};
template <>
struct Arg<Ints> {
  using C = const aclIntArray*;
  using Packed = Ints;
  static Packed pack(C v) { return v ? Ints(v->values) : std::nullopt; }
  static const Ints& unpack(const Packed& v) { return v; }
};
template <>
struct Arg<Text> {
  using C = const char*;
  using Packed = Text;
  static Packed pack(C v) { return v ? v : ""; }
  static const Text& unpack(const Packed& v) { return v; }
};

}  // namespace cannsim
