// Reductions, softmax, sorting and searching.
#include "registry.h"

using namespace cannsim;

namespace {

at::OptionalIntArrayRef dims_of(const Ints& dims) {
  return dims && !dims->empty() ? at::OptionalIntArrayRef(*dims) : at::OptionalIntArrayRef();
}
void require_dim(const Desc& self, int64_t dim) {
  const int64_t n = std::max<int64_t>(self.rank(), 1);
  require(dim >= -n && dim < n,
          "dim " + std::to_string(dim) + " is outside of a tensor of " + std::to_string(n) + " dimensions");
}
// The documented output types: INT32 or INT64 indices.
void check_arg_max(const Desc& self, int64_t dim, bool, const Desc& out) {
  require_dim(self, dim);
  require(is_index(out.type()), "out must be INT32 or INT64");
}
void check_softmax(const Desc& self, int64_t dim, const Desc& out) {
  require_dim(self, dim);
  require(is_float(self.type()) || self.type() == ACL_DOUBLE, "self must be FLOAT16, BFLOAT16, FLOAT or DOUBLE");
  require_same_shape(self, out, "self and out");
}
void check_topk(const Desc& self, int64_t k, int64_t dim, bool, bool, const Desc& values, const Desc& indices) {
  require_dim(self, dim);
  require(self.type() != ACL_BOOL, "self must not be BOOL");
  require(k >= 0 && (self.rank() == 0 || k <= self.dim(dim)), "k must be within [0, self.size(dim)]");
  require_same_type(self, values, "self and valuesOut");
  require(indices.type() == ACL_INT64, "indicesOut must be INT64");
}
void check_sort(const Desc& self, bool, int64_t dim, bool, const Desc& values, const Desc& indices) {
  require_dim(self, dim);
  require_same_shape(self, values, "self and valuesOut");
  require(indices.type() == ACL_INT64, "indicesOut must be INT64");
}
void check_cumsum(const Desc& self, int64_t dim, aclDataType type, const Desc& out) {
  require_dim(self, dim);
  require(self.rank() <= 8, "self must have at most 8 dimensions");
  require(out.type() == type, "out must have the type that dtype names");
  require_same_shape(self, out, "self and out");
}
void check_mean(const Desc& self, const Ints&, bool, aclDataType type, const Desc& out) {
  require(is_float(self.type()) || self.type() == ACL_DOUBLE, "self must be a float type");
  require(out.type() == type, "out must have the type that dtype names");
}
void check_searchsorted(const Desc& sorted, const Desc& self, bool out32, bool, const Desc&, const Desc& out) {
  require_same_type(sorted, self, "sortedSequence and self");
  require(out.type() == (out32 ? ACL_INT32 : ACL_INT64), "out must be INT32 with outInt32, else INT64");
}

}  // namespace

SIM_OP(aclnnMax, kBoth, "ops-math/math/reduce_max", kNoCheck, [](Tensor a, Tensor out) { put(out, at::max(a)); })
SIM_OP(aclnnMin, kBoth, "ops-math/math/reduce_min", kNoCheck, [](Tensor a, Tensor out) { put(out, at::min(a)); })
SIM_OP(aclnnMaxDim, kBoth, "ops-math/math/arg_max_with_value", kNoCheck,
       [](Tensor a, int64_t dim, bool keep, Tensor out, Tensor indices) {
         auto [v, i] = at::max(a, dim, keep);
         put(out, v), put(indices, i);
       })
SIM_OP(aclnnMinDim, kBoth, "ops-math/math/arg_min_with_value", kNoCheck,
       [](Tensor a, int64_t dim, bool keep, Tensor out, Tensor indices) {
         auto [v, i] = at::min(a, dim, keep);
         put(out, v), put(indices, i);
       })
SIM_OP(aclnnAmax, kBoth, "ops-math/math/reduce_max", kNoCheck, [](Tensor a, Ints dims, bool keep, Tensor out) {
  put(out, at::amax(a, dims.value_or(std::vector<int64_t>{}), keep));
})
SIM_OP(aclnnAmin, kBoth, "ops-math/math/reduce_min", kNoCheck, [](Tensor a, Ints dims, bool keep, Tensor out) {
  put(out, at::amin(a, dims.value_or(std::vector<int64_t>{}), keep));
})
SIM_OP(aclnnAny, kBoth, "ops-math/math/reduce_any", kNoCheck,
       [](Tensor a, Ints dims, bool keep, Tensor out) { put(out, at::any(a, dims_of(dims), keep)); })
SIM_OP(aclnnAll, kBoth, "ops-math/math/reduce_all", kNoCheck,
       [](Tensor a, Ints dims, bool keep, Tensor out) { put(out, at::all(a, dims_of(dims), keep)); })
SIM_OP(aclnnReduceSum, kBoth, "ops-math/math/reduce_sum", kNoCheck,
       [](Tensor a, Ints dims, bool keep, aclDataType, Tensor out) { put(out, at::sum(wide(a), dims_of(dims), keep)); })
SIM_OP(aclnnMean, kBoth, "ops-math/math/reduce_mean", check_mean,
       [](Tensor a, Ints dims, bool keep, aclDataType, Tensor out) {
         put(out, at::mean(wide(a), dims_of(dims), keep));
       })
SIM_OP(aclnnMeanV2, kBoth, "ops-math/math/reduce_mean", kNoCheck,
       [](Tensor a, Ints dims, bool keep, bool noop_with_empty_axes, Tensor out) {
         const bool none = !dims || dims->empty();
         put(out, none && noop_with_empty_axes ? wide(a) : at::mean(wide(a), dims_of(dims), keep));
       })
SIM_OP(aclnnCumsum, kBoth, "ops-math/math/cumsum", check_cumsum,
       [](Tensor a, int64_t dim, aclDataType, Tensor out) { put(out, at::cumsum(wide(a), dim)); })
SIM_OP(aclnnSoftmax, kBoth, "ops-nn/activation/softmax_v2", check_softmax,
       [](Tensor a, int64_t dim, Tensor out) { put(out, at::softmax(wide(a), dim)); })
SIM_OP(aclnnLogSoftmax, kBoth, "ops-nn/activation/log_softmax_v2", check_softmax,
       [](Tensor a, int64_t dim, Tensor out) { put(out, at::log_softmax(wide(a), dim)); })
SIM_OP(aclnnArgMax, kBoth, "ops-math/math/arg_max_v2", check_arg_max,
       [](Tensor a, int64_t dim, bool keep, Tensor out) { put(out, at::argmax(wide(a), dim, keep)); })
SIM_OP(aclnnArgMin, kBoth, "ops-math/math/arg_min", check_arg_max,
       [](Tensor a, int64_t dim, bool keep, Tensor out) { put(out, at::argmin(wide(a), dim, keep)); })
SIM_OP(aclnnSort, kBoth, "ops-math/math/sort", check_sort,
       [](Tensor a, bool stable, int64_t dim, bool descending, Tensor values, Tensor indices) {
         auto [v, i] = at::sort(a, std::optional<bool>(stable), dim, descending);
         put(values, v), put(indices, i);
       })
SIM_OP(aclnnArgsort, kBoth, "ops-math/math/sort", kNoCheck,
       [](Tensor a, int64_t dim, bool descending, Tensor out) { put(out, at::argsort(a, dim, descending)); })
SIM_OP(aclnnTopk, kBoth, "ops-math/math/topk", check_topk,
       [](Tensor a, int64_t k, int64_t dim, bool largest, bool sorted, Tensor values, Tensor indices) {
         auto [v, i] = at::topk(a, k, dim, largest, sorted);
         put(values, v), put(indices, i);
       })
SIM_OP(aclnnSearchSorted, kBoth, "ops-math/math/search_sorted", check_searchsorted,
       [](Tensor sorted, Tensor self, bool out32, bool right, Tensor sorter, Tensor out) {
         const auto order = sorter.defined() ? std::optional<Tensor>(sorter) : std::nullopt;
         put(out, at::searchsorted(sorted, self, out32, right, std::nullopt, order));
       })
