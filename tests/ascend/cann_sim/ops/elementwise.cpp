// Elementwise arithmetic, comparison and logic; fills. torch's kernels compute 16-bit floats in float32 and round once.
#include "registry.h"

using namespace cannsim;

namespace {

// Output shapes: what broadcasting gives.
void require_broadcast(const Desc& a, const Desc& b, const Desc& out) {
  const auto expected = at::infer_size(a.dims(), b.dims());
  require(out.dims() == std::vector<int64_t>(expected.begin(), expected.end()),
          "out " + out.shape() + " is not the broadcast of " + a.shape() + " and " + b.shape());
}
void check_binary(const Desc& a, const Desc& b, const Desc& out) { require_broadcast(a, b, out); }
void check_binary_alpha(const Desc& a, const Desc& b, const std::optional<Scalar>&, const Desc& out) {
  require_broadcast(a, b, out);
}
void check_unary(const Desc& a, const Desc& out) { require_same_shape(a, out, "self and out"); }
void check_in_place(const Desc& self, const Desc& other) { require_broadcast(self, other, self); }
void check_in_place_alpha(const Desc& self, const Desc& other, const std::optional<Scalar>&) {
  require_broadcast(self, other, self);
}
void check_mask(const Desc& self, const Desc& mask, const std::optional<Scalar>&) {
  require(mask.type() == ACL_BOOL, "mask must be BOOL");
  require_broadcast(self, mask, self);
}
void check_mask_tensor(const Desc& self, const Desc& mask, const Desc& value) {
  require(mask.type() == ACL_BOOL, "mask must be BOOL");
  require(value.rank() == 0 || value.numel() == 1, "value must be one element");
  require_broadcast(self, mask, self);
}
void check_where(const Desc& condition, const Desc& a, const Desc& b, const Desc&) {
  require(condition.type() == ACL_BOOL || condition.type() == ACL_UINT8, "condition must be BOOL or UINT8");
  require_same_type(a, b, "self and other");
}

Tensor divide(const Tensor& a, const Tensor& b, int mode) {  // DivMod: 0 true, 1 trunc, 2 floor
  if (mode == 0) return at::div(a, b);
  return at::div(a, b, mode == 1 ? "trunc" : "floor");
}

}  // namespace

// --- arithmetic on two operands
SIM_OP(aclnnAdd, kBoth, "ops-math/math/add", check_binary_alpha,
       [](Tensor a, Tensor b, Scalar alpha, Tensor out) { put(out, at::add(a, b, alpha)); })
SIM_OP(aclnnAdds, kBoth, "ops-math/math/add", kNoCheck,
       [](Tensor a, Scalar b, Scalar alpha, Tensor out) { put(out, at::add(a, b, alpha)); })
SIM_OP(aclnnAddV3, kOnly910B, "ops-math/math/add", kNoCheck,
       [](Scalar a, Tensor b, Scalar alpha, Tensor out) { put(out, at::mul(wide(b), alpha).add(a)); })
SIM_OP(aclnnInplaceAdd, kBoth, "ops-math/math/add", check_in_place_alpha,
       [](Tensor a, Tensor b, Scalar alpha) { a.add_(b, alpha); })
SIM_OP(aclnnInplaceAdds, kBoth, "ops-math/math/add", kNoCheck,
       [](Tensor a, Scalar b, Scalar alpha) { a.add_(b, alpha); })
SIM_OP(aclnnSub, kBoth, "ops-math/math/sub", check_binary_alpha,
       [](Tensor a, Tensor b, Scalar alpha, Tensor out) { put(out, at::sub(a, b, alpha)); })
SIM_OP(aclnnSubs, kBoth, "ops-math/math/sub", kNoCheck,
       [](Tensor a, Scalar b, Scalar alpha, Tensor out) { put(out, at::sub(a, b, alpha)); })
SIM_OP(aclnnRsubs, kBoth, "ops-math/math/rsub", kNoCheck,
       [](Tensor a, Scalar b, Scalar alpha, Tensor out) { put(out, at::rsub(a, b, alpha)); })
SIM_OP(aclnnInplaceSub, kBoth, "ops-math/math/sub", check_in_place_alpha,
       [](Tensor a, Tensor b, Scalar alpha) { a.sub_(b, alpha); })
SIM_OP(aclnnInplaceSubs, kBoth, "ops-math/math/sub", kNoCheck,
       [](Tensor a, Scalar b, Scalar alpha) { a.sub_(b, alpha); })
SIM_OP(aclnnMul, kBoth, "ops-math/math/mul", check_binary,
       [](Tensor a, Tensor b, Tensor out) { put(out, at::mul(a, b)); })
SIM_OP(aclnnMuls, kBoth, "ops-math/math/muls", kNoCheck,
       [](Tensor a, Scalar b, Tensor out) { put(out, at::mul(a, b)); })
SIM_OP(aclnnInplaceMul, kBoth, "ops-math/math/mul", check_in_place, [](Tensor a, Tensor b) { a.mul_(b); })
SIM_OP(aclnnInplaceMuls, kBoth, "ops-math/math/muls", kNoCheck, [](Tensor a, Scalar b) { a.mul_(b); })
SIM_OP(aclnnDiv, kBoth, "ops-math/math/real_div", check_binary,
       [](Tensor a, Tensor b, Tensor out) { put(out, at::div(a, b)); })
SIM_OP(aclnnDivs, kBoth, "ops-math/math/real_div", kNoCheck,
       [](Tensor a, Scalar b, Tensor out) { put(out, at::div(a, b)); })
SIM_OP(aclnnInplaceDiv, kBoth, "ops-math/math/real_div", check_in_place, [](Tensor a, Tensor b) { a.div_(b); })
SIM_OP(aclnnInplaceDivs, kBoth, "ops-math/math/real_div", kNoCheck, [](Tensor a, Scalar b) { a.div_(b); })
SIM_OP(aclnnDivMod, kBoth, "ops-math/math/real_div", kNoCheck,
       [](Tensor a, Tensor b, int mode, Tensor out) { put(out, divide(a, b, mode)); })
SIM_OP(aclnnDivMods, kBoth, "ops-math/math/real_div", kNoCheck,
       [](Tensor a, Scalar b, int mode, Tensor out) { put(out, divide(a, at::scalar_tensor(b, a.options()), mode)); })
SIM_OP(aclnnFloorDivide, kBoth, "ops-math/math/floor_div", check_binary,
       [](Tensor a, Tensor b, Tensor out) { put(out, at::floor_divide(a, b)); })
SIM_OP(aclnnFloorDivides, kBoth, "ops-math/math/floor_div", kNoCheck,
       [](Tensor a, Scalar b, Tensor out) { put(out, at::floor_divide(a, b)); })
SIM_OP(aclnnRemainderTensorScalar, kBoth, "ops-math/math/floor_mod", kNoCheck,
       [](Tensor a, Scalar b, Tensor out) { put(out, at::remainder(a, b)); })
SIM_OP(aclnnMaximum, kBoth, "ops-math/math/maximum", check_binary,
       [](Tensor a, Tensor b, Tensor out) { put(out, at::maximum(a, b)); })
SIM_OP(aclnnMinimum, kBoth, "ops-math/math/minimum", check_binary,
       [](Tensor a, Tensor b, Tensor out) { put(out, at::minimum(a, b)); })
SIM_OP(aclnnPowTensorScalar, kBoth, "ops-math/math/pow", kNoCheck,
       [](Tensor a, Scalar b, Tensor out) { put(out, at::pow(wide(a), b)); })
SIM_OP(aclnnInplacePowTensorScalar, kBoth, "ops-math/math/pow", kNoCheck,
       [](Tensor a, Scalar b) { put(a, at::pow(wide(a), b)); })
SIM_OP(aclnnClamp, kBoth, "ops-math/conversion/clip_by_value_v2", kNoCheck,
       [](Tensor a, std::optional<Scalar> low, std::optional<Scalar> high, Tensor out) {
         put(out, at::clamp(a, low, high));
       })
SIM_OP(aclnnClampMin, kBoth, "ops-math/conversion/clip_by_value_v2", kNoCheck,
       [](Tensor a, Scalar low, Tensor out) { put(out, at::clamp_min(a, low)); })
SIM_OP(aclnnClampMax, kBoth, "ops-math/conversion/clip_by_value_v2", kNoCheck,
       [](Tensor a, Scalar high, Tensor out) { put(out, at::clamp_max(a, high)); })

// --- one operand
#define UNARY(name, on, documentation, function) \
  SIM_OP(name, on, documentation, check_unary, [](Tensor a, Tensor out) { put(out, function(a)); })
UNARY(aclnnNeg, kBoth, "ops-math/math/neg", at::neg)
UNARY(aclnnAbs, kBoth, "ops-math/math/abs", at::abs)
UNARY(aclnnExp, kBoth, "ops-math/math/exp", at::exp)  // the page excludes the 910A, those of CANN 8.0 to 8.2 list it
UNARY(aclnnLog, kOnly910B, "ops-math/math/log", at::log)
UNARY(aclnnSigmoid, kBoth, "ops-nn/activation/sigmoid", at::sigmoid)
UNARY(aclnnSilu, kBoth, "ops-nn/activation/swish", at::silu)
UNARY(aclnnRsqrt, kBoth, "ops-math/math/rsqrt", at::rsqrt)
UNARY(aclnnSqrt, kBoth, "ops-math/math/sqrt", at::sqrt)
UNARY(aclnnReciprocal, kBoth, "ops-math/math/reciprocal", at::reciprocal)
UNARY(aclnnSin, kBoth, "ops-math/math/sin", at::sin)
UNARY(aclnnCos, kBoth, "ops-math/math/cos", at::cos)
UNARY(aclnnRound, kBoth, "ops-math/math/round", at::round)
UNARY(aclnnFloor, kBoth, "ops-math/math/floor", at::floor)
UNARY(aclnnCeil, kBoth, "ops-math/math/ceil", at::ceil)
UNARY(aclnnTrunc, kBoth, "ops-math/math/trunc", at::trunc)
UNARY(aclnnIsFinite, kBoth, "ops-math/math/is_finite", at::isfinite)
UNARY(aclnnLogicalNot, kBoth, "ops-math/math/logical_not", at::logical_not)
UNARY(aclnnBitwiseNot, kBoth, "ops-math/math/bitwise_not", at::bitwise_not)
SIM_OP(aclnnInplaceRsqrt, kBoth, "ops-math/math/rsqrt", kNoCheck, [](Tensor a) { a.rsqrt_(); })
SIM_OP(aclnnInplaceNeg, kBoth, "ops-math/math/neg", kNoCheck, [](Tensor a) { a.neg_(); })

// --- comparison and logic
#define COMPARE(kind, documentation, function)                             \
  SIM_OP(aclnn##kind##Tensor, kBoth, documentation, check_binary,          \
         [](Tensor a, Tensor b, Tensor out) { put(out, function(a, b)); }) \
  SIM_OP(aclnn##kind##Scalar, kBoth, documentation, kNoCheck,              \
         [](Tensor a, Scalar b, Tensor out) { put(out, function(a, b)); })
COMPARE(Lt, "ops-math/math/less", at::lt)
COMPARE(Le, "ops-math/math/less_equal", at::le)
COMPARE(Gt, "ops-math/math/greater", at::gt)
COMPARE(Ge, "ops-math/math/greater_equal", at::ge)
COMPARE(Eq, "ops-math/math/equal", at::eq)
COMPARE(Ne, "ops-math/math/not_equal", at::ne)
SIM_OP(aclnnLogicalAnd, kBoth, "ops-math/math/logical_and", check_binary,
       [](Tensor a, Tensor b, Tensor out) { put(out, at::logical_and(a, b)); })
SIM_OP(aclnnLogicalOr, kBoth, "ops-math/math/logical_or", check_binary,
       [](Tensor a, Tensor b, Tensor out) { put(out, at::logical_or(a, b)); })
SIM_OP(aclnnBitwiseAndTensor, kBoth, "ops-math/math/bitwise_and", check_binary,
       [](Tensor a, Tensor b, Tensor out) { put(out, at::bitwise_and(a, b)); })
SIM_OP(aclnnBitwiseAndScalar, kBoth, "ops-math/math/bitwise_and", kNoCheck,
       [](Tensor a, Scalar b, Tensor out) { put(out, at::bitwise_and(a, b)); })
SIM_OP(aclnnBitwiseOrTensor, kBoth, "ops-math/math/bitwise_or", check_binary,
       [](Tensor a, Tensor b, Tensor out) { put(out, at::bitwise_or(a, b)); })
SIM_OP(aclnnInplaceLogicalAnd, kBoth, "ops-math/math/logical_and", check_in_place,
       [](Tensor a, Tensor b) { a.logical_and_(b); })
SIM_OP(aclnnInplaceLogicalOr, kBoth, "ops-math/math/logical_or", check_in_place,
       [](Tensor a, Tensor b) { a.logical_or_(b); })
SIM_OP(aclnnInplaceBitwiseAndTensor, kBoth, "ops-math/math/bitwise_and", check_in_place,
       [](Tensor a, Tensor b) { a.bitwise_and_(b); })
SIM_OP(aclnnInplaceBitwiseOrTensor, kBoth, "ops-math/math/bitwise_or", check_in_place,
       [](Tensor a, Tensor b) { a.bitwise_or_(b); })
SIM_OP(aclnnLeftShift, kOnly910B, "ops-math/math/left_shift", check_binary,
       [](Tensor a, Tensor b, Tensor out) { put(out, at::bitwise_left_shift(a, b)); })
SIM_OP(aclnnRightShift, kOnly910B, "ops-math/math/right_shift", check_binary,
       [](Tensor a, Tensor b, Tensor out) { put(out, at::bitwise_right_shift(a, b)); })
SIM_OP(aclnnSWhere, kBoth, "ops-math/math/select_v2", check_where,
       [](Tensor condition, Tensor a, Tensor b, Tensor out) { put(out, at::where(condition.to(at::kBool), a, b)); })

// --- fills
SIM_OP(aclnnInplaceFillScalar, kBoth, "ops-math/conversion/fill", kNoCheck, [](Tensor a, Scalar v) { a.fill_(v); })
SIM_OP(aclnnInplaceFillTensor, kBoth, "ops-math/conversion/fill", kNoCheck,
       [](Tensor a, Tensor v) { a.copy_(v.expand_as(a)); })
SIM_OP(aclnnInplaceZero, kBoth, "ops-math/conversion/zeros_like", kNoCheck, [](Tensor a) { a.zero_(); })
SIM_OP(aclnnInplaceOne, kBoth, "ops-math/conversion/ones_like", kNoCheck, [](Tensor a) { a.fill_(1); })
SIM_OP(aclnnInplaceMaskedFillScalar, kBoth, "ops-math/conversion/masked_fill", check_mask,
       [](Tensor a, Tensor mask, Scalar v) { a.masked_fill_(mask, v); })
SIM_OP(aclnnInplaceMaskedFillTensor, kBoth, "ops-math/conversion/masked_fill", check_mask_tensor,
       [](Tensor a, Tensor mask, Tensor v) { a.masked_fill_(mask, v.reshape({})); })
