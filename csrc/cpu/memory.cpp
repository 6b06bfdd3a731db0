#include "memory.h"

#include <sys/mman.h>

#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace qwen_rt {
namespace {

constexpr int64_t kMostKept = 256 << 20;  // bytes of buffers that wait to be used again

struct Kept {
  std::mutex mutex;
  std::vector<std::pair<int64_t, Memory>> free;  // capacities first
  int64_t bytes = 0;
};

Kept& kept() {
  static Kept* all = new Kept;  // outlives the interpreter, whose last tensors may go late
  return *all;
}

}  // namespace

Memory allocate(int64_t bytes) {
  const int64_t size = allocated(bytes);
  Memory p(static_cast<uint8_t*>(std::aligned_alloc(bytes < kHugePage ? 64 : kHugePage, size)));
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugePage) madvise(p.get(), size, MADV_HUGEPAGE);
#endif
  return p;
}

Buffer::Buffer(int64_t bytes) : size_(bytes), capacity_(allocated(bytes)) {
  Kept& all = kept();
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    auto best = all.free.end();
    for (auto it = all.free.begin(); it != all.free.end(); ++it) {
      if (it->first >= bytes && it->first <= 2 * capacity_ && (best == all.free.end() || it->first < best->first)) best = it;
    }
    if (best != all.free.end()) {
      capacity_ = best->first;
      memory_ = std::move(best->second);
      all.bytes -= capacity_;
      all.free.erase(best);
      return;
    }
  }
  memory_ = allocate(bytes);
}

Buffer::~Buffer() {
  Kept& all = kept();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (all.bytes + capacity_ > kMostKept) return;
  all.bytes += capacity_;
  all.free.emplace_back(capacity_, std::move(memory_));
}

}  // namespace qwen_rt
