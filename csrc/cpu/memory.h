// Memory of weights, of scratch and of results.
//
// Pieces of 2 MB and more lie on huge pages where the system has them. From pages of 4 KB a weight streams at half the
// speed (the hardware's prefetching stops at each page's end), and what a prompt computes, on pages that are new each
// time, takes 4% longer.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace qwen_rt {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<uint8_t[], Free>;

constexpr int64_t kHugePage = 2 << 20;

// Bytes that allocate() takes for so many: whole cache lines, from kHugePage on whole huge pages.
constexpr int64_t allocated(int64_t bytes) {
  const int64_t unit = bytes < kHugePage ? 64 : kHugePage;
  return (bytes + unit - 1) / unit * unit;
}

// Aligned to a cache line at least. std::bad_alloc when there is none.
Memory allocate(int64_t bytes);

// Room that grows and stays; what it held is lost when it grows.
template <class T>
class Scratch {
 public:
  T* room(int64_t n) {
    if (n > size_) {
      memory_.reset();
      size_ = 0;
      memory_ = allocate(n * static_cast<int64_t>(sizeof(T)));
      size_ = n;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  Memory memory_;
  int64_t size_ = 0;
};

// Memory of a result: of one that is gone if there is such, which the caches may still hold.
class Buffer {
 public:
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint8_t* data() { return memory_.get(); }
  int64_t size() const { return size_; }

 private:
  Memory memory_;
  const int64_t size_;
  int64_t capacity_;
};

}  // namespace qwen_rt
