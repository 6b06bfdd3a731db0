// Rotary position embedding: y = x * cos + rotate(x) * sin, in float32, rounded once.
#include "registry.h"

using namespace cannsim;

namespace {

enum Mode : int64_t { kHalf = 0, kInterleave = 1 };

Tensor rotate(const Tensor& x, bool interleave) {
  const int64_t half = x.size(-1) / 2;
  if (!interleave) return at::cat({-x.narrow(-1, half, half), x.narrow(-1, 0, half)}, -1);
  const Tensor pairs = x.unflatten(-1, {half, 2});
  return at::stack({-pairs.select(-1, 1), pairs.select(-1, 0)}, -1).reshape(x.sizes());
}
Tensor embed(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleave) {
  return wide(x) * wide(cos) + rotate(wide(x), interleave) * wide(sin);
}

// 910B: 4 dimensions, one type, even D < 896; modes half and interleave. With x [B,S,N,D] (or N and S swapped, or S
// first) cos and sin are [1,S,1,D], [B,S,1,D] or full in mode half with B, N < 1000, and [1,S,1,D] in interleave with
// B * N < 1000: at most the head dimension (and, in half, the batch) may be one where x is not.
void check_rotary(const Desc& x, const Desc& cos, const Desc& sin, int64_t mode, const Desc& out) {
  require_float(x, "x");
  require(x.rank() == 4 && cos.rank() == 4 && sin.rank() == 4, "x, cos and sin must have 4 dimensions");
  require_same_type(x, cos, "x and cos");
  require_same_type(x, sin, "x and sin");
  require_same_type(x, out, "x and out");
  require_same_shape(cos, sin, "cos and sin");
  require_same_shape(x, out, "x and out");
  require_contiguous(out, "out");
  require(mode == kHalf || mode == kInterleave, "mode must be 0 (half) or 1 (interleave)", kTilingError);
  require(x.dim(-1) % 2 == 0 && x.dim(-1) < 896, "D must be even and below 896, not " + std::to_string(x.dim(-1)),
          kTilingError);
  require(cos.dim(-1) == x.dim(-1), "cos and sin must have x's D", kTilingError);
  int ones = 0;
  for (int64_t i = 0; i < 3; ++i) {
    require(cos.dim(i) == x.dim(i) || cos.dim(i) == 1, "cos " + cos.shape() + " does not fit x " + x.shape(),
            kTilingError);
    ones += cos.dim(i) == 1 && x.dim(i) != 1;
  }
  require(ones < 3, "cos (1,1,1,D) is not supported on this chip", kTilingError);
  // Which dimension is S is the caller's knowledge: at most that one may reach 1000.
  const int large = (x.dim(0) >= 1000) + (x.dim(1) >= 1000) + (x.dim(2) >= 1000);
  require(large <= 1, "B and N must be below 1000", kTilingError);
}

// D == 128; cos and sin [B,S,1,D] whatever N is; one type; the heads of query and key differ at most.
void require_apply(const Desc& q, const Desc& k, const Desc& cos, const Desc& sin, int64_t layout, const Text& mode) {
  for (const auto& [d, name] : {std::pair{&q, "query"}, {&k, "key"}, {&cos, "cos"}, {&sin, "sin"}}) {
    require_float(*d, name);
    require(d->rank() == 4, std::string(name) + " must have 4 dimensions, not " + d->shape());
    require(d->dim(-1) == 128, std::string(name) + "'s last dimension must be 128, not " + std::to_string(d->dim(-1)));
    require(d->numel() > 0, std::string(name) + " must not be empty");
    require_same_type(q, *d, "query, key, cos and sin");
  }
  require(layout >= 1 && layout <= 3, "layout must be 1 (BSND), 2 (SBND) or 3 (BNSD)");
  require(mode == "half" || mode == "interleave", "rotaryMode '" + mode + "' is not simulated");
  require_same_shape(cos, sin, "cos and sin");
  const int64_t heads = layout == 3 ? 1 : 2;
  for (int64_t i = 0; i < 4; ++i) {
    if (i == heads) continue;
    require(q.dim(i) == k.dim(i), "query and key may differ in their heads only");
    // BNSD calls still pass cos and sin as [B, S, 1, D] in torch_npu: both orders are accepted there
    require(layout == 3 || cos.dim(i) == q.dim(i), "cos " + cos.shape() + " does not fit query " + q.shape());
  }
  require(layout == 3 || cos.dim(2) == 1, "cos and sin must have one head");
  // The kernel keeps a token's heads in the unified buffer (192 KiB on the 910B).
  const int64_t bytes = q.type() == ACL_FLOAT ? 4 : 2, cast = q.type() == ACL_BF16, wide_bytes = cast ? 4 : bytes;
  const int64_t rows = (q.dim(heads) + k.dim(heads)) * 128 * wide_bytes;
  require(rows * 2 + 128 * bytes * 4 + rows + rows * 2 + cast * 128 * 4 * 2 <= 196608,
          "query and key have too many heads for the unified buffer");
}
void check_apply(const Desc& q, const Desc& k, const Desc& cos, const Desc& sin, int64_t layout) {
  require_apply(q, k, cos, sin, layout, "half");
}
void check_apply_v2(const Desc& q, const Desc& k, const Desc& cos, const Desc& sin, int64_t layout, const Text& mode) {
  require_apply(q, k, cos, sin, layout, mode);
}

void apply(const Tensor& q, const Tensor& k, Tensor cos, Tensor sin, int64_t layout, const Text& mode) {
  if (layout == 3 && cos.size(1) != 1) cos = cos.transpose(1, 2), sin = sin.transpose(1, 2);
  put(q, embed(q, cos, sin, mode == "interleave"));
  put(k, embed(k, cos, sin, mode == "interleave"));
}

}  // namespace

SIM_OP(aclnnRotaryPositionEmbedding, kOnly910B, "ops-transformer/posembedding/rotary_position_embedding", check_rotary,
       [](Tensor x, Tensor cos, Tensor sin, int64_t mode, Tensor out) {
         put(out, embed(x, cos, sin, mode == kInterleave));
       })
SIM_OP(aclnnApplyRotaryPosEmb, kOnly910B, "ops-transformer/posembedding/apply_rotary_pos_emb", check_apply,
       [](Tensor q, Tensor k, Tensor cos, Tensor sin, int64_t layout) { apply(q, k, cos, sin, layout, "half"); })
SIM_OP(aclnnApplyRotaryPosEmbV2, kOnly910B, "ops-transformer/posembedding/apply_rotary_pos_emb", check_apply_v2,
       [](Tensor q, Tensor k, Tensor cos, Tensor sin, int64_t layout, Text mode) {
         apply(q, k, cos, sin, layout, mode);
       })
