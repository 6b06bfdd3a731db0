// What a transformer step never needs: the GE single-operator path (refused by operator name: torch_npu takes it when
// no aclnn symbol exists), hand-written kernels, memory shared between processes, profiling and dumps.
#include <cstring>

#include "runtime.h"
#include "acl/acl_dump.h"
#include "acl/acl_op_compiler.h"

using namespace cannsim;

// --- tensor descriptions: torch_npu also makes them for operators that do go through aclnn

struct aclTensorDesc {
  aclDataType type;
  aclFormat format;
  std::vector<int64_t> dims;
};
struct aclDataBuffer {
  void* data;
  size_t bytes;
};

CANNSIM_API aclTensorDesc* aclCreateTensorDesc(aclDataType type, int n, const int64_t* dims, aclFormat format) {
  return new aclTensorDesc{type, format, {dims, dims + n}};
}
CANNSIM_API void aclDestroyTensorDesc(const aclTensorDesc* desc) { delete desc; }
CANNSIM_API aclDataBuffer* aclCreateDataBuffer(void* data, size_t bytes) { return new aclDataBuffer{data, bytes}; }
CANNSIM_API aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  delete buffer;
  return ACL_SUCCESS;
}
CANNSIM_API aclDataType aclGetTensorDescType(const aclTensorDesc* desc) { return desc->type; }
CANNSIM_API aclFormat aclGetTensorDescFormat(const aclTensorDesc* desc) { return desc->format; }
CANNSIM_API size_t aclGetTensorDescNumDims(const aclTensorDesc* desc) { return desc->dims.size(); }
CANNSIM_API aclError aclGetTensorDescDimV2(const aclTensorDesc* desc, size_t i, int64_t* value) {
  *value = desc->dims[i];
  return ACL_SUCCESS;
}
CANNSIM_API void aclSetTensorDescName(aclTensorDesc*, const char*) {}
CANNSIM_API aclError aclSetTensorFormat(aclTensorDesc*, aclFormat) { return ACL_SUCCESS; }
CANNSIM_API aclError aclSetTensorShape(aclTensorDesc*, int, const int64_t*) { return ACL_SUCCESS; }
CANNSIM_API aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return ACL_SUCCESS; }

CANNSIM_API aclopAttr* aclopCreateAttr() { return reinterpret_cast<aclopAttr*>(new int(0)); }
CANNSIM_API void aclopDestroyAttr(const aclopAttr* attr) { delete reinterpret_cast<const int*>(attr); }
#define SET_ATTRIBUTE(kind, ...) \
  CANNSIM_API aclError aclopSetAttr##kind(aclopAttr*, const char*, __VA_ARGS__) { return ACL_SUCCESS; }
SET_ATTRIBUTE(Bool, uint8_t)
SET_ATTRIBUTE(DataType, aclDataType)
SET_ATTRIBUTE(Float, float)
SET_ATTRIBUTE(Int, int64_t)
SET_ATTRIBUTE(String, const char*)
SET_ATTRIBUTE(ListBool, int, const uint8_t*)
SET_ATTRIBUTE(ListFloat, int, const float*)
SET_ATTRIBUTE(ListInt, int, const int64_t*)
SET_ATTRIBUTE(ListListInt, int, const int*, const int64_t* const*)

static aclError refuse_aclop(const char* op) {
  return report(ACL_ERROR_OP_NOT_FOUND, std::string("aclop '") + op +
                                            "' is not simulated: torch_npu found no aclnn symbol for the operator in "
                                            "libopapi.so and fell back to the GE single-operator path");
}
CANNSIM_API aclError aclopCompileAndExecute(const char* op, int, const aclTensorDesc* const*,
                                            const aclDataBuffer* const*, int, const aclTensorDesc* const*,
                                            aclDataBuffer* const*, const aclopAttr*, aclopEngineType, aclopCompileType,
                                            const char*, aclrtStream) {
  return refuse_aclop(op);
}
CANNSIM_API aclError aclopCompileAndExecuteV2(const char* op, int, aclTensorDesc**, aclDataBuffer**, int,
                                              aclTensorDesc**, aclDataBuffer**, aclopAttr*, aclopEngineType,
                                              aclopCompileType, const char*, aclrtStream) {
  return refuse_aclop(op);
}
CANNSIM_API aclError aclSetCompileopt(aclCompileOpt, const char*) { return ACL_SUCCESS; }
CANNSIM_API size_t aclGetCompileoptSize(aclCompileOpt) { return 16; }
CANNSIM_API aclError aclGetCompileopt(aclCompileOpt, char* value, size_t) {
  strcpy(value, "disable");
  return ACL_SUCCESS;
}

// Symbols whose arguments do not matter are defined by assembler name, free of their headers' prototypes.
#define ACCEPTED(name)                          \
  CANNSIM_API long sim_##name() __asm__(#name); \
  CANNSIM_API long sim_##name() { return 0; }
#define REFUSED(name)                           \
  CANNSIM_API long sim_##name() __asm__(#name); \
  CANNSIM_API long sim_##name() { return report(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, #name " is not simulated"); }

ACCEPTED(aclmdlInitDump)
ACCEPTED(aclmdlSetDump)
ACCEPTED(aclmdlFinalizeDump)
ACCEPTED(MsprofRegisterCallback)
ACCEPTED(MsprofReportApi)
ACCEPTED(MsprofReportCompactInfo)
ACCEPTED(MsprofReportAdditionalInfo)
ACCEPTED(MsprofGetHashId)
ACCEPTED(MsprofSysCycleTime)

REFUSED(aclrtBinaryGetFunction)
REFUSED(aclrtBinaryLoadFromData)
REFUSED(aclrtGetFunctionAddr)
REFUSED(rtDevBinaryRegister)
REFUSED(rtFunctionRegister)
REFUSED(rtGetC2cCtrlAddr)
REFUSED(rtKernelLaunch)
REFUSED(aclrtMemExportToShareableHandle)
REFUSED(aclrtMemImportFromShareableHandle)
REFUSED(aclrtMemSetPidToShareableHandle)
