// Weight-only quantised products (W8A16, W4A16) and the packing of 4-bit weights.
//
//   y = x @ ((weight + antiquantOffset) * antiquantScale) + bias     (antiquant as CANN defines it: offset added first)
// Weights [K, N]: INT8, or INT32 that carries eight two's-complement nibbles along its last stored dimension, the
// lowest bits first. Scales and offsets are one number, one a column, or one a group of rows and column. Dequantised in
// float32, strip by strip; float32 accumulation, one rounding.
#include "registry.h"

using namespace cannsim;

namespace {

// The element (k, n) of a packed weight as float, for rows and columns in any order of storage.
struct PackedInt4 {
  const uint32_t* words;
  int64_t stride_k, stride_n;  // of words; along the packed dimension one word is eight elements
  bool along_n;
  float at(int64_t k, int64_t n) const {
    const int64_t packed = along_n ? n : k;
    const int64_t word = along_n ? k * stride_k + (n >> 3) * stride_n : (k >> 3) * stride_k + n * stride_n;
    return static_cast<float>(static_cast<int32_t>(words[word] << (28 - 4 * (packed & 7))) >> 28);
  }
};

// Transposed weights reach the operator as [K, N] views of [N, K] memory; packed ones as [K/8, N] views of [N, K/8].
bool packed_along_n(const Desc& w) { return !w.transposed(); }
int64_t weight_k(const Desc& w) { return w.type() == ACL_INT32 && !packed_along_n(w) ? w.dim(0) * 8 : w.dim(0); }
int64_t weight_n(const Desc& w) { return w.type() == ACL_INT32 && packed_along_n(w) ? w.dim(1) * 8 : w.dim(1); }

void check_weight_quant(const Desc& x, const Desc& w, const Desc& scale, const Desc& offset, const Desc& quant_scale,
                        const Desc& quant_offset, const Desc& bias, int group, const Desc& y, bool v3) {
  require_half(x, "x");
  require(static_cast<bool>(w) && static_cast<bool>(scale), "weight or antiquantScale is null", kParamNullptr);
  require(x.rank() == 2 && w.rank() == 2, "x and weight must have 2 dimensions");
  require(
      w.type() == ACL_INT8 || w.type() == ACL_INT32,
      std::string("weight must be INT8, or INT32 made by aclnnConvertWeightToINT4Pack, not ") + type_name(w.type()));
  const bool int4 = w.type() == ACL_INT32, transposed = w.transposed();
  require(x.contiguous() || x.transposed(), "x must be contiguous or a transposed view");
  require(w.nz() || w.contiguous() || transposed, "weight must be contiguous or a transposed view");
  const int64_t k = weight_k(w), n = weight_n(w);
  require(x.dim(1) == k, "x's K is " + std::to_string(x.dim(1)) + ", weight's " + std::to_string(k));
  require(k >= 1 && k <= 65535 && n >= 1 && n <= 65535,
          "K and N must be within [1, 65535], not " + std::to_string(k) + " and " + std::to_string(n));
  require(x.dim(0) >= 1 && (x.contiguous() || x.dim(0) <= 65535),
          "M must be at least 1, at most 65535 for a transposed x");
  require(group == 0 || (group >= 32 && group <= k - 1 && group % 32 == 0),
          "antiquantGroupSize must be 0, or a multiple of 32 within [32, K-1], not " + std::to_string(group));
  require_same_type(x, scale, "x and antiquantScale");
  require(scale.contiguous() || scale.transposed(), "antiquantScale must be contiguous or a transposed view");
  const bool per_tensor = scale.numel() == 1;
  if (group)
    require(scale.dims() == std::vector<int64_t>{(k + group - 1) / group, n},
            "antiquantScale " + scale.shape() + " must be (ceil(K/group), N)");
  else
    require(per_tensor || (scale.numel() == n && scale.dim(-1) == n),
            "antiquantScale " + scale.shape() + " must be (1), (N) or (1,N)");
  if (offset) {
    require_same_type(x, offset, "x and antiquantOffset");
    require_same_shape(scale, offset, "antiquantScale and antiquantOffset");
  }
  require(!quant_scale && !quant_offset, "quantised output is not simulated");
  if (bias) {
    require(bias.numel() == n && bias.dim(-1) == n && bias.rank() <= 2, "bias must be (N) or (1,N)");
    const bool fits = x.type() == ACL_FLOAT16 ? bias.type() == ACL_FLOAT16
                                              : bias.type() == ACL_FLOAT || (v3 && bias.type() == ACL_BF16);
    require(fits, std::string("bias must be FLOAT16 for a FLOAT16 x, FLOAT for a BFLOAT16 one, not ") +
                      type_name(bias.type()));
  }
  if (w.nz() && int4) {
    if (group)
      require(!transposed && x.contiguous() && (group == 64 || group == 128) && k % group == 0 && n % 64 == 0,
              "a grouped FRACTAL_NZ weight needs groups of 64 or 128 that divide K, N a multiple of 64 and no "
              "transposition");
    else
      require(transposed, "a FRACTAL_NZ INT4 weight with scales per channel must be transposed");
  }
  require(!(w.nz() && !int4 && group), "a FRACTAL_NZ INT8 weight takes scales per channel only");
  require_same_type(x, y, "x and y");
  require(y.dims() == std::vector<int64_t>{x.dim(0), n}, "y " + y.shape() + " must be (M, N)");
}
void check_v2(const Desc& x, const Desc& w, const Desc& s, const Desc& o, const Desc& qs, const Desc& qo, const Desc& b,
              int group, const Desc& y) {
  check_weight_quant(x, w, s, o, qs, qo, b, group, y, false);
}
void check_v3(const Desc& x, const Desc& w, const Desc& s, const Desc& o, const Desc& qs, const Desc& qo, const Desc& b,
              int group, int inner_precise, const Desc& y) {
  require(inner_precise == 0 || inner_precise == 1, "innerPrecise must be 0 or 1");
  check_weight_quant(x, w, s, o, qs, qo, b, group, y, true);
}

void weight_quant(const Tensor& x, const Desc& weight, const Tensor& scale, const Tensor& offset, const Tensor& bias,
                  int group, const Tensor& y) {
  const Tensor w = weight.view(), left = wide(x).contiguous();
  const int64_t k_total = weight_k(weight), n_total = weight_n(weight);
  const Tensor s = wide(scale).reshape({-1, scale.numel() == 1 ? 1 : n_total}).contiguous();
  const Tensor o = offset.defined() ? wide(offset).reshape(s.sizes()).contiguous() : at::zeros_like(s);
  const int64_t rows = group ? group : k_total;
  const PackedInt4 packed{w.scalar_type() == at::kInt ? static_cast<const uint32_t*>(w.data_ptr()) : nullptr,
                          w.stride(0), w.stride(1), packed_along_n(weight)};
  const int64_t strip = std::max<int64_t>(8, (1 << 20) / k_total / 8 * 8);
  for (int64_t n0 = 0; n0 < n_total; n0 += strip) {
    const int64_t width = std::min(strip, n_total - n0);
    Tensor q;
    if (packed.words) {
      q = at::empty({k_total, width}, at::kFloat);
      float* out = q.data_ptr<float>();
      for (int64_t k = 0; k < k_total; ++k)
        for (int64_t n = 0; n < width; ++n) out[k * width + n] = packed.at(k, n0 + n);
    } else {
      q = w.narrow(1, n0, width).to(at::kFloat).contiguous();
    }
    for (int64_t k = 0, g = 0; k < k_total; k += rows, ++g) {
      const auto columns = [&](const Tensor& t) { return t.size(1) == 1 ? t[g] : t[g].narrow(0, n0, width); };
      q.narrow(0, k, std::min(rows, k_total - k)).add_(columns(o)).mul_(columns(s));
    }
    Tensor part = at::matmul(left, q);
    if (bias.defined()) part.add_(wide(bias).reshape({-1}).narrow(0, n0, width));
    y.narrow(1, n0, width).copy_(part);
  }
}

void check_int4_pack(const Desc& weight, const Desc& packed) {
  require(weight.type() == ACL_INT32, "weight must be INT32 values within [-8, 7]");
  require(packed.type() == ACL_INT32, "an INT4-typed output is not simulated: INT32 carries eight");
  require(weight.rank() == 2 && weight.dim(1) % 8 == 0, "weight's last dimension must be a multiple of 8");
  auto expected = weight.dims();
  expected.back() /= 8;
  require(packed.dims() == expected,
          "weightInt4Pack " + packed.shape() + " must be weight with an eighth of its last dimension");
}

}  // namespace

SIM_OP(aclnnWeightQuantBatchMatmulV2, kOnly910B, "ops-nn/matmul/weight_quant_batch_matmul_v2", check_v2,
       [](Tensor x, Desc w, Tensor scale, Tensor offset, Tensor, Tensor, Tensor bias, int group, Tensor y) {
         weight_quant(x, w, scale, offset, bias, group, y);
       })
SIM_OP(aclnnWeightQuantBatchMatmulV3, kOnly910B, "ops-nn/matmul/weight_quant_batch_matmul_v2", check_v3,
       [](Tensor x, Desc w, Tensor scale, Tensor offset, Tensor, Tensor, Tensor bias, int group, int, Tensor y) {
         weight_quant(x, w, scale, offset, bias, group, y);
       })
SIM_OP(aclnnConvertWeightToINT4Pack, kOnly910B, "ops-nn/matmul/convert_weight_to_int4_pack", check_int4_pack,
       [](Tensor weight, Desc packed) {
         require(weight.min().item<int>() >= -8 && weight.max().item<int>() <= 7,
                 "weight has values outside of [-8, 7]");
         const Tensor nibbles = at::bitwise_and(weight, 15).unflatten(-1, {-1, 8});
         Tensor words = at::zeros(packed.dims(), at::kInt);
         for (int64_t i = 0; i < 8; ++i) words.bitwise_or_(at::bitwise_left_shift(nibbles.select(-1, i), 4 * i));
         if (packed.nz())
           packed.store_nz(words);
         else
           packed.view().copy_(words);
       })
