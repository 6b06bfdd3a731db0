// Matrix products: float32 accumulation, one rounding. Weights are widened a strip of columns at a time, so that a
// large one needs a few MB of scratch.
#include "registry.h"

using namespace cannsim;

namespace {

constexpr int8_t kKeepType = 0, kAllowDown = 1, kUseFp16 = 2, kUseHf32 = 3;

Tensor product(const Tensor& a, const Tensor& b) {
  if (b.dim() != 2 || !at::isReducedFloatingType(b.scalar_type())) return at::matmul(wide(a), wide(b));
  const Tensor left = wide(a);
  const int64_t strip = std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(b.size(0), 1));
  std::vector<int64_t> shape(a.sizes().begin(), a.sizes().end() - 1);
  shape.push_back(b.size(1));
  Tensor out = at::empty(shape, left.options());
  for (int64_t n = 0; n < b.size(1); n += strip) {
    const int64_t width = std::min(strip, b.size(1) - n);
    out.narrow(-1, n, width).copy_(at::matmul(left, b.narrow(1, n, width).to(at::kFloat)));
  }
  return out;
}

// aclnnMatmul and its kin: types, reduce dimension, and cubeMathType (how FLOAT may be narrowed): on the first 910
// FLOAT needs cubeMathType 1 or 2 and 3 is refused; 2 is refused for BFLOAT16, 3 needs FLOAT.
void require_product(const Desc& a, const Desc& b, const Desc& out, int8_t cube) {
  require_float(a, "self");
  require_float(b, "mat2");
  require_float(out, "out");
  require(a.rank() >= 1 && b.rank() >= 1, "self and mat2 need dimensions");
  const int64_t k = b.dim(b.rank() > 1 ? -2 : 0);
  require(a.dim(-1) == k, "reduce dimensions differ: " + a.shape() + " and " + b.shape());
  if (chip().family == Family::k910A) {
    require(a.type() != ACL_FLOAT || cube != kKeepType, "cubeMathType 0 is not supported for FLOAT on this chip");
    require(cube != kUseHf32, "cubeMathType 3 is not supported on this chip");
  }
  require(cube != kUseFp16 || a.type() != ACL_BF16, "cubeMathType 2 is not supported for BFLOAT16");
}
void check_matmul(const Desc& a, const Desc& b, const Desc& out, int8_t cube) { require_product(a, b, out, cube); }
void check_mm(const Desc& a, const Desc& b, const Desc& out, int8_t cube) {
  require(a.rank() == 2 && b.rank() == 2, "self and mat2 must have 2 dimensions");
  require_product(a, b, out, cube);
}
void check_bmm(const Desc& a, const Desc& b, const Desc& out, int8_t cube) {
  require(a.rank() == 3 && b.rank() == 3, "self and mat2 must have 3 dimensions");
  require(a.dim(0) == b.dim(0) || a.dim(0) == 1 || b.dim(0) == 1, "batch dimensions differ");
  require_product(a, b, out, cube);
}
void check_weight_nz(const Desc& a, const Desc& b, const Desc& out, int8_t cube) {
  require_half(a, "self");
  require_half(b, "mat2");
  require(b.nz(), "mat2 must be FRACTAL_NZ");
  require(cube == kKeepType || cube == kUseFp16, "cubeMathType must be 0 or 2");
  require_product(a, b, out, cube);
}
void check_addmm(const Desc& bias, const Desc& a, const Desc& b, const std::optional<Scalar>&,
                 const std::optional<Scalar>&, const Desc& out, int8_t cube) {
  require_float(bias, "self");
  require(a.rank() == 2 && b.rank() == 2, "mat1 and mat2 must have 2 dimensions");
  require_product(a, b, out, cube);
}
static_assert(kAllowDown == 1);

}  // namespace

SIM_OP(aclnnMm, kBoth, "ops-nn/matmul/mat_mul_v3", check_mm,
       [](Tensor a, Tensor b, Tensor out, int8_t) { put(out, product(a, b)); })
SIM_OP(aclnnMatmul, kBoth, "ops-nn/matmul/mat_mul_v3", check_matmul,
       [](Tensor a, Tensor b, Tensor out, int8_t) { put(out, product(a, b)); })
SIM_OP(aclnnMatmulWeightNz, kOnly910B, "ops-nn/matmul/mat_mul_v3", check_weight_nz,
       [](Tensor a, Tensor b, Tensor out, int8_t) { put(out, product(a, b)); })
SIM_OP(aclnnBatchMatMul, kBoth, "ops-nn/matmul/batch_mat_mul_v3", check_bmm,
       [](Tensor a, Tensor b, Tensor out, int8_t) { put(out, product(a, b)); })
SIM_OP(aclnnAddmm, kBoth, "ops-nn/matmul/mat_mul_v3", check_addmm,
       [](Tensor bias, Tensor a, Tensor b, Scalar beta, Scalar alpha, Tensor out, int8_t) {
         put(out, product(a, b).mul_(alpha).add_(wide(bias), beta));
       })
