// Devices, contexts, versions and chip properties.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

#include "runtime.h"
#include "acl/acl_rt.h"

namespace cannsim {
namespace {

// Core counts and sizes of HBM and L2: CANN 8.1.RC1, data/platform_config/<name>.ini (ai_core_cnt, vector_core_cnt,
// memory_size, l2_size). The first generation has no separate vector cores, and its files no memory_size: 32 GB as
// published for the Ascend 910. "Ascend910B" without a digit belongs to the first generation (Short_SoC_version there).
const Chip kChips[] = {
    {"Ascend910A", Family::k910A, 32, 32, 32ull << 30, 32ull << 20},
    {"Ascend910B", Family::k910A, 30, 30, 32ull << 30, 32ull << 20},
    {"Ascend910ProA", Family::k910A, 32, 32, 32ull << 30, 32ull << 20},
    {"Ascend910ProB", Family::k910A, 30, 30, 32ull << 30, 32ull << 20},
    {"Ascend910PremiumA", Family::k910A, 32, 32, 32ull << 30, 32ull << 20},
    {"Ascend910B1", Family::k910B, 24, 48, 64ull << 30, 192ull << 20},
    {"Ascend910B2", Family::k910B, 24, 48, 64ull << 30, 192ull << 20},
    {"Ascend910B3", Family::k910B, 20, 40, 64ull << 30, 192ull << 20},
    {"Ascend910B4", Family::k910B, 20, 40, 32ull << 30, 96ull << 20},
};

std::atomic<bool> g_initialised{false};
std::mutex& g_error_mutex = *new std::mutex;  // never destroyed: workers may still run when the process ends
std::string& g_recent_error = *new std::string;
thread_local int t_device = -1;
thread_local std::string t_error_copy;
char g_contexts[64];  // a context is an address in here: only its identity matters

const char* cann_version() { return env("CANNSIM_CANN_VERSION", "9.1.0"); }

}  // namespace

const char* env(const char* name, const char* fallback) {
  const char* value = getenv(name);
  return value && *value ? value : fallback;
}

const Chip& chip() {
  static const Chip& chosen = []() -> const Chip& {
    const char* wanted = env("CANNSIM_SOC", "Ascend910B3");
    std::string known;
    for (const Chip& c : kChips) {
      if (!strcmp(c.name, wanted)) return c;
      known += std::string(" ") + c.name;
    }
    fprintf(stderr, "[cannsim] CANNSIM_SOC=%s is unknown; known:%s\n", wanted, known.c_str());
    exit(2);
  }();
  return chosen;
}

int report(int code, const std::string& message) {
  {
    std::lock_guard<std::mutex> lock(g_error_mutex);
    g_recent_error = message;
  }
  fprintf(stderr, "[cannsim] ERROR %d: %s\n", code, message.c_str());
  static const bool fatal = !strcmp(env("CANNSIM_ON_ERROR", "report"), "abort");
  if (fatal) abort();
  return code;
}

void trace(const char* format, ...) {
  static const bool on = atoi(env("CANNSIM_TRACE", "0")) != 0;
  if (!on) return;
  char line[512];
  va_list args;
  va_start(args, format);
  vsnprintf(line, sizeof line, format, args);
  va_end(args);
  fprintf(stderr, "[cannsim] %s\n", line);
}

int device_count() {
  static const int n = atoi(env("CANNSIM_DEVICES", "1"));
  return n;
}

int current_device() { return t_device < 0 ? 0 : t_device; }

}  // namespace cannsim

using namespace cannsim;

CANNSIM_API aclError aclInit(const char* config) {
  trace("aclInit %s", config ? config : "(null)");
  return g_initialised.exchange(true) ? ACL_ERROR_REPEAT_INITIALIZE : ACL_SUCCESS;
}
CANNSIM_API aclError aclFinalize() {
  g_initialised = false;
  return ACL_SUCCESS;
}

CANNSIM_API aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = device_count();
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= device_count())
    return report(ACL_ERROR_RT_PARAM_INVALID,
                  "aclrtSetDevice: device " + std::to_string(device) + " of " + std::to_string(device_count()));
  t_device = device;
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtGetDevice(int32_t* device) {
  if (t_device < 0) {
    if (!g_initialised) return ACL_ERROR_RT_CONTEXT_NULL;
    t_device = 0;
  }
  *device = t_device;
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }
CANNSIM_API aclError aclrtGetCurrentContext(aclrtContext* context) {
  *context = &g_contexts[current_device()];
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtSetCurrentContext(aclrtContext context) {
  const ptrdiff_t device = static_cast<char*>(context) - g_contexts;
  if (device < 0 || device >= device_count())
    return report(ACL_ERROR_RT_PARAM_INVALID, "aclrtSetCurrentContext: not a context of this simulator");
  t_device = static_cast<int>(device);
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtGetPrimaryCtxState(int32_t, uint32_t* flags, int32_t* active) {
  if (flags) *flags = 0;
  *active = g_initialised;
  return ACL_SUCCESS;
}

CANNSIM_API const char* aclrtGetSocName() { return chip().name; }
CANNSIM_API const char* aclGetRecentErrMsg() {
  std::lock_guard<std::mutex> lock(g_error_mutex);
  t_error_copy = g_recent_error;
  return t_error_copy.c_str();
}
CANNSIM_API aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
CANNSIM_API aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }

CANNSIM_API aclError aclsysGetCANNVersion(aclCANNPackageName package, aclCANNPackageVersion* version) {
  memset(version, 0, sizeof *version);
  const char* text = package == ACL_PKG_NAME_DRIVER ? env("CANNSIM_DRIVER_VERSION", "25.5.0") : cann_version();
  strncpy(version->version, text, sizeof version->version - 1);
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclsysGetVersionStr(char*, char* out) {
  strcpy(out, cann_version());
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclGetCannAttributeList(const aclCannAttr** list, size_t* count) {
  static const aclCannAttr all[] = {ACL_CANN_ATTR_INF_NAN, ACL_CANN_ATTR_BF16, ACL_CANN_ATTR_JIT_COMPILE};
  *list = all;
  *count = 3;
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclGetCannAttribute(aclCannAttr attribute, int32_t* value) {
  const bool b = chip().family == Family::k910B;
  *value = attribute == ACL_CANN_ATTR_JIT_COMPILE ? 0 : b;
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo info, int64_t* value) {
  switch (info) {
    case ACL_DEVICE_INFO_L2_SIZE: *value = chip().l2_bytes; break;
    case ACL_DEVICE_INFO_VECTOR_CORE_NUM: *value = chip().vector_cores; break;
    default: *value = chip().cube_cores;
  }
  return ACL_SUCCESS;
}

namespace cannsim {
uint64_t hbm_bytes();  // memory.cpp: CANNSIM_HBM_MB or the chip's own
}

CANNSIM_API aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr attribute, int64_t* value) {
  switch (attribute) {
    case ACL_DEV_ATTR_AICPU_CORE_NUM: *value = 6; break;
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM: *value = chip().cube_cores; break;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM: *value = chip().vector_cores; break;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE: *value = hbm_bytes(); break;
    case ACL_DEV_ATTR_L2_CACHE_SIZE: *value = chip().l2_bytes; break;
    default: *value = 0;
  }
  return ACL_SUCCESS;
}

static aclError cores_of(aclrtDevResLimitType type, uint32_t* value) {
  *value = static_cast<int>(type) == 1 ? chip().vector_cores : chip().cube_cores;
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtGetDeviceResLimit(int32_t, aclrtDevResLimitType t, uint32_t* v) { return cores_of(t, v); }
CANNSIM_API aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType t, uint32_t* v) { return cores_of(t, v); }
CANNSIM_API aclError aclrtGetResInCurrentThread(aclrtDevResLimitType t, uint32_t* v) { return cores_of(t, v); }

CANNSIM_API aclError aclrtDeviceGetUuid(int32_t device, aclrtUuid* uuid) {
  memset(uuid, 0, sizeof *uuid);
  reinterpret_cast<char*>(uuid)[0] = 'S';
  reinterpret_cast<char*>(uuid)[15] = static_cast<char>(device);
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }
CANNSIM_API aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  *pid = getpid();
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtGetDeviceUtilizationRate(int32_t, aclrtUtilizationInfo* info) {
  memset(info, 0, sizeof *info);
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t* const logic) {
  *logic = user;
  return ACL_SUCCESS;
}

// Settings that change speed or error modes only: accepted, without effect.
CANNSIM_API aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
CANNSIM_API aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
CANNSIM_API aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
CANNSIM_API aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actual) {
  *actual = timeout;
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
CANNSIM_API aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
CANNSIM_API aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  *value = 0;
  return ACL_SUCCESS;
}
CANNSIM_API void aclAppLog(aclLogLevel level, const char*, const char*, uint32_t, const char* format, ...) {
  if (!getenv("CANNSIM_APPLOG") || level < atoi(env("ASCEND_GLOBAL_LOG_LEVEL", "3"))) return;
  va_list args;
  va_start(args, format);
  fprintf(stderr, "[applog %d] ", level);
  vfprintf(stderr, format, args);
  fputc('\n', stderr);
  va_end(args);
}
