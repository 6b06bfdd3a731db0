// Copies, casts, gathers and scatters. An index outside of its range ends the operator with an error, as a device
// exception would.
#include "registry.h"

using namespace cannsim;

namespace {

c10::List<std::optional<Tensor>> optional_indices(const Tensors& indices) {
  c10::List<std::optional<Tensor>> out;
  // torch_npu passes an undefined tensor, or an empty one, for a dimension that is not indexed
  for (const Tensor& t : indices) {
    const bool absent = !t.defined() || (t.numel() == 0 && t.dim() == 1);
    out.push_back(absent ? std::nullopt : std::optional<Tensor>(t.scalar_type() == at::kInt ? t.to(at::kLong) : t));
  }
  return out;
}
void check_embedding(const Desc& weight, const Desc& indices, const Desc& out) {
  require(weight.rank() == 2, "weight must have 2 dimensions, not " + weight.shape());
  require(is_index(indices.type()), "indices must be INT32 or INT64");
  require_same_type(weight, out, "weight and out");
}
void check_index_select(const Desc& self, int64_t dim, const Desc& index, const Desc& out) {
  require(dim >= -self.rank() && dim < self.rank(), "dim is outside of self");
  require(index.rank() <= 1 && is_index(index.type()), "index must have 1 dimension of INT32 or INT64");
  require_same_type(self, out, "self and out");
}
void check_gather(const Desc& self, int64_t, const Desc& index, const Desc& out) {
  require(self.rank() == index.rank(), "self and index must have as many dimensions");
  require(is_index(index.type()), "index must be INT32 or INT64");
  require_same_shape(index, out, "index and out");
  require_same_type(self, out, "self and out");
}
void check_cast(const Desc&, aclDataType type, const Desc& out) {
  require(out.type() == type, "out must have the type that dtype names");
}
void check_index_put(const Desc& self, const Descs& indices, const Desc& values, bool, bool) {
  require(static_cast<int64_t>(indices.size()) <= self.rank(), "more indices than dimensions");
  require_same_type(self, values, "selfRef and values");
}
void check_scatter_nd_update(const Desc& var, const Desc& indices, const Desc& updates) {
  require(indices.rank() >= 2 && is_index(indices.type()), "indices must have at least 2 dimensions of INT32 or INT64");
  require(indices.dim(-1) >= 1 && indices.dim(-1) <= var.rank(), "the last dimension of indices exceeds varRef's rank");
  require_same_type(var, updates, "varRef and updates");
  auto expected = indices.dims();
  expected.pop_back();
  expected.insert(expected.end(), var.dims().begin() + indices.dim(-1), var.dims().end());
  require(updates.dims() == expected,
          "updates must have the shape of indices' first dimensions and varRef's last ones");
}
void check_cat(const Descs& tensors, int64_t, const Desc&) { require(!tensors.empty(), "no tensors to concatenate"); }

}  // namespace

SIM_OP(aclnnInplaceCopy, kBoth, "ops-math/conversion/view_copy", kNoCheck,
       [](Tensor to, Tensor from) { to.copy_(from); })
SIM_OP(aclnnCast, kBoth, "ops-math/math/cast", check_cast, [](Tensor from, aclDataType, Tensor to) { to.copy_(from); })
SIM_OP(aclnnArange, kBoth, "ops-math/math/range", kNoCheck, [](Scalar start, Scalar end, Scalar step, Tensor out) {
  put(out, at::arange(start, end, step).narrow(0, 0, out.numel()));
})
SIM_OP(aclnnCat, kBoth, "ops-math/conversion/concat_d", check_cat,
       [](Tensors tensors, int64_t dim, Tensor out) { put(out, at::cat(tensors, dim)); })
SIM_OP(aclnnStack, kBoth, "ops-math/conversion/pack", check_cat,
       [](Tensors tensors, int64_t dim, Tensor out) { put(out, at::stack(tensors, dim)); })
SIM_OP(aclnnRepeat, kBoth, "ops-math/conversion/tile", kNoCheck,
       [](Tensor a, Ints repeats, Tensor out) { put(out, a.repeat(*repeats)); })
SIM_OP(aclnnRepeatInterleaveIntWithDim, kOnly910B, "ops-math/conversion/repeat_interleave", kNoCheck,
       [](Tensor a, int64_t repeats, int64_t dim, int64_t, Tensor out) { put(out, a.repeat_interleave(repeats, dim)); })
SIM_OP(aclnnFlip, kOnly910B, "ops-math/conversion/reverse_v2", kNoCheck,
       [](Tensor a, Ints dims, Tensor out) { put(out, a.flip(*dims)); })
SIM_OP(aclnnTril, kBoth, "ops-math/conversion/tril", kNoCheck,
       [](Tensor a, int64_t diagonal, Tensor out) { put(out, at::tril(a, diagonal)); })
SIM_OP(aclnnTriu, kBoth, "ops-math/conversion/triu", kNoCheck,
       [](Tensor a, int64_t diagonal, Tensor out) { put(out, at::triu(a, diagonal)); })
SIM_OP(aclnnConstantPadNd, kBoth, "ops-math/conversion/pad_v3", kNoCheck,
       [](Tensor a, Ints pad, Scalar v, Tensor out) { put(out, at::constant_pad_nd(a, *pad, v)); })

SIM_OP(aclnnEmbedding, kBoth, "ops-nn/index/embedding", check_embedding,
       [](Tensor weight, Tensor indices, Tensor out) { put(out, at::embedding(weight, indices)); })
SIM_OP(aclnnIndexSelect, kBoth, "ops-nn/index/gather_v2", check_index_select,
       [](Tensor a, int64_t dim, Tensor index, Tensor out) { put(out, at::index_select(a, dim, index)); })
SIM_OP(aclnnGather, kOnly910B, "ops-nn/index/gather_elements_v2", check_gather,
       [](Tensor a, int64_t dim, Tensor index, Tensor out) { put(out, at::gather(a, dim, index.to(at::kLong))); })
SIM_OP(aclnnScatter, kOnly910B, "ops-nn/index/scatter_elements_v2", kNoCheck,
       [](Tensor a, int64_t dim, Tensor index, Tensor src, int64_t reduce, Tensor out) {
         require(reduce == 0, "only plain scatter is simulated");
         put(out, at::scatter(a, dim, index.to(at::kLong), src));
       })
SIM_OP(aclnnInplaceScatter, kOnly910B, "ops-nn/index/scatter_elements_v2", kNoCheck,
       [](Tensor a, int64_t dim, Tensor index, Tensor src, int64_t reduce) {
         require(reduce == 0, "only plain scatter is simulated");
         a.scatter_(dim, index.to(at::kLong), src);
       })
SIM_OP(aclnnIndex, kBoth, "ops-nn/index/index", kNoCheck,
       [](Tensor a, Tensors indices, Tensor out) { put(out, at::index(a, optional_indices(indices))); })
SIM_OP(aclnnIndexPutImpl, kBoth, "ops-nn/index/index_put_v2", check_index_put,
       [](Tensor a, Tensors indices, Tensor values, bool accumulate, bool) {
         a.index_put_(optional_indices(indices), values, accumulate);
       })
SIM_OP(aclnnInplaceIndexCopy, kOnly910B, "ops-nn/index/scatter", kNoCheck,
       [](Tensor a, int64_t dim, Tensor index, Tensor source) { a.index_copy_(dim, index.to(at::kLong), source); })
SIM_OP(aclnnScatterNdUpdate, kOnly910B, "ops-nn/index/scatter_nd_update", check_scatter_nd_update,
       [](Tensor var, Tensor indices, Tensor updates) {
         const int64_t depth = indices.size(-1);
         c10::List<std::optional<Tensor>> at_list;
         for (int64_t i = 0; i < depth; ++i) at_list.push_back(indices.select(-1, i).to(at::kLong));
         var.index_put_(at_list, updates);
       })
SIM_OP(aclnnMaskedSelect, kBoth, "ops-nn/index/masked_select_v3", kNoCheck, [](Tensor a, Tensor mask, Tensor out) {
  auto picked = at::masked_select(a, mask);
  out.reshape({-1}).narrow(0, 0, picked.numel()).copy_(picked);
})
