// Internal to libascendcl.so.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cannsim.h"

namespace cannsim {

// --- devices (device.cpp)
int device_count();
int current_device();                     // of this host thread; 0 until set
extern thread_local int t_worker_device;  // the device whose stream this thread works for, -1 on host threads

// --- memory (memory.cpp)
enum class Place { kDevice, kHost, kPageable };
Place place_of(const void* address);
// Host-visible addresses for a copy or a fill: device addresses are translated, host ones passed through.
void* copy_address(const void* address, size_t bytes, Place expected, const std::string& who);

// --- graphs (graph.cpp)
struct Node {
  std::string name;
  std::shared_ptr<Work> work;
};

struct Stream;

// A captured graph: its nodes in capture order, which is an order that every dependency allows.
struct Graph {
  uint32_t id = 0;
  std::mutex mutex;
  std::vector<Node> nodes;
  std::set<Stream*> members;  // streams capturing into it
  std::string invalid;        // why the capture failed, empty if it has not
};

// A run of nodes whose arguments a later task update replaces one by one.
struct TaskGroup {
  std::shared_ptr<Graph> graph;
  size_t begin, end;
};

// --- streams and events (stream.cpp)
struct Stream {
  uint32_t id = 0;
  int device = 0;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Node> queue;
  bool busy = false, stop = false;
  int error = 0;  // first failure since the last synchronisation
  std::thread worker;
  std::shared_ptr<Graph> capture;
  size_t group_begin = 0;
  const TaskGroup* update = nullptr;
  size_t update_next = 0;

  void loop();
  void push(Node node);
  void drain();
};

Stream* stream_of(aclrtStream handle);  // nullptr: the current device's default stream; throws Refused when destroyed
int synchronize(Stream* stream);

// Seconds a worker waits for an event or a value before it reports a deadlock (CANNSIM_WAIT_TIMEOUT_S).
double wait_timeout();

// Runs `body`, turning Refused into a reported status.
template <class Body>
int guarded(Body body) {
  try {
    return body();
  } catch (const Refused& e) {
    return report(e.code, e.what());
  } catch (const std::exception& e) {
    return report(ACL_ERROR_FAILURE, e.what());
  }
}

}  // namespace cannsim
