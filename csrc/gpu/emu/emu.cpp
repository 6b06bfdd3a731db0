// The emulator: fibers, barriers, shared memory, checks. See emu.h for what it reports and what it cannot.
//
// A launch runs its blocks one after the other. A block's threads are fibers taken from a queue; one runs until it
// waits (or ends), then the next in the queue does. Fibers, their stacks and the shared memory are kept between
// launches. An error abandons the block: its fibers are made anew at the next launch.
#include "emu.h"

#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <string>
#include <vector>

#if !defined(__x86_64__) && !defined(__aarch64__)
#define QRT_EMU_UCONTEXT 1
#endif
#if defined(QRT_EMU_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#define QRT_EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define QRT_EMU_ASAN 1
#endif
#endif
#if defined(QRT_EMU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace qrt {
namespace emu {

Now now;

namespace {

constexpr int kInterfaceVersion = 1;
constexpr unsigned kMaxBlock = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kDefaultDynamicShared = 64 << 10;  // every gfx9 part's limit, and below every CUDA part's opt-in
constexpr size_t kFrontGuard = 256;                 // bytes before dynamic shared memory, checked after each block
constexpr unsigned char kPoison = 0xff;             // NaN in every float format

enum class State : uint8_t { kReady, kAtBlock, kAtWarp, kDone };

struct Copy {  // one pending cp_async16
  void* to;
  unsigned char bytes[16];
};

struct Fiber {
#if defined(QRT_EMU_UCONTEXT)
  ucontext_t context;
#endif
  void* sp = nullptr;
  const unsigned char* stack = nullptr;  // its lowest byte; a guard page lies below
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;      // AddressSanitizer's
  unsigned index = 0;
  State state = State::kDone;
  const char* file = nullptr;  // where it waits
  int line = 0;
  std::vector<Copy> copies;    // pending, oldest first
  std::vector<size_t> groups;  // copies in each committed group, oldest first
  size_t open_copies = 0;      // issued since the last commit
};

struct Warp {
  unsigned lanes = 0, arrived = 0, alive = 0, phase = 0;
  int kind = 0;
  const char* file = nullptr;
  int line = 0;
  uint64_t slot[2][QRT_WARP] = {};
  std::vector<uint64_t> scratch;
};

struct Kernel {
  std::string name, signature;
  void (*function)() = nullptr;
  Invoke invoke = nullptr;
  unsigned bound = 0;
  std::vector<uint32_t> dirty;  // pages of static shared memory it was seen to write
};

struct Emulator {
  std::vector<Kernel> kernels;
  std::mutex mutex;
  std::string error;
  int order = 0;
  uint64_t seed = 1, random = 1, switches = 0;
  size_t max_dynamic = kDefaultDynamicShared;

  // The launch under way.
  Kernel* kernel = nullptr;
  void** args = nullptr;
  unsigned threads = 0, alive = 0, at_block = 0;
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  bool in_fiber = false;
  Fiber scheduler;
  Fiber* current = nullptr;
  Fiber* previous = nullptr;  // whom `current` took over from
  std::vector<Fiber*> fibers;  // kMaxBlock at most, made as they are needed
  std::vector<Warp> warps;
  unsigned queue[kMaxBlock] = {};  // a ring of ready fibers
  unsigned head = 0, queued = 0;

  unsigned char* arena = nullptr;  // dynamic shared memory ends where a guard page begins
  size_t arena_bytes = 0, dynamic_bytes = 0;
  sigjmp_buf fault_jump;
};

Emulator& emu() {
  static Emulator* e = new Emulator();  // outlives static destructors: Python may unload at any time
  return *e;
}

uint64_t next_random(Emulator& e) {
  e.random ^= e.random << 13;
  e.random ^= e.random >> 7;
  e.random ^= e.random << 17;
  return e.random;
}

const char* short_name(const char* file) {
  const char* slash = file ? std::strrchr(file, '/') : nullptr;
  return slash ? slash + 1 : file ? file : "?";
}

// ------------------------------------------------------------------------------------------------ switching
#if !defined(QRT_EMU_UCONTEXT)
extern "C" QRT_HIDDEN void qrt_emu_switch_stack(void** save, void* to);
#if defined(__x86_64__)
asm(".text\n.hidden qrt_emu_switch_stack\n.globl qrt_emu_switch_stack\n.type qrt_emu_switch_stack,@function\n"
    "qrt_emu_switch_stack:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size qrt_emu_switch_stack,.-qrt_emu_switch_stack\n");
#else
asm(".text\n.hidden qrt_emu_switch_stack\n.globl qrt_emu_switch_stack\n.type qrt_emu_switch_stack,%function\n"
    "qrt_emu_switch_stack:\n"
    "sub sp,sp,#160\nstp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\n"
    "stp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\nstp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\n"
    "stp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\nmov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\nldp x27,x28,[sp,#64]\n"
    "ldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\nldp d12,d13,[sp,#128]\n"
    "ldp d14,d15,[sp,#144]\nadd sp,sp,#160\nret\n");
#endif
#endif

// Tells AddressSanitizer that a switch is complete, and learns from it where the host thread's own stack is.
void arrived(Emulator& e, void* fake_stack) {
#if defined(QRT_EMU_ASAN)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
  if (e.previous == &e.scheduler) {
    e.scheduler.stack = static_cast<const unsigned char*>(bottom);
    e.scheduler.stack_bytes = bytes;
  }
#else
  (void)e;
  (void)fake_stack;
#endif
}

// Continues `to`; returns when something continues the caller. `me` is where the caller is kept.
void jump(Emulator& e, Fiber* me, Fiber* to) {
  ++e.switches;
  e.previous = me;
  e.current = to;
  e.in_fiber = to != &e.scheduler;
  if (e.in_fiber) now.thread = {to->index, 0, 0};
#if defined(QRT_EMU_ASAN)
  __sanitizer_start_switch_fiber(&me->fake_stack, to->stack, to->stack_bytes);
#endif
#if defined(QRT_EMU_UCONTEXT)
  swapcontext(&me->context, &to->context);
#else
  qrt_emu_switch_stack(&me->sp, to->sp);
#endif
  arrived(e, e.current->fake_stack);
}

void push_ready(Emulator& e, unsigned index) {
  e.fibers[index]->state = State::kReady;
  unsigned at = e.head + e.queued;
  if (at >= kMaxBlock) at -= kMaxBlock;
  e.queue[at] = index;
  ++e.queued;
}

// The next fiber to run, or the scheduler when none is ready.
Fiber* take_next(Emulator& e) {
  if (!e.queued) return &e.scheduler;
  if (e.order == 2) {
    unsigned pick = e.head + static_cast<unsigned>(next_random(e) % e.queued);
    if (pick >= kMaxBlock) pick -= kMaxBlock;
    const unsigned t = e.queue[e.head];
    e.queue[e.head] = e.queue[pick];
    e.queue[pick] = t;
  }
  Fiber* f = e.fibers[e.queue[e.head]];
  if (++e.head == kMaxBlock) e.head = 0;
  --e.queued;
  return f;
}

void wait(Emulator& e, State state, const char* file, int line) {
  Fiber* me = e.current;
  me->state = state;
  me->file = file;
  me->line = line;
  jump(e, me, take_next(e));
}

template <class F>
void in_order(const Emulator& e, unsigned begin, unsigned end, const F& f) {
  if (e.order == 1) {
    for (unsigned i = end; i > begin; --i) f(i - 1);
  } else {
    for (unsigned i = begin; i < end; ++i) f(i);
  }
}

void release_warp(Emulator& e, Warp& w, unsigned warp) {
  w.arrived = 0;
  const unsigned begin = warp * QRT_WARP;
  in_order(e, begin, begin + w.lanes, [&](unsigned i) {
    if (e.fibers[i]->state == State::kAtWarp) push_ready(e, i);
  });
}

void release_block(Emulator& e) {
  e.at_block = 0;
  in_order(e, 0, e.threads, [&](unsigned i) {
    if (e.fibers[i]->state == State::kAtBlock) push_ready(e, i);
  });
}

std::string place(const Emulator& e) {
  const uint3 b = now.block;
  return " (block " + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z) + ", thread " +
         std::to_string(now.thread.x) + " of " + std::to_string(e.threads) + ", warp size " + std::to_string(QRT_WARP) +
         ")";
}

// Records the first error and leaves the fiber for good.
[[noreturn]] void abandon(Emulator& e, const std::string& why) {
  e.error = why + place(e);
  jump(e, e.current, &e.scheduler);
  __builtin_unreachable();
}

void meet_warp(Emulator& e, int kind, const char* file, int line) {
  Fiber* me = e.current;
  const unsigned index = me->index / QRT_WARP;
  Warp& w = e.warps[index];
  if (w.alive != w.lanes) {
    fail("a warp operation at %s:%d after %u of the warp's %u lanes left the kernel", short_name(file), line,
         w.lanes - w.alive, w.lanes);
  }
  if (!w.arrived) {
    w.kind = kind;
    w.file = file;
    w.line = line;
  } else if (w.kind != kind || w.line != line) {
    fail("lanes of one warp meet at different operations: %s:%d and %s:%d", short_name(w.file), w.line,
         short_name(file), line);
  }
  if (++w.arrived == w.alive) {
    ++w.phase;
    release_warp(e, w, index);
    return;
  }
  wait(e, State::kAtWarp, file, line);
}

void land(Fiber& f, size_t count) {
  for (size_t i = 0; i < count; ++i) std::memcpy(f.copies[i].to, f.copies[i].bytes, 16);
  f.copies.erase(f.copies.begin(), f.copies.begin() + static_cast<std::ptrdiff_t>(count));
}

void leave_kernel(Emulator& e) {
  Fiber* me = e.current;
  Warp& w = e.warps[me->index / QRT_WARP];
  if (!me->copies.empty()) fail("left the kernel with %zu asynchronous copies not waited for", me->copies.size());
  if (e.at_block) {
    fail("left the kernel while %u threads wait at the __syncthreads of %s:%d", e.at_block, short_name(e.barrier_file),
         e.barrier_line);
  }
  if (w.arrived) {
    fail("left the kernel while %u lanes of its warp wait at %s:%d", w.arrived, short_name(w.file), w.line);
  }
  --e.alive;
  --w.alive;
  me->state = State::kDone;
  jump(e, me, take_next(e));
}

extern "C" void qrt_emu_fiber_main() {
  Emulator& e = emu();
  arrived(e, nullptr);
  for (;;) {
    e.kernel->invoke(e.kernel->function, e.args);
    leave_kernel(e);
  }
}

// Makes the fiber start a kernel when it is next continued. False: no memory for its stack.
bool prepare(Fiber& f) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (!f.stack) {
    void* m = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    if (m == MAP_FAILED) return false;
    mprotect(m, page, PROT_NONE);
    f.stack = static_cast<unsigned char*>(m) + page;
    f.stack_bytes = kStackBytes;
  }
  auto* stack = const_cast<unsigned char*>(f.stack);
#if defined(QRT_EMU_ASAN)
  ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);
#endif
  f.fake_stack = nullptr;
  f.state = State::kDone;
  f.copies.clear();
  f.groups.clear();
  f.open_copies = 0;
#if defined(QRT_EMU_UCONTEXT)
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, qrt_emu_fiber_main, 0);
#else
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
#if defined(__x86_64__)
  *--top = nullptr;  // fiber_main's return address: never used, keeps the stack aligned
  *--top = reinterpret_cast<void*>(&qrt_emu_fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
#else
  top -= 20;
  std::memset(top, 0, 160);
  top[11] = reinterpret_cast<void*>(&qrt_emu_fiber_main);  // x30
#endif
  f.sp = top;
#endif
  return true;
}

// ------------------------------------------------------------------------------------------------ shared memory
thread_local unsigned char tls_anchor;  // makes the C library allocate this library's thread-local block

struct Segment {
  unsigned char* data = nullptr;
  size_t bytes = 0;
};

int find_segment(dl_phdr_info* info, size_t, void* out) {
  Segment& s = *static_cast<Segment*>(out);
  auto* data = static_cast<unsigned char*>(info->dlpi_tls_data);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& p = info->dlpi_phdr[i];
    if (p.p_type == PT_TLS && data && data <= &tls_anchor && &tls_anchor < data + p.p_memsz) {
      s.data = data;
      s.bytes = p.p_memsz;
      return 1;
    }
  }
  return 0;
}

constexpr size_t kPage = 4096;  // a unit of bookkeeping, not of the machine

// Static shared memory of all kernels, kept poisoned between blocks. It may be megabytes of which a kernel uses a few
// pages: those it was seen to write are filled again after each block, and all are looked at after the first two
// blocks and the last of a launch. A page first written in between is stale for the rest of that launch only.
class StaticShared {
 public:
  explicit StaticShared(Kernel& kernel) : kernel_(kernel) {
    volatile unsigned char touch = tls_anchor;  // 0 in a thread that runs its first kernel, poisoned afterwards
    dl_iterate_phdr(find_segment, &segment_);
    if (segment_.data && touch != kPoison) std::memset(segment_.data, kPoison, segment_.bytes);
  }
  ~StaticShared() {
    if (stale_) std::memset(segment_.data, kPoison, segment_.bytes);
  }
  StaticShared(const StaticShared&) = delete;
  StaticShared& operator=(const StaticShared&) = delete;

  bool found() const { return segment_.data != nullptr; }
  void begin_block() { stale_ = true; }
  void end_block(bool last) {
    if (last || blocks_++ < 2) find_dirty();
    for (const uint32_t page : kernel_.dirty) std::memset(at(page), kPoison, length(page));
    stale_ = false;
  }

 private:
  unsigned char* at(size_t page) const { return segment_.data + page * kPage; }
  size_t length(size_t page) const {
    const size_t left = segment_.bytes - page * kPage;
    return left < kPage ? left : kPage;
  }
  void find_dirty() {
    static const std::vector<unsigned char> clean(kPage, kPoison);
    std::vector<uint32_t> found;
    size_t known = 0;
    const size_t pages = (segment_.bytes + kPage - 1) / kPage;
    for (size_t page = 0; page < pages; ++page) {
      if (known < kernel_.dirty.size() && kernel_.dirty[known] == page) {
        found.push_back(kernel_.dirty[known++]);
      } else if (std::memcmp(at(page), clean.data(), length(page)) != 0) {
        found.push_back(static_cast<uint32_t>(page));
      }
    }
    kernel_.dirty.swap(found);
  }

  Kernel& kernel_;
  Segment segment_;
  unsigned blocks_ = 0;
  bool stale_ = false;
};

bool set_dynamic(Emulator& e, size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t rounded = (bytes + 15) & ~size_t{15};
  const size_t need = (kFrontGuard + rounded + page - 1) / page * page;
  if (need > e.arena_bytes) {
    if (e.arena) munmap(e.arena, e.arena_bytes + page);
    e.arena = nullptr;
    e.arena_bytes = 0;
    void* m = mmap(nullptr, need + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m == MAP_FAILED) return false;
    e.arena = static_cast<unsigned char*>(m);
    e.arena_bytes = need;
    mprotect(e.arena + need, page, PROT_NONE);
  }
  now.dynamic = e.arena + e.arena_bytes - rounded;
  e.dynamic_bytes = bytes;
  return true;
}

// What was written around the dynamic shared memory, or "".
std::string check_guards(const Emulator& e) {
  const size_t rounded = (e.dynamic_bytes + 15) & ~size_t{15};
  const unsigned char* front = now.dynamic - kFrontGuard;
  for (size_t i = 0; i < kFrontGuard; ++i) {
    if (front[i] != kPoison) {
      return "wrote " + std::to_string(kFrontGuard - i) + " bytes before its dynamic shared memory";
    }
  }
  for (size_t i = e.dynamic_bytes; i < rounded; ++i) {
    if (now.dynamic[i] != kPoison) {
      return "wrote past the end of its " + std::to_string(e.dynamic_bytes) + " bytes of dynamic shared memory";
    }
  }
  return "";
}

// ------------------------------------------------------------------------------------------------ faults
#if !defined(QRT_EMU_ASAN)
Emulator* faulting = nullptr;
struct sigaction previous_actions[3];
const int kFaults[3] = {SIGSEGV, SIGBUS, SIGFPE};

void on_fault(int signal, siginfo_t* info, void*) {
  Emulator* e = faulting;
  if (!e || !e->in_fiber) {  // not a kernel's: give it back
    for (int i = 0; i < 3; ++i) sigaction(kFaults[i], &previous_actions[i], nullptr);
    return;
  }
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  const auto stack = reinterpret_cast<uintptr_t>(e->current->stack);
  const auto arena_end = reinterpret_cast<uintptr_t>(e->arena) + e->arena_bytes;
  char why[160];
  if (signal == SIGFPE) {
    std::snprintf(why, sizeof why, "integer division by zero");
  } else if (address < stack && address + 65536 >= stack) {
    std::snprintf(why, sizeof why, "local variables overflow the emulator's stack of a thread");
  } else if (e->arena && address >= arena_end && address < arena_end + 4096) {
    std::snprintf(why, sizeof why, "access past the end of its %zu bytes of dynamic shared memory", e->dynamic_bytes);
  } else if (address == 0 && info->si_code == SI_KERNEL) {  // the processor names no address for these
    std::snprintf(why, sizeof why, "misaligned vector access, or an address no pointer can have");
  } else if (address < 4096) {
    std::snprintf(why, sizeof why, "access through a null pointer (address %#lx)", static_cast<unsigned long>(address));
  } else {
    std::snprintf(why, sizeof why, "access to the wild address %p", info->si_addr);
  }
  e->error = why;
  siglongjmp(e->fault_jump, 1);
}

struct FaultGuard {
  stack_t previous_stack{};
  std::vector<unsigned char> stack;

  explicit FaultGuard(Emulator& e) : stack(64 << 10) {
    stack_t s{};
    s.ss_sp = stack.data();
    s.ss_size = stack.size();
    sigaltstack(&s, &previous_stack);
    faulting = &e;
      struct sigaction a {};
    a.sa_sigaction = on_fault;
    a.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; ++i) sigaction(kFaults[i], &a, &previous_actions[i]);
  }
  ~FaultGuard() {
    for (int i = 0; i < 3; ++i) sigaction(kFaults[i], &previous_actions[i], nullptr);
    faulting = nullptr;
    sigaltstack(&previous_stack, nullptr);
  }
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;
};
#else
struct FaultGuard {  // AddressSanitizer reports faults itself, with more detail
  explicit FaultGuard(Emulator&) {}
};
#endif

// ------------------------------------------------------------------------------------------------ a launch
std::string where(const Fiber& f) { return std::string(short_name(f.file)) + ":" + std::to_string(f.line); }

std::string deadlock(Emulator& e) {
  const Fiber* block = nullptr;
  const Fiber* warp = nullptr;
  unsigned at_warp = 0;
  for (unsigned i = 0; i < e.threads; ++i) {
    const Fiber* f = e.fibers[i];
    if (f->state == State::kAtBlock && !block) block = f;
    if (f->state == State::kAtWarp) {
      if (!warp) warp = f;
      ++at_warp;
    }
  }
  std::string s = "deadlock:";
  if (block) s += " " + std::to_string(e.at_block) + " threads wait at the __syncthreads of " + where(*block);
  if (block && warp) s += " and";
  if (warp) s += " " + std::to_string(at_warp) + " at the warp operation of " + where(*warp);
  s += ", of " + std::to_string(e.threads) + " threads, " + std::to_string(e.alive) + " still running";
  return s;
}

void run_block(Emulator& e) {
  e.alive = e.threads;
  e.at_block = 0;
  e.head = e.queued = 0;
  const unsigned warps = (e.threads + QRT_WARP - 1) / QRT_WARP;
  if (e.warps.size() < warps) e.warps.resize(warps);
  for (unsigned i = 0; i < warps; ++i) {
    Warp& w = e.warps[i];
    w.arrived = w.phase = 0;
    w.lanes = w.alive = e.threads - i * QRT_WARP < QRT_WARP ? e.threads - i * QRT_WARP : QRT_WARP;
  }
  in_order(e, 0, e.threads, [&](unsigned i) { push_ready(e, i); });
  while (e.alive) {
    Fiber* next = take_next(e);
    if (next == &e.scheduler) {
      e.error = deadlock(e);
      return;
    }
    jump(e, &e.scheduler, next);
    if (!e.error.empty()) return;
  }
}

// Why this launch cannot be, or "".
std::string check_geometry(const Emulator& e, const Kernel& k, const uint3& grid, unsigned block, size_t dynamic) {
  if (!k.bound) return "its QRT_KERNEL bound is not a literal multiple of 32 up to 1024";
  const struct {
    const char* what;
    uint64_t value, most;
  } limits[] = {{"grid x", grid.x, 2147483647u}, {"grid y", grid.y, 65535u}, {"grid z", grid.z, 65535u},
                {"block size", block, kMaxBlock}};
  for (const auto& l : limits) {
    if (l.value < 1 || l.value > l.most) {
      return std::string(l.what) + " " + std::to_string(l.value) + " is not in 1 .. " + std::to_string(l.most);
    }
  }
  if (block > k.bound) {
    return "block of " + std::to_string(block) + " threads exceeds its launch bound of " + std::to_string(k.bound);
  }
  if (dynamic > e.max_dynamic) {
    return std::to_string(dynamic) + " bytes of dynamic shared memory exceed the limit of " +
           std::to_string(e.max_dynamic);
  }
  return "";
}

bool make_fibers(Emulator& e, unsigned count) {
  while (e.fibers.size() < count) {
    auto* f = new Fiber();
    f->index = static_cast<unsigned>(e.fibers.size());
    if (!prepare(*f)) {
      delete f;
      return false;
    }
    e.fibers.push_back(f);
  }
  return true;
}

// After an abandoned block: fibers that stopped inside the kernel start it anew.
void remake_fibers(Emulator& e) {
  for (Fiber* f : e.fibers) {
    if (f->state != State::kDone) prepare(*f);  // has its stack already: cannot fail
  }
}

void run_blocks(Emulator& e, Kernel& k, const uint3& grid, size_t dynamic) {
  StaticShared statics(k);
  if (!statics.found()) {
    e.error = "the emulator library's thread-local segment was not found";
    return;
  }
  FaultGuard guard(e);
#if !defined(QRT_EMU_ASAN)
  if (sigsetjmp(e.fault_jump, 0)) {
    e.in_fiber = false;
    e.error += place(e);
    return;
  }
#endif
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        now.block = {x, y, z};
        std::memset(now.dynamic - kFrontGuard, kPoison, kFrontGuard + ((dynamic + 15) & ~size_t{15}));
        statics.begin_block();
        run_block(e);
        if (e.error.empty()) e.error = check_guards(e);
        if (!e.error.empty()) return;
        statics.end_block(x + 1 == grid.x && y + 1 == grid.y && z + 1 == grid.z);
      }
    }
  }
}

void launch(Emulator& e, Kernel& k, const uint3& grid, unsigned block, size_t dynamic, void** args) {
  e.error = check_geometry(e, k, grid, block, dynamic);
  if (!e.error.empty()) return;
  if (!set_dynamic(e, dynamic) || !make_fibers(e, block)) {
    e.error = "the host has no memory left for the emulated block";
    return;
  }
  e.kernel = &k;
  e.args = args;
  e.threads = block;
  e.random = e.seed * 0x9e3779b97f4a7c15ull | 1;
  now.block_dim = {block, 1, 1};
  now.grid_dim = grid;
  run_blocks(e, k, grid, dynamic);
  if (!e.error.empty()) remake_fibers(e);
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  abandon(emu(), text);
}

void block_sync(const char* file, int line) {
  Emulator& e = emu();
  if (e.alive != e.threads) {
    fail("__syncthreads at %s:%d after %u of %u threads left the kernel", short_name(file), line, e.threads - e.alive,
         e.threads);
  }
  if (!e.at_block) {
    e.barrier_file = file;
    e.barrier_line = line;
  } else if (e.barrier_line != line || std::strcmp(e.barrier_file, file) != 0) {
    fail("divergent __syncthreads: %s:%d and %s:%d", short_name(e.barrier_file), e.barrier_line, short_name(file),
         line);
  }
  if (++e.at_block == e.threads) {
    release_block(e);
    return;
  }
  wait(e, State::kAtBlock, file, line);
}

void warp_barrier(const char* file, int line) { meet_warp(emu(), 0, file, line); }

const uint64_t* exchange(uint64_t value, int kind, int* lanes, const char* file, int line) {
  Emulator& e = emu();
  Warp& w = e.warps[e.current->index / QRT_WARP];
  uint64_t* slot = w.slot[w.phase & 1];  // the next exchange uses the other, while lanes may still read this one
  slot[e.current->index % QRT_WARP] = value;
  *lanes = static_cast<int>(w.lanes);
  meet_warp(e, kind, file, line);
  return slot;
}

void* warp_scratch(size_t bytes) {
  Emulator& e = emu();
  Warp& w = e.warps[e.current->index / QRT_WARP];
  if (w.lanes != QRT_WARP) fail("a matrix operation in a warp of %u lanes", w.lanes);
  if (w.scratch.size() * 8 < bytes) w.scratch.resize((bytes + 7) / 8);
  return w.scratch.data();
}

void cp_async16(void* shared, const void* global, bool valid) {
  Emulator& e = emu();
  check_aligned(shared, 16);
  if (valid) check_aligned(global, 16);
  Copy c{shared, {}};
  if (valid) std::memcpy(c.bytes, global, 16);
  if (e.order == 1 || (e.order == 2 && (next_random(e) & 1))) std::memcpy(shared, c.bytes, 16);
  e.current->copies.push_back(c);
  ++e.current->open_copies;
}

void cp_async_commit() {
  Fiber& f = *emu().current;
  f.groups.push_back(f.open_copies);
  f.open_copies = 0;
}

void cp_async_wait(int pending) {
  Fiber& f = *emu().current;
  while (f.groups.size() > static_cast<size_t>(pending)) {
    land(f, f.groups.front());
    f.groups.erase(f.groups.begin());
  }
}

uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto part = [shift](uint32_t w) {
      return static_cast<double>(half_to_float(static_cast<uint16_t>(w >> shift)));
    };
    // Exact in double but for bits far below the result; to float by rounding to odd, so that half rounds once.
    const double exact = part(a) * part(b) + part(c);
    float f = static_cast<float>(exact);
    if (static_cast<double>(f) != exact && f == f && !(bits_of(f) & 1u)) {
      const bool away = (static_cast<double>(f) > exact) == (exact > 0);
      f = float_of(away ? bits_of(f) - 1u : bits_of(f) | 1u);
    }
    result |= static_cast<uint32_t>(float_to_half(f)) << shift;
  }
  return result;
}

// Launch bounds come from the section each kernel was placed in (QRT_KERNEL).
#define QRT_BOUNDS(X)                                                                                              \
  X(32) X(64) X(96) X(128) X(160) X(192) X(224) X(256) X(288) X(320) X(352) X(384) X(416) X(448) X(480) X(512)   \
  X(544) X(576) X(608) X(640) X(672) X(704) X(736) X(768) X(800) X(832) X(864) X(896) X(928) X(960) X(992) X(1024)
#define QRT_DECLARE(n)                                                              \
  extern "C" QRT_HIDDEN __attribute__((weak)) const char __start_qrt_bound_##n[];   \
  extern "C" QRT_HIDDEN __attribute__((weak)) const char __stop_qrt_bound_##n[];
QRT_BOUNDS(QRT_DECLARE)

namespace {
unsigned launch_bound(void (*kernel)()) {
  const char* p = reinterpret_cast<const char*>(kernel);
#define QRT_TEST(n) \
  if (__start_qrt_bound_##n && p >= __start_qrt_bound_##n && p < __stop_qrt_bound_##n) return n;
  QRT_BOUNDS(QRT_TEST)
  return 0;
}
}  // namespace

void Registration::add(const char* name, void (*kernel)(), const char* signature, Invoke invoke) {
  Kernel k;
  k.name = name;
  k.signature = signature;
  k.function = kernel;
  k.invoke = invoke;
  k.bound = launch_bound(kernel);
  emu().kernels.push_back(k);
}

}  // namespace emu
}  // namespace qrt

extern "C" {
using qrt::emu::emu;

int qrt_emu_version() { return qrt::emu::kInterfaceVersion; }
int qrt_emu_warp() { return QRT_WARP; }
int qrt_emu_count() { return static_cast<int>(emu().kernels.size()); }
const char* qrt_emu_name(int i) {
  return i >= 0 && i < qrt_emu_count() ? emu().kernels[static_cast<size_t>(i)].name.c_str() : nullptr;
}
const char* qrt_emu_signature(int i) {
  return i >= 0 && i < qrt_emu_count() ? emu().kernels[static_cast<size_t>(i)].signature.c_str() : nullptr;
}
int qrt_emu_bound(int i) {
  return i >= 0 && i < qrt_emu_count() ? static_cast<int>(emu().kernels[static_cast<size_t>(i)].bound) : 0;
}
int qrt_emu_find(const char* name) {
  for (int i = 0; i < qrt_emu_count(); ++i) {
    if (emu().kernels[static_cast<size_t>(i)].name == name) return i;
  }
  return -1;
}
void qrt_emu_configure(int order, uint64_t seed, size_t max_dynamic_shared) {
  auto& e = emu();
  const std::lock_guard<std::mutex> lock(e.mutex);
  e.order = order;
  e.seed = seed ? seed : 1;
  e.max_dynamic = max_dynamic_shared ? max_dynamic_shared : qrt::emu::kDefaultDynamicShared;
}
const char* qrt_emu_error() { return emu().error.c_str(); }
uint64_t qrt_emu_switches() { return emu().switches; }

int qrt_emu_launch(int i, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block, size_t dynamic_shared,
                   void** args) {
  auto& e = emu();
  const std::lock_guard<std::mutex> lock(e.mutex);
  if (i < 0 || i >= qrt_emu_count()) {
    e.error = "no kernel of index " + std::to_string(i);
    return 1;
  }
  auto& kernel = e.kernels[static_cast<size_t>(i)];
  qrt::emu::launch(e, kernel, {grid_x, grid_y, grid_z}, block, dynamic_shared, args);
  if (e.error.empty()) return 0;
  e.error = kernel.name + ": " + e.error;
  return 1;
}
}
