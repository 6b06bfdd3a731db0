// Stands in for libcuda.so.1 (-DFAKE_CUDA) or libgalaxyhip.so.5 in test_gpu_emulator.py: enough of the API to see what
// the launcher passes to a driver and how it reports a driver's failures. It is evidence for the launcher only.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {
std::string text;  // one line a call that matters
void* current_context = nullptr;
int current_device = 0;
const char kFunction[] = "f";

void note(const std::string& line) { text += line + "\n"; }
void note_launch(const char* stream, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                 unsigned shared, void** args) {
  // The signature under test is "Pilf".
  char line[256];
  std::snprintf(line, sizeof line, "launch %u,%u,%u %u,%u,%u %u %s: %llx %d %lld %g", gx, gy, gz, bx, by, bz, shared,
                stream, *static_cast<unsigned long long*>(args[0]), *static_cast<int*>(args[1]),
                *static_cast<long long*>(args[2]), static_cast<double>(*static_cast<float*>(args[3])));
  note(line);
}
std::string address(void* p) {
  char s[32];
  std::snprintf(s, sizeof s, "%p", p);
  return s;
}
}  // namespace

#define API extern "C" __attribute__((visibility("default")))
API const char* fake_log() { return text.c_str(); }

#if defined(FAKE_CUDA)
API int cuInit(unsigned) { return std::getenv("FAKE_NO_DEVICE") ? 100 : 0; }
API int cuDriverGetVersion(int* v) { return *v = 12040, 0; }
API int cuGetErrorString(int r, const char** s) {
  *s = r == 100   ? "no CUDA-capable device is detected"
       : r == 209 ? "no kernel image is available"
                  : "named symbol not found";
  return 0;
}
API int cuGetErrorName(int r, const char** s) {
  *s = r == 100 ? "CUDA_ERROR_NO_DEVICE" : r == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : "CUDA_ERROR_NOT_FOUND";
  return 0;
}
API int cuDeviceGetCount(int* n) { return *n = 2, 0; }
API int cuDeviceGet(int* d, int i) { return *d = i, 0; }
API int cuDeviceGetName(char* s, int n, int d) { return std::snprintf(s, n, "Fake %d", d), 0; }
API int cuDeviceTotalMem_v2(size_t* n, int) { return *n = size_t{80} << 30, 0; }
API int cuDeviceGetAttribute(int* v, int a, int) {
  return *v = a == 75 ? 9 : a == 97 ? 232448 : a == 16 ? 132 : a == 10 ? 32 : 0, 0;
}
API int cuDevicePrimaryCtxRetain(void** c, int d) { return *c = reinterpret_cast<void*>(0x1000l + d), 0; }
API int cuCtxGetCurrent(void** c) { return *c = current_context, 0; }
API int cuCtxPushCurrent_v2(void* c) { return note("push " + address(c)), current_context = c, 0; }
API int cuCtxPopCurrent_v2(void** c) { return *c = current_context, current_context = nullptr, note("pop"), 0; }
API int cuModuleLoadDataEx(void** m, const void* image, unsigned n, int* options, void** values) {
  if (!std::strcmp(static_cast<const char*>(image), "bad")) {
    for (unsigned i = 0; i < n; ++i) {
      if (options[i] == 5) std::strcpy(static_cast<char*>(values[i]), "ptxas says why");
    }
    return 209;
  }
  return note(std::string("load ") + static_cast<const char*>(image)), *m = reinterpret_cast<void*>(7), 0;
}
API int cuModuleUnload(void*) { return note("unload"), 0; }
API int cuModuleGetFunction(void** f, void*, const char* name) {
  return *f = const_cast<char*>(kFunction), std::strcmp(name, "there") ? 500 : 0;
}
API int cuFuncGetAttribute(int* v, int a, void*) {
  return *v = a == 0 ? 256 : a == 1 ? 1024 : a == 3 ? 8 : a == 4 ? 64 : 0, 0;
}
API int cuFuncSetAttribute(void*, int a, int v) {
  return note("set " + std::to_string(a) + "=" + std::to_string(v)), 0;
}
API int cuFuncGetParamInfo(void*, size_t i, size_t* offset, size_t* size) {
  const size_t sizes[] = {8, 4, 8, 4};
  if (i >= 4) return 1;
  return *offset = 0, *size = sizes[i], 0;
}
API int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared, void* stream, void** args, void** extra) {
  if (f != kFunction || extra || !current_context) return 1;
  return note_launch(address(stream).c_str(), gx, gy, gz, bx, by, bz, shared, args), 0;
}
#else
API int hipInit(unsigned) { return std::getenv("FAKE_NO_DEVICE") ? 100 : 0; }
API int hipRuntimeGetVersion(int* v) { return *v = 50200, 0; }
API const char* hipGetErrorString(int r) {
  return r == 100 ? "no ROCm-capable device is detected" : "named symbol not found";
}
API const char* hipGetErrorName(int r) { return r == 100 ? "hipErrorNoDevice" : "hipErrorNotFound"; }
API int hipGetDeviceCount(int* n) { return *n = 2, 0; }
API int hipGetDevice(int* d) { return *d = current_device, 0; }
API int hipSetDevice(int d) { return note("device " + std::to_string(d)), current_device = d, 0; }
API int hipDeviceGetName(char* s, int n, int d) { return std::snprintf(s, n, "Fake DCU %d", d), 0; }
API int hipDeviceTotalMem(size_t* n, int) { return *n = size_t{64} << 30, 0; }
API int hipModuleLoadData(void** m, const void* image) {
  return note(std::string("load ") + static_cast<const char*>(image)), *m = reinterpret_cast<void*>(7), 0;
}
API int hipModuleUnload(void*) { return note("unload"), 0; }
API int hipModuleGetFunction(void** f, void*, const char* name) {
  return *f = const_cast<char*>(kFunction), std::strcmp(name, "there") ? 500 : 0;
}
API int hipFuncGetAttribute(int* v, int a, const void*) { return *v = a == 0 ? 256 : a == 1 ? 1024 : 0, 0; }
API int hipModuleLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared, void* stream, void** args, void** extra) {
  if (f != kFunction || extra) return 1;
  return note_launch(address(stream).c_str(), gx, gy, gz, bx, by, bz, shared, args), 0;
}
#endif
