#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define QWEN_RT_PAUSE() _mm_pause()
#else
#define QWEN_RT_PAUSE() std::atomic_signal_fence(std::memory_order_seq_cst)
#endif

namespace qwen_rt {
namespace {

constexpr uint32_t kClosed = 1u << 31;
constexpr int kSpins = 20000;  // about 0.2-0.5 ms: longer than the gaps between a step's kernels

std::atomic<int> spins_allowed{kSpins};

thread_local bool inside_task = false;

class Pool {
 public:
  explicit Pool(int n) : size_(n) {
    for (int i = 1; i < n; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      stop_.store(true);
      epoch_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& t : workers_) t.join();
  }

  // In a forked child the threads do not exist any more: drop the handles without joining.
  void abandon() {
    for (auto& t : workers_) t.detach();
    workers_.clear();
  }

  int size() const { return size_; }

  void run(int64_t tasks, TaskFn fn, const void* ctx) {
    fn_ = fn;
    ctx_ = ctx;
    total_ = tasks;
    next_.store(0, std::memory_order_relaxed);
    state_.fetch_and(~kClosed, std::memory_order_acq_rel);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      { std::lock_guard<std::mutex> lock(sleep_mutex_); }
      wake_.notify_all();
    }
    drain(0);
    state_.fetch_or(kClosed, std::memory_order_acq_rel);
    for (int spins = 0; (state_.load(std::memory_order_acquire) & ~kClosed) != 0; ++spins) {
      if (spins < spins_allowed.load(std::memory_order_relaxed)) {
        QWEN_RT_PAUSE();
      } else {
        sched_yield();
      }
    }
  }

 private:
  void drain(int thread) {
    inside_task = true;
    for (;;) {
      int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= total_) break;
      fn_(ctx_, task, thread);
    }
    inside_task = false;
  }

  void work(int thread) {
    uint64_t seen = 0;
    for (;;) {
      for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen; ++spins) {
        if (spins < spins_allowed.load(std::memory_order_relaxed)) {
          QWEN_RT_PAUSE();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_seq_cst) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_.load()) return;
      uint32_t before = state_.fetch_add(1, std::memory_order_acq_rel);
      if ((before & kClosed) == 0) drain(thread);
      state_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  const int size_;
  std::vector<std::thread> workers_;
  TaskFn fn_ = nullptr;
  const void* ctx_ = nullptr;
  int64_t total_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> state_{kClosed};  // high bit: closed; low bits: workers inside
  alignas(64) std::atomic<uint64_t> epoch_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

std::mutex pool_mutex;  // one job at a time, from whichever thread
Pool* pool = nullptr;   // never freed at exit: workers may be asleep in it
std::atomic<int> wanted_threads{1};

void before_fork() { pool_mutex.lock(); }
void after_fork_parent() { pool_mutex.unlock(); }
void after_fork_child() {
  // The old pool's memory is leaked on purpose: its mutexes may be held by threads that no longer exist.
  if (pool) pool->abandon();
  pool = nullptr;
  pool_mutex.unlock();
}

}  // namespace

void set_spinning(bool on) { spins_allowed.store(on ? kSpins : 0); }

int num_threads() { return wanted_threads.load(); }

void set_num_threads(int n) { wanted_threads.store(n < 1 ? 1 : n > 1024 ? 1024 : n); }

void run_tasks(int64_t tasks, TaskFn fn, const void* ctx) {
  if (tasks <= 0) return;
  if (tasks == 1 || inside_task || num_threads() == 1) {
    for (int64_t i = 0; i < tasks; ++i) fn(ctx, i, 0);
    return;
  }
  std::lock_guard<std::mutex> lock(pool_mutex);
  const int n = num_threads();
  if (!pool || pool->size() != n) {
    static const int registered = pthread_atfork(before_fork, after_fork_parent, after_fork_child);
    (void)registered;
    delete pool;
    pool = new Pool(n);
  }
  pool->run(tasks, fn, ctx);
}

}  // namespace qwen_rt
