// Writing keys and values into a paged cache: token t goes to slot slotMapping[t] = page * block_size + offset.
//
//   Norm: cache [pages, block_size, heads, D]; PA_NZ: [pages, heads * D / c0, block_size, c0] or
//   [pages, heads, D / c0, block_size, c0], c0 = 32 bytes of elements. A negative slot is skipped.
#include "registry.h"

using namespace cannsim;

namespace {

void require_cache(const Desc& x, const Desc& cache, const Text& mode, const char* name) {
  const std::string who = name;
  require(static_cast<bool>(x) && static_cast<bool>(cache), who + " or its cache is null", kParamNullptr);
  require(x.rank() == 3, who + " must be [tokens, heads, D], not " + x.shape());
  require(is_half(x.type()) || x.type() == ACL_INT8,
          who + " must be FLOAT16, BFLOAT16 or INT8, not " + type_name(x.type()));
  require(x.type() == cache.type(), who + " and its cache must have one data type");
  require(x.numel() > 0 && cache.numel() > 0, who + " and its cache must not be empty");
  require_contiguous(cache, name);
  const int64_t heads = x.dim(1), size = x.dim(2);
  if (mode == "PA_NZ") {
    const int64_t c0 = 32 / static_cast<int64_t>(c10::elementSize(scalar_type(x.type())));
    require(size % c0 == 0, who + "'s head size must fill 32 bytes");
    const std::vector<int64_t> d = cache.dims();
    const bool four = d.size() == 4 && d[1] == heads * size / c0 && d[3] == c0;
    const bool five = d.size() == 5 && d[1] == heads && d[2] == size / c0 && d[4] == c0;
    require(four || five, who + "'s PA_NZ cache " + cache.shape() + " does not fit " + x.shape());
  } else {
    require(cache.rank() == 4 && cache.dim(2) == heads && cache.dim(3) == size,
            who + "'s cache " + cache.shape() + " must be [pages, block_size, heads, D] of " + x.shape());
  }
}
void check_scatter(const Desc& k, const Desc& k_cache, const Desc& slots, const Desc& v, const Desc& v_cache,
                   const Desc& compress, const Desc& compress_offset, const Desc& lens, const Text& cache_mode,
                   const Text& scatter_mode, const Ints&, const Ints&) {
  require(cache_mode.empty() || cache_mode == "Norm" || cache_mode == "PA_NZ", "cacheMode must be Norm or PA_NZ");
  require(scatter_mode.empty() || scatter_mode == "None", "scatterMode '" + scatter_mode + "' is not simulated");
  require(!compress && !compress_offset && !lens, "compressed caches are not simulated");
  require(slots.rank() == 1 && is_index(slots.type()), "slotMapping must have 1 dimension of INT32 or INT64");
  require(slots.dim(0) == k.dim(0) && slots.dim(0) == v.dim(0), "slotMapping must have a slot for every token");
  require_cache(k, k_cache, cache_mode, "key");
  require_cache(v, v_cache, cache_mode, "value");
}

void scatter(const Tensor& x, const Tensor& cache, const Tensor& slots, bool nz) {
  const Tensor list = slots.to(at::kLong).contiguous();
  const int64_t* slot = list.data_ptr<int64_t>();
  const int64_t block = nz ? cache.size(-2) : cache.size(1), room = cache.size(0) * block;
  for (int64_t t = 0; t < list.numel(); ++t) {
    if (slot[t] < 0) continue;
    require(slot[t] < room,
            "slot " + std::to_string(slot[t]) + " of token " + std::to_string(t) + " is beyond the cache's " +
                std::to_string(room),
            kVectorCoreException);
    const Tensor page = cache.select(0, slot[t] / block).select(nz ? -2 : 0, slot[t] % block);
    page.copy_(x[t].reshape(page.sizes()));
  }
}

}  // namespace

SIM_OP(aclnnScatterPaKvCache, kOnly910B, "ops-transformer/attention/scatter_pa_kv_cache", check_scatter,
       [](Tensor k, Tensor k_cache, Tensor slots, Tensor v, Tensor v_cache, Tensor, Tensor, Tensor, Text cache_mode,
          Text, Ints, Ints) {
         scatter(k, k_cache, slots, cache_mode == "PA_NZ");
         scatter(v, v_cache, slots, cache_mode == "PA_NZ");
       })
