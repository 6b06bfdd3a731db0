// ND <-> FRACTAL_NZ: [.., K, N] is stored as [.., ceil(N/n0), ceil(K/16), 16, n0] with 32 bytes in n0, zero padded.
#include <cstring>

#include "registry.h"

using namespace cannsim;

CANNSIM_API int aclnnNpuFormatCastCalculateSizeAndFormat(const aclTensor* source, int format, int additional_type,
                                                         int64_t** dims, uint64_t* n, int* actual) {
  auto out = source->dims;
  if (format == ACL_FORMAT_FRACTAL_NZ) {
    if (out.size() < 2 || out.size() > 6)
      return report(kParamInvalid, "aclnnNpuFormatCast: FRACTAL_NZ needs 2 to 6 dimensions");
    const bool typed = additional_type >= 0;
    const auto type = typed ? static_cast<aclDataType>(additional_type) : source->type;
    const int64_t n0 = 32 / static_cast<int64_t>(c10::elementSize(scalar_type(type)));
    const int64_t k = out[out.size() - 2], width = out.back();
    out.resize(out.size() - 2);
    for (int64_t v : {(width + n0 - 1) / n0, (k + 15) / 16, int64_t{16}, n0}) out.push_back(v);
  } else if (format != ACL_FORMAT_ND && format != ACL_FORMAT_NCHW) {
    return report(kParamInvalid, "aclnnNpuFormatCast: format " + std::to_string(format) + " is not simulated");
  }
  *n = out.size();
  *dims = new int64_t[out.size()];
  memcpy(*dims, out.data(), out.size() * sizeof(int64_t));
  *actual = format;
  return 0;
}
SIM_OP(aclnnNpuFormatCast, kOnly910B, "ops-math/conversion/npu_format_cast", kNoCheck, [](Tensor source, Desc out) {
  if (out.nz())
    out.store_nz(source);
  else
    out.view().copy_(source);
})
