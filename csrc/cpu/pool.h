// A persistent pool of threads: workers spin briefly for the next job, then sleep.
//
// Jobs are sets of numbered tasks taken one by one, so a slow core simply takes fewer. A worker that wakes too late
// for a job does not delay it. Tasks must not throw. A parallel_for inside a task runs inline.
#pragma once

#include <cstdint>
#include <type_traits>

namespace qwen_rt {

// Threads that serve parallel_for, the caller included. Started at the first use.
int num_threads();
// 1 .. 1024; takes effect at the next parallel_for.
void set_num_threads(int n);

// Off: whoever waits for a job, or for its end, lets others run. For when there are others, and jobs are long.
void set_spinning(bool on);

using TaskFn = void (*)(const void* ctx, int64_t task, int thread);
void run_tasks(int64_t tasks, TaskFn fn, const void* ctx);

// fn(task) or fn(task, thread) for each task in [0, tasks); thread in [0, num_threads()).
template <class F>
void parallel_for(int64_t tasks, const F& fn) {
  run_tasks(
      tasks,
      [](const void* ctx, int64_t task, int thread) {
        const F& f = *static_cast<const F*>(ctx);
        if constexpr (std::is_invocable_v<const F&, int64_t, int>) {
          f(task, thread);
        } else {
          f(task);
        }
      },
      &fn);
}

}  // namespace qwen_rt
