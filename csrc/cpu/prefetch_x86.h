// Asking for memory ahead of its use. asm, because GCC (12) takes a function that does nothing but prefetch for one that
// does nothing, and drops calls of it that it does not inline.
#pragma once

namespace qwen_rt {

static inline void prefetch_l1(const void* p) { __asm__ volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p))); }
static inline void prefetch_l2(const void* p) { __asm__ volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p))); }
// What is read once: past the caches.
static inline void prefetch_once(const void* p) { __asm__ volatile("prefetchnta %0" : : "m"(*static_cast<const char*>(p))); }

}  // namespace qwen_rt
