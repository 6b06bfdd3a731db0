// Device memory, pinned host memory, copies and virtual memory management.
//
// A device owns two arenas of address space, kArena apart from one another: torch_npu sees addresses in the first,
// which is never accessible, so that host code that dereferences a device pointer faults at once and is named; the
// bytes lie in the second (the shadow), at the same offset. Addresses are not reused: a freed one stays known as freed.
// Fresh and remapped memory reads as 0xFF bytes, NaN in every float type, from one shared poison file that costs no
// memory until written. Freeing unmaps the shadow.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

#include "runtime.h"
#include "acl/acl_rt.h"

namespace cannsim {

thread_local int t_worker_device = -1;

uint64_t hbm_bytes() {
  static const uint64_t bytes = [] {
    const char* mb = env("CANNSIM_HBM_MB", "");
    return *mb ? strtoull(mb, nullptr, 0) << 20 : chip().hbm_bytes;
  }();
  return bytes;
}

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kArena = 4ull << 40;        // address space of one device
constexpr size_t kPoisonFile = 16ull << 20;  // mapped again and again over an allocation
constexpr int kMaxDevices = 8;

struct Physical {  // an aclrtMallocPhysical handle
  int device;
  size_t bytes;
  char* mapped = nullptr;
};

struct Range {
  size_t bytes;   // as asked for
  size_t mapped;  // whole pages
  int device;
  bool live = true;
  bool reserved = false;  // address space only (aclrtReserveMemAddress): `maps` are accessible
  std::map<char*, Physical*> maps;
};

struct Arena {
  char* device_base = nullptr;  // what torch_npu sees
  char* shadow_base = nullptr;  // where the bytes are
  size_t next = 0;
  uint64_t used = 0;
};

// Never destroyed: workers may still run when the process ends.
std::mutex& g_mutex = *new std::mutex;
Arena g_arenas[kMaxDevices];
auto& g_ranges = *new std::map<char*, Range>;
auto& g_pinned = *new std::map<char*, size_t>;

size_t pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

int device_of(const void* address) {
  for (int d = 0; d < kMaxDevices; ++d) {
    const char* base = g_arenas[d].device_base;
    if (base && address >= base && address < base + kArena) return d;
  }
  return -1;
}

char* shadow(const void* address, int device) {
  const Arena& arena = g_arenas[device];
  return arena.shadow_base + (static_cast<const char*>(address) - arena.device_base);
}

std::string hex(const void* address) {
  char text[32];
  snprintf(text, sizeof text, "%p", address);
  return text;
}

int poison_file() {
  static const int file = [] {
    const int fd = memfd_create("cannsim-poison", 0);
    std::vector<char> block(1 << 20, static_cast<char>(0xFF));
    for (size_t at = 0; at < kPoisonFile; at += block.size())
      if (write(fd, block.data(), block.size()) != static_cast<ssize_t>(block.size())) abort();
    return fd;
  }();
  return file;
}

bool map_poisoned(char* at, size_t bytes) {
  for (size_t done = 0; done < bytes; done += kPoisonFile) {
    const size_t n = std::min(kPoisonFile, bytes - done);
    void* got = mmap(at + done, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, poison_file(), 0);
    if (got == MAP_FAILED) return false;
  }
  return true;
}

void unmap(char* at, size_t bytes) {
  mmap(at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
}

// A host access to device memory: say so, then let the fault take its course.
struct sigaction g_previous_segv;
void on_segv(int signal, siginfo_t* info, void* context) {
  const int device = device_of(info->si_addr);
  if (device >= 0) {
    char line[160];
    const int n = snprintf(line, sizeof line,
                           "[cannsim] ERROR host code dereferenced %p, memory of device %d: copy it with "
                           "aclrtMemcpy or run an operator on a stream\n",
                           info->si_addr, device);
    if (write(2, line, n) < 0) _exit(139);
  }
  sigaction(SIGSEGV, &g_previous_segv, nullptr);
  if (g_previous_segv.sa_flags & SA_SIGINFO && g_previous_segv.sa_sigaction)
    g_previous_segv.sa_sigaction(signal, info, context);
}

Arena& arena_of(int device) {
  if (device >= kMaxDevices) throw Refused(ACL_ERROR_RT_PARAM_INVALID, "at most 8 devices are simulated");
  Arena& arena = g_arenas[device];
  if (!arena.device_base) {
    void* both = mmap(nullptr, 2 * kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (both == MAP_FAILED) throw Refused(ACL_ERROR_RT_MEMORY_ALLOCATION, "no address space for a device");
    arena.device_base = static_cast<char*>(both);
    arena.shadow_base = arena.device_base + kArena;
    static bool installed = false;
    if (!installed) {
      installed = true;
      struct sigaction action = {};
      action.sa_sigaction = on_segv;
      action.sa_flags = SA_SIGINFO | SA_ONSTACK;
      sigaction(SIGSEGV, &action, &g_previous_segv);
    }
  }
  return arena;
}

// Address space with an inaccessible page after it, so that ranges never touch.
char* take_address(Arena& arena, size_t bytes) {
  constexpr size_t kAlign = 2ull << 20;
  const size_t align = bytes >= kAlign ? kAlign : kPage;
  const size_t at = (arena.next + align - 1) / align * align;
  if (at + bytes + kPage > kArena) throw Refused(ACL_ERROR_RT_MEMORY_ALLOCATION, "device address space is used up");
  arena.next = at + bytes + kPage;
  return arena.device_base + at;
}

void charge(Arena& arena, size_t bytes, const char* who) {
  if (arena.used + bytes > hbm_bytes())
    throw Refused(ACL_ERROR_RT_MEMORY_ALLOCATION, std::string(who) + ": " + std::to_string(bytes) +
                                                      " bytes asked for, " + std::to_string(hbm_bytes() - arena.used) +
                                                      " of " + std::to_string(hbm_bytes()) + " free");
  arena.used += bytes;
}

// Out of memory is an answer the caching allocator expects, not an error to report.
template <class Body>
aclError allocate(void** out, Body body) {
  *out = nullptr;
  std::lock_guard<std::mutex> lock(g_mutex);
  try {
    *out = body();
    return ACL_SUCCESS;
  } catch (const Refused& e) {
    trace("%s", e.what());
    return e.code;
  }
}

aclError device_malloc(void** out, size_t bytes) {
  if (!bytes) return report(ACL_ERROR_RT_PARAM_INVALID, "aclrtMalloc: 0 bytes");
  return allocate(out, [&]() -> void* {
    const int device = current_device();
    Arena& arena = arena_of(device);
    const size_t mapped = pages(bytes);
    charge(arena, mapped, "aclrtMalloc");
    char* at = take_address(arena, mapped);
    if (!map_poisoned(shadow(at, device), mapped))
      throw Refused(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtMalloc: the host has no memory left");
    g_ranges[at] = Range{bytes, mapped, device, true, false, {}};
    trace("aclrtMalloc %zu -> %p (device %d)", bytes, static_cast<void*>(at), device);
    return at;
  });
}

// The shadow address of device memory; `device` -1 allows any.
void* translate(const void* address, size_t bytes, int device, const std::string& who) {
  std::lock_guard<std::mutex> lock(g_mutex);
  const int owner = device_of(address);
  const std::string where = who + ": " + hex(address) + " (" + std::to_string(bytes) + " bytes)";
  if (owner < 0) throw Refused(kVectorCoreException, where + " is not device memory");
  auto it = g_ranges.upper_bound(const_cast<char*>(static_cast<const char*>(address)));
  if (it == g_ranges.begin()) throw Refused(kVectorCoreException, where + " was never allocated");
  --it;
  const Range& range = it->second;
  const size_t offset = static_cast<const char*>(address) - it->first;
  const std::string within = where + " lies at offset " + std::to_string(offset) + " of " +
                             std::to_string(range.bytes) + " bytes at " + hex(it->first);
  if (!range.live) throw Refused(kVectorCoreException, "use after free: " + within + ", freed before");
  if (offset + bytes > range.mapped) throw Refused(kVectorCoreException, "out of bounds: " + within);
  if (device >= 0 && owner != device)
    throw Refused(kVectorCoreException, "wrong device: " + within + " of device " + std::to_string(owner) +
                                            ", used on a stream of device " + std::to_string(device));
  if (range.reserved) {
    const char* at = static_cast<const char*>(address);
    const char* const end = at + bytes;
    while (at < end) {
      auto map = range.maps.upper_bound(const_cast<char*>(at));
      if (map == range.maps.begin()) throw Refused(kVectorCoreException, "unmapped: " + within);
      --map;
      const char* const stop = map->first + map->second->bytes;
      if (at >= stop) throw Refused(kVectorCoreException, "unmapped: " + within);
      at = stop;
    }
  }
  return shadow(address, owner);
}

}  // namespace

void* resolve(const void* address, size_t bytes, const std::string& who) {
  if (t_worker_device < 0)
    throw Refused(kVectorCoreException, "wrong thread: " + who + " touches device memory outside of a stream");
  if (!bytes) return nullptr;
  return translate(address, bytes, t_worker_device, who);
}

Place place_of(const void* address) {
  std::lock_guard<std::mutex> lock(g_mutex);
  if (device_of(address) >= 0) return Place::kDevice;
  auto it = g_pinned.upper_bound(const_cast<char*>(static_cast<const char*>(address)));
  if (it != g_pinned.begin() && static_cast<const char*>(address) < std::prev(it)->first + std::prev(it)->second)
    return Place::kHost;
  return Place::kPageable;
}

void* copy_address(const void* address, size_t bytes, Place expected, const std::string& who) {
  const bool is_device = place_of(address) == Place::kDevice;
  if (is_device != (expected == Place::kDevice))
    throw Refused(ACL_ERROR_RT_PARAM_INVALID, who + ": " + hex(address) + " is " + (is_device ? "device" : "host") +
                                                  " memory, the copy's direction says otherwise");
  return is_device ? translate(address, bytes, -1, who) : const_cast<void*>(address);
}

}  // namespace cannsim

using namespace cannsim;

CANNSIM_API aclError aclrtMalloc(void** out, size_t n, aclrtMemMallocPolicy) { return device_malloc(out, n); }
CANNSIM_API aclError aclrtMallocAlign32(void** out, size_t n, aclrtMemMallocPolicy) { return device_malloc(out, n); }
CANNSIM_API aclError aclrtMallocWithCfg(void** out, size_t n, aclrtMemMallocPolicy, aclrtMallocConfig*) {
  return device_malloc(out, n);
}
CANNSIM_API aclError aclrtFree(void* address) {
  return guarded([&] {
    std::lock_guard<std::mutex> lock(g_mutex);
    auto it = g_ranges.find(static_cast<char*>(address));
    if (it == g_ranges.end() || it->second.reserved)
      throw Refused(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: " + hex(address) + " is not an allocation");
    Range& range = it->second;
    if (!range.live) throw Refused(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: " + hex(address) + " was freed before");
    range.live = false;
    g_arenas[range.device].used -= range.mapped;
    unmap(shadow(address, range.device), range.mapped);
    trace("aclrtFree %p", address);
    return ACL_SUCCESS;
  });
}

CANNSIM_API aclError aclrtMallocHost(void** out, size_t bytes) {
  *out = aligned_alloc(kPage, pages(bytes));
  if (!*out) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  std::lock_guard<std::mutex> lock(g_mutex);
  g_pinned[static_cast<char*>(*out)] = bytes;
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtMallocHostWithCfg(void** out, uint64_t bytes, aclrtMallocConfig*) {
  return aclrtMallocHost(out, bytes);
}
CANNSIM_API aclError aclrtFreeHost(void* address) {
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    if (!g_pinned.erase(static_cast<char*>(address)))
      return report(ACL_ERROR_RT_PARAM_INVALID, "aclrtFreeHost: " + hex(address) + " is not pinned memory");
  }
  free(address);
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtPointerGetAttributes(const void* address, aclrtPtrAttributes* out) {
  memset(out, 0, sizeof *out);
  switch (place_of(address)) {
    case Place::kDevice:
      out->location.type = ACL_MEM_LOCATION_TYPE_DEVICE;
      out->location.id = device_of(address);
      break;
    case Place::kHost: out->location.type = ACL_MEM_LOCATION_TYPE_HOST; break;
    case Place::kPageable: out->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED; break;
  }
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free_bytes, size_t* total) {
  std::lock_guard<std::mutex> lock(g_mutex);
  *total = hbm_bytes();
  *free_bytes = hbm_bytes() - g_arenas[current_device()].used;
  return ACL_SUCCESS;
}

// --- copies and fills

namespace {

struct Direction {
  Place to, from;
};

Direction direction(void* to, const void* from, aclrtMemcpyKind kind, const std::string& who) {
  switch (kind) {
    case ACL_MEMCPY_HOST_TO_HOST: return {Place::kHost, Place::kHost};
    case ACL_MEMCPY_HOST_TO_DEVICE: return {Place::kDevice, Place::kHost};
    case ACL_MEMCPY_DEVICE_TO_HOST: return {Place::kHost, Place::kDevice};
    case ACL_MEMCPY_DEVICE_TO_DEVICE: return {Place::kDevice, Place::kDevice};
    case ACL_MEMCPY_DEFAULT: return {place_of(to), place_of(from)};
    default: throw Refused(ACL_ERROR_RT_PARAM_INVALID, who + ": copy kind " + std::to_string(kind));
  }
}

int copy_now(void* to, const void* from, size_t bytes, Direction d, const std::string& who) {
  return guarded([&] {
    void* t = copy_address(to, bytes, d.to, who + " destination");
    const void* f = copy_address(from, bytes, d.from, who + " source");
    memmove(t, f, bytes);
    return ACL_SUCCESS;
  });
}

aclError copy(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind, const char* who,
              const aclrtStream* stream) {
  return guarded([&]() -> int {
    if (bytes > room)
      throw Refused(ACL_ERROR_RT_PARAM_INVALID,
                    std::string(who) + ": " + std::to_string(bytes) + " bytes into " + std::to_string(room));
    const Direction d = direction(to, from, kind, who);
    if (!stream) return copy_now(to, from, bytes, d, who);
    return submit(*stream, who, [=] { return copy_now(to, from, bytes, d, who); });
  });
}

int fill_now(void* to, int value, size_t bytes, const std::string& who) {
  return guarded([&] {
    memset(copy_address(to, bytes, Place::kDevice, who), value, bytes);
    return ACL_SUCCESS;
  });
}

}  // namespace

CANNSIM_API aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t n, aclrtMemcpyKind kind) {
  return copy(to, room, from, n, kind, "aclrtMemcpy", nullptr);
}
CANNSIM_API aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t n, aclrtMemcpyKind kind,
                                      aclrtStream stream) {
  return copy(to, room, from, n, kind, "aclrtMemcpyAsync", &stream);
}
CANNSIM_API aclError aclrtMemcpyAsyncWithCondition(void* to, size_t room, const void* from, size_t n,
                                                   aclrtMemcpyKind kind, aclrtStream stream) {
  return copy(to, room, from, n, kind, "aclrtMemcpyAsyncWithCondition", &stream);
}
CANNSIM_API aclError aclrtMemset(void* to, size_t room, int32_t value, size_t n) {
  if (n > room) return report(ACL_ERROR_RT_PARAM_INVALID, "aclrtMemset: more bytes than room");
  return fill_now(to, value, n, "aclrtMemset");
}
CANNSIM_API aclError aclrtMemsetAsync(void* to, size_t room, int32_t value, size_t n, aclrtStream stream) {
  if (n > room) return report(ACL_ERROR_RT_PARAM_INVALID, "aclrtMemsetAsync: more bytes than room");
  return submit(stream, "aclrtMemsetAsync", [=] { return fill_now(to, value, n, "aclrtMemsetAsync"); });
}

// --- virtual memory management, as expandable segments use it. A handle is mapped at most once at a time, and its
// contents do not survive an unmapping: they read as poison.

CANNSIM_API aclError aclrtReserveMemAddress(void** out, size_t bytes, size_t, void*, uint64_t) {
  return allocate(out, [&]() -> void* {
    const int device = current_device();
    char* at = take_address(arena_of(device), pages(bytes));
    g_ranges[at] = Range{bytes, pages(bytes), device, true, true, {}};
    return at;
  });
}
CANNSIM_API aclError aclrtReleaseMemAddress(void* address) {
  return guarded([&] {
    std::lock_guard<std::mutex> lock(g_mutex);
    auto it = g_ranges.find(static_cast<char*>(address));
    if (it == g_ranges.end() || !it->second.reserved || !it->second.live)
      throw Refused(ACL_ERROR_RT_PARAM_INVALID, "aclrtReleaseMemAddress: " + hex(address) + " is not reserved");
    if (!it->second.maps.empty())
      throw Refused(ACL_ERROR_RT_PARAM_INVALID, "aclrtReleaseMemAddress: " + hex(address) + " still has mapped memory");
    it->second.live = false;
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t bytes, const aclrtPhysicalMemProp* prop,
                                         uint64_t) {
  void* out = nullptr;
  const aclError status = allocate(&out, [&]() -> void* {
    const int device = prop ? static_cast<int>(prop->location.id) : current_device();
    charge(arena_of(device), bytes, "aclrtMallocPhysical");
    return new Physical{device, bytes};
  });
  *handle = static_cast<aclrtDrvMemHandle>(out);
  return status;
}
CANNSIM_API aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  auto* physical = reinterpret_cast<Physical*>(handle);
  std::lock_guard<std::mutex> lock(g_mutex);
  if (physical->mapped) return report(ACL_ERROR_RT_PARAM_INVALID, "aclrtFreePhysical: the memory is still mapped");
  g_arenas[physical->device].used -= physical->bytes;
  delete physical;
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtMapMem(void* address, size_t bytes, size_t offset, aclrtDrvMemHandle handle, uint64_t) {
  return guarded([&] {
    auto* physical = reinterpret_cast<Physical*>(handle);
    std::lock_guard<std::mutex> lock(g_mutex);
    auto it = g_ranges.upper_bound(static_cast<char*>(address));
    if (it == g_ranges.begin() || !(--it)->second.reserved || !it->second.live ||
        static_cast<char*>(address) + bytes > it->first + it->second.mapped)
      throw Refused(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: " + hex(address) + " lies in no reserved range");
    if (physical->mapped || offset || bytes != physical->bytes)
      throw Refused(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "aclrtMapMem: only a whole handle, mapped once, is simulated");
    if (!map_poisoned(shadow(address, it->second.device), bytes))
      throw Refused(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtMapMem: the host has no memory left");
    physical->mapped = static_cast<char*>(address);
    it->second.maps[physical->mapped] = physical;
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclrtUnmapMem(void* address) {
  return guarded([&] {
    std::lock_guard<std::mutex> lock(g_mutex);
    auto it = g_ranges.upper_bound(static_cast<char*>(address));
    if (it != g_ranges.begin()) {
      Range& range = std::prev(it)->second;
      auto map = range.maps.find(static_cast<char*>(address));
      if (map != range.maps.end()) {
        unmap(shadow(address, range.device), map->second->bytes);
        map->second->mapped = nullptr;
        range.maps.erase(map);
        return ACL_SUCCESS;
      }
    }
    throw Refused(ACL_ERROR_RT_PARAM_INVALID, "aclrtUnmapMem: nothing is mapped at " + hex(address));
  });
}
