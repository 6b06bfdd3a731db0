// RMSNorm, and the SwiGLU activation.
//
//   y = x / sqrt(mean(x^2) + eps) * gamma over gamma's dimensions; rstd = 1 / sqrt(...). AddRmsNorm: x = x1 + x2 first.
// Computed in float32; y and x are rounded once. AddRmsNorm normalises the rounded x.
#include "registry.h"

using namespace cannsim;

namespace {

Tensor inverse_rms(const Tensor& x, const Tensor& gamma, double eps) {
  std::vector<int64_t> dims;
  for (int64_t i = x.dim() - gamma.dim(); i < x.dim(); ++i) dims.push_back(i);
  return (x.square().mean(dims, true) + eps).rsqrt();
}

void require_gamma(const Desc& x, const Desc& gamma) {
  require(static_cast<bool>(gamma) && gamma.numel() > 0, "gamma must not be empty", kParamNullptr);
  require(gamma.rank() >= 1 && gamma.rank() <= x.rank() && x.rank() <= 8,
          "gamma must cover the last of x's 1 to 8 dimensions");
  const std::vector<int64_t> tail(x.dims().end() - gamma.rank(), x.dims().end());
  require(gamma.dims() == tail, "gamma " + gamma.shape() + " must be the last dimensions of x " + x.shape());
}
void require_rstd(const Desc& x, const Desc& gamma, const Desc& rstd) {
  if (!rstd) return;
  require(rstd.type() == ACL_FLOAT, "rstdOut must be FLOAT");
  auto expected = x.dims();
  std::fill(expected.end() - gamma.rank(), expected.end(), 1);
  require(rstd.dims() == expected, "rstdOut " + rstd.shape() + " must be x's shape with ones where gamma is");
}

// The documented type combinations: x, gamma and y alike, or 16-bit x and y with a FLOAT gamma.
void check_rms_norm(const Desc& x, const Desc& gamma, double, const Desc& y, const Desc& rstd) {
  require_float(x, "x");
  require_gamma(x, gamma);
  require(gamma.type() == x.type() || (is_half(x.type()) && gamma.type() == ACL_FLOAT),
          std::string("gamma must have x's type, or be FLOAT where x is 16-bit, not ") + type_name(gamma.type()) +
              " with " + type_name(x.type()));
  require_same_type(x, y, "x and yOut");
  require_same_shape(x, y, "x and yOut");
  require_rstd(x, gamma, rstd);
}
void check_add_rms_norm(const Desc& a, const Desc& b, const Desc& gamma, double eps, const Desc& y, const Desc& rstd,
                        const Desc& x) {
  require_float(a, "x1");
  require_same_type(a, b, "x1 and x2");
  require_same_shape(a, b, "x1 and x2");
  require_gamma(a, gamma);
  require_same_type(a, gamma, "x1 and gamma");
  require_same_type(a, y, "x1 and yOut");
  require_same_shape(a, y, "x1 and yOut");
  require_rstd(a, gamma, rstd);
  require(static_cast<bool>(x), "xOut is null", kParamNullptr);
  require_same_type(a, x, "x1 and xOut");
  require_same_shape(a, x, "x1 and xOut");
  require(eps >= 0, "epsilon must not be negative");
}
void check_swiglu(const Desc& x, int64_t dim, const Desc& out) {
  require_float(x, "x");
  require(x.rank() > 0 && dim >= -x.rank() && dim < x.rank(), "dim is outside of x");
  require(x.dim(dim) % 2 == 0, "x must be even in dimension dim, not " + x.shape());
  require_contiguous(x, "x");
  require_contiguous(out, "out");
  require_same_type(x, out, "x and out");
  auto expected = x.dims();
  expected[dim < 0 ? dim + x.rank() : dim] /= 2;
  require(out.dims() == expected, "out " + out.shape() + " must be half of x " + x.shape());
}

}  // namespace

SIM_OP(aclnnRmsNorm, kOnly910B, "ops-nn/norm/rms_norm", check_rms_norm,
       [](Tensor x, Tensor gamma, double eps, Tensor y, Tensor rstd) {
         const Tensor r = inverse_rms(wide(x), gamma, eps);
         put(y, wide(x) * r * wide(gamma));
         if (rstd.defined()) put(rstd, r);
       })
SIM_OP(aclnnAddRmsNorm, kOnly910B, "ops-nn/norm/add_rms_norm", check_add_rms_norm,
       [](Tensor a, Tensor b, Tensor gamma, double eps, Tensor y, Tensor rstd, Tensor x) {
         put(x, wide(a) + wide(b));
         const Tensor r = inverse_rms(wide(x), gamma, eps);
         put(y, wide(x) * r * wide(gamma));
         if (rstd.defined()) put(rstd, r);
       })
// out = silu(first half) * second half
SIM_OP(aclnnSwiGlu, kOnly910B, "ops-nn/activation/swi_glu", check_swiglu, [](Tensor x, int64_t dim, Tensor out) {
  const auto half = wide(x).chunk(2, dim);
  put(out, at::silu(half[0]) * half[1]);
})
