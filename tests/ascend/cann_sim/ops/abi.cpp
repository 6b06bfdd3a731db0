#include "abi.h"

#include <cstring>

namespace cannsim {

at::ScalarType scalar_type(aclDataType type) {
  switch (type) {
    case ACL_FLOAT: return at::kFloat;
    case ACL_FLOAT16: return at::kHalf;
    case ACL_BF16: return at::kBFloat16;
    case ACL_DOUBLE: return at::kDouble;
    case ACL_INT8: return at::kChar;
    case ACL_UINT8: return at::kByte;
    case ACL_INT16: return at::kShort;
    case ACL_INT32: return at::kInt;
    case ACL_INT64: return at::kLong;
    case ACL_UINT32: return at::kUInt32;
    case ACL_UINT64: return at::kUInt64;
    case ACL_BOOL: return at::kBool;
    case ACL_COMPLEX64: return at::kComplexFloat;
    default: throw Refused(kParamInvalid, "aclDataType " + std::to_string(type) + " is not simulated");
  }
}

const char* type_name(aclDataType type) {
  switch (type) {
    case ACL_FLOAT: return "FLOAT";
    case ACL_FLOAT16: return "FLOAT16";
    case ACL_BF16: return "BFLOAT16";
    case ACL_DOUBLE: return "DOUBLE";
    case ACL_INT8: return "INT8";
    case ACL_UINT8: return "UINT8";
    case ACL_INT16: return "INT16";
    case ACL_INT32: return "INT32";
    case ACL_INT64: return "INT64";
    case ACL_UINT32: return "UINT32";
    case ACL_UINT64: return "UINT64";
    case ACL_BOOL: return "BOOL";
    default: return "another type";
  }
}

int64_t Desc::numel() const {
  int64_t n = 1;
  for (int64_t d : tensor_->dims) n *= d;
  return n;
}

bool Desc::contiguous() const {
  int64_t step = 1;
  for (int64_t i = rank(); i-- > 0;) {
    if (dim(i) != 1 && tensor_->strides[i] != step) return false;
    step *= dim(i);
  }
  return true;
}

bool Desc::transposed() const {
  if (rank() < 2) return false;
  const auto& s = tensor_->strides;
  const int64_t n = rank();
  return s[n - 2] == 1 && s[n - 1] == dim(n - 2) && dim(n - 2) * dim(n - 1) > 1;
}

bool Desc::nz() const { return tensor_->format == ACL_FORMAT_FRACTAL_NZ && tensor_->storage_dims.size() >= 4; }

std::string Desc::shape() const {
  std::string text = "(";
  for (size_t i = 0; i < dims().size(); ++i) text += (i ? "," : "") + std::to_string(dims()[i]);
  return text + ")";
}

Tensor Desc::storage(at::IntArrayRef dims, at::IntArrayRef strides, int64_t offset) const {
  const int64_t size = static_cast<int64_t>(c10::elementSize(scalar_type(type())));
  int64_t last = 0;  // index of the last element that the view reaches
  for (size_t i = 0; i < dims.size(); ++i) {
    if (dims[i] == 0) return at::empty(dims, at::TensorOptions().dtype(scalar_type(type())));
    last += (dims[i] - 1) * strides[i];
  }
  const char* start = static_cast<const char*>(tensor_->data) + offset * size;
  void* host = resolve(start, (last + 1) * size, "tensor " + shape());
  return at::from_blob(host, dims, strides, at::TensorOptions().dtype(scalar_type(type())));
}

static std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& dims) {
  std::vector<int64_t> strides(dims.size(), 1);
  for (size_t i = dims.size(); i-- > 1;) strides[i - 1] = strides[i] * dims[i];
  return strides;
}

Tensor Desc::view() const {
  if (!nz()) return storage(tensor_->dims, tensor_->strides, tensor_->offset);
  auto logical = tensor_->dims;
  const bool swapped = transposed();
  if (swapped) std::swap(logical[rank() - 1], logical[rank() - 2]);
  const auto& sd = tensor_->storage_dims;
  Tensor s = storage(sd, contiguous_strides(sd), 0);
  s = s.transpose(-4, -3).transpose(-3, -2);  // [..., n1, k1, k0, n0] -> [..., k1, k0, n1, n0]
  std::vector<int64_t> flat(s.sizes().begin(), s.sizes().end() - 4);
  flat.push_back(s.size(-4) * s.size(-3));
  flat.push_back(s.size(-2) * s.size(-1));
  s = s.reshape(flat).narrow(-2, 0, logical[rank() - 2]).narrow(-1, 0, logical[rank() - 1]).reshape(logical);
  return swapped ? s.transpose(-1, -2) : s;
}

void Desc::store_nz(const Tensor& nd) const {
  const auto& sd = tensor_->storage_dims;
  const size_t n = sd.size();
  const int64_t n1 = sd[n - 4], k1 = sd[n - 3], k0 = sd[n - 2], n0 = sd[n - 1];
  auto padded = at::constant_pad_nd(nd, {0, n1 * n0 - nd.size(-1), 0, k1 * k0 - nd.size(-2)});
  std::vector<int64_t> split(nd.sizes().begin(), nd.sizes().end() - 2);
  split.insert(split.end(), {k1, k0, n1, n0});
  storage(sd, contiguous_strides(sd), 0).copy_(padded.reshape(split).transpose(-3, -2).transpose(-4, -3));
}

}  // namespace cannsim

using namespace cannsim;

CANNSIM_API aclTensor* aclCreateTensor(const int64_t* dims, uint64_t n, aclDataType type, const int64_t* strides,
                                       int64_t offset, aclFormat format, const int64_t* storage_dims,
                                       uint64_t storage_n, void* data) {
  return new aclTensor{
      {dims, dims + n}, {strides, strides + n}, {storage_dims, storage_dims + storage_n}, offset, format, type, data};
}
CANNSIM_API aclScalar* aclCreateScalar(void* value, aclDataType type) {
  switch (type) {
    case ACL_DOUBLE: return new aclScalar{*static_cast<double*>(value)};
    case ACL_FLOAT: return new aclScalar{*static_cast<float*>(value)};
    case ACL_INT64: return new aclScalar{*static_cast<int64_t*>(value)};
    case ACL_INT32: return new aclScalar{*static_cast<int32_t*>(value)};
    case ACL_BOOL: return new aclScalar{*static_cast<bool*>(value)};
    default:
      report(kParamInvalid, std::string("aclCreateScalar: ") + type_name(type) + " is not simulated");
      return nullptr;
  }
}
CANNSIM_API aclIntArray* aclCreateIntArray(const int64_t* v, uint64_t n) { return new aclIntArray{{v, v + n}}; }
CANNSIM_API aclFloatArray* aclCreateFloatArray(const float* v, uint64_t n) { return new aclFloatArray{{v, v + n}}; }
CANNSIM_API aclBoolArray* aclCreateBoolArray(const bool* v, uint64_t n) {
  return new aclBoolArray{std::vector<bool>(v, v + n)};
}
CANNSIM_API aclTensorList* aclCreateTensorList(const aclTensor* const* v, uint64_t n) {
  return new aclTensorList{{v, v + n}};
}
CANNSIM_API aclScalarList* aclCreateScalarList(const aclScalar* const* v, uint64_t n) {
  return new aclScalarList{{v, v + n}};
}
CANNSIM_API int aclDestroyTensor(const aclTensor* p) {
  delete p;
  return 0;
}
CANNSIM_API int aclDestroyScalar(const aclScalar* p) {
  delete p;
  return 0;
}
CANNSIM_API int aclDestroyIntArray(const aclIntArray* p) {
  delete p;
  return 0;
}
CANNSIM_API int aclDestroyFloatArray(const aclFloatArray* p) {
  delete p;
  return 0;
}
CANNSIM_API int aclDestroyBoolArray(const aclBoolArray* p) {
  delete p;
  return 0;
}
CANNSIM_API int aclDestroyTensorList(const aclTensorList* p) {  // owns its tensors, as documented
  if (p)
    for (const aclTensor* t : p->tensors) delete t;
  delete p;
  return 0;
}
CANNSIM_API int aclDestroyScalarList(const aclScalarList* p) {
  if (p)
    for (const aclScalar* s : p->scalars) delete s;
  delete p;
  return 0;
}
CANNSIM_API aclError aclDestroyAclOpExecutor(aclOpExecutor* p) {
  delete p;
  return 0;
}
CANNSIM_API int aclGetViewShape(const aclTensor* tensor, int64_t** dims, uint64_t* n) {
  *n = tensor->dims.size();
  *dims = new int64_t[*n + 1];
  memcpy(*dims, tensor->dims.data(), *n * sizeof(int64_t));
  return 0;
}
