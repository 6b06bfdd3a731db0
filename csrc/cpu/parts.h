// Work on several parts, each of some tasks, by all threads at once.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "pool.h"

namespace qwen_rt {

// fn(part, task) for every task in [0, tasks[part]) of every part; false: that part went wrong. The first one that did
// (some of what comes after it is left out then); the number of parts where none did.
template <class F>
int64_t each_part(const std::vector<int64_t>& tasks, const F& fn) {
  std::vector<int64_t> ends;
  for (const int64_t n : tasks) ends.push_back((ends.empty() ? 0 : ends.back()) + n);
  std::atomic<int64_t> bad{static_cast<int64_t>(tasks.size())};
  parallel_for(ends.empty() ? 0 : ends.back(), [&](int64_t at) {
    const int64_t part = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin();
    int64_t first = bad.load();
    if (part >= first || fn(part, at - (part ? ends[part - 1] : 0))) return;
    while (part < first && !bad.compare_exchange_weak(first, part)) {
    }
  });
  return bad.load();
}

}  // namespace qwen_rt
