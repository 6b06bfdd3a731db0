// Streams (a worker thread each), events, values and callbacks.
#include <cstdlib>
#include <utility>
#include <unistd.h>

#include "runtime.h"
#include "acl/acl_rt.h"

namespace cannsim {
namespace {

struct Event {
  uint32_t flag = 0;
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0, done = 0;  // how often record was called, and has run
  uint64_t microseconds = 0;
  bool set = false;  // external events: recorded and not reset
  std::shared_ptr<Graph> capture;
  bool external() const { return flag & ACL_EVENT_EXTERNAL; }
};

// Never destroyed: workers may still run when the process ends.
std::mutex& g_mutex = *new std::mutex;
auto& g_streams = *new std::map<aclrtStream, std::unique_ptr<Stream>>;
auto& g_default_streams = *new std::map<int, Stream*>;
auto& g_events = *new std::map<aclrtEvent, std::shared_ptr<Event>>;
std::atomic<uint32_t> g_stream_ids{0};

Stream* new_stream(int device) {
  auto owner = std::make_unique<Stream>();
  Stream* stream = owner.get();
  stream->id = g_stream_ids++;
  stream->device = device;
  stream->worker = std::thread([stream] { stream->loop(); });
  g_streams[stream] = std::move(owner);
  return stream;
}

std::shared_ptr<Event> event_of(aclrtEvent handle) {
  std::lock_guard<std::mutex> lock(g_mutex);
  auto it = g_events.find(handle);
  if (it == g_events.end()) throw Refused(ACL_ERROR_RT_PARAM_INVALID, "an event was used after its destruction");
  return it->second;
}

uint64_t now_microseconds() {
  using namespace std::chrono;
  return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

// Waits on a worker thread until `ready`, at most wait_timeout().
template <class Ready>
int wait_until(Event& event, const char* what, Ready ready) {
  std::unique_lock<std::mutex> lock(event.mutex);
  const auto limit = std::chrono::duration<double>(wait_timeout());
  if (event.changed.wait_for(lock, limit, ready)) return ACL_SUCCESS;
  return report(kVectorCoreException, std::string(what) + ": waited " + env("CANNSIM_WAIT_TIMEOUT_S", "60") +
                                          " s for an event that nobody recorded");
}

void mark_done(Event& event, uint64_t record) {
  std::lock_guard<std::mutex> lock(event.mutex);
  event.done = std::max(event.done, record);
  event.set = true;
  event.microseconds = now_microseconds();
  event.changed.notify_all();
}

}  // namespace

double wait_timeout() {
  static const double seconds = atof(env("CANNSIM_WAIT_TIMEOUT_S", "60"));
  return seconds;
}

void Stream::loop() {
  t_worker_device = device;
  const int delay = atoi(env("CANNSIM_DELAY_US", "0"));  // a slow device makes missing synchronisation visible
  std::unique_lock<std::mutex> lock(mutex);
  for (;;) {
    changed.wait(lock, [&] { return stop || !queue.empty(); });
    if (queue.empty()) return;
    Node node = std::move(queue.front());
    queue.pop_front();
    busy = true;
    lock.unlock();
    if (delay) usleep(delay);
    trace("stream %u runs %s", id, node.name.c_str());
    const int status = (*node.work)();
    node = {};  // its closure may own memory: release it before the stream counts as idle
    lock.lock();
    busy = false;
    if (status && !error) error = status;
    changed.notify_all();
  }
}

void Stream::push(Node node) {
  std::lock_guard<std::mutex> lock(mutex);
  queue.push_back(std::move(node));
  changed.notify_all();
}

void Stream::drain() {
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, [&] { return queue.empty() && !busy; });
}

Stream* stream_of(aclrtStream handle) {
  std::lock_guard<std::mutex> lock(g_mutex);
  if (!handle) {
    Stream*& stream = g_default_streams[current_device()];
    if (!stream) stream = new_stream(current_device());
    return stream;
  }
  auto it = g_streams.find(handle);
  if (it == g_streams.end()) throw Refused(ACL_ERROR_RT_PARAM_INVALID, "a stream was used after its destruction");
  return it->second.get();
}

int synchronize(Stream* stream) {
  if (stream->capture) {
    stream->capture->invalid = "a stream was synchronised while capturing";
    return report(kStreamCaptured, stream->capture->invalid);
  }
  stream->drain();
  std::lock_guard<std::mutex> lock(stream->mutex);
  return std::exchange(stream->error, 0);
}

int submit(aclrtStream handle, const std::string& name, Work work) {
  return guarded([&] {
    Stream* stream = stream_of(handle);
    Node node{name, std::make_shared<Work>(std::move(work))};
    if (const TaskGroup* group = stream->update) {
      if (stream->update_next >= group->end)
        throw Refused(ACL_ERROR_RT_PARAM_INVALID, name + ": a task update has more tasks than its group");
      // Takes effect in stream order, so that a replay waiting for the update's event sees it.
      const size_t at = stream->update_next++;
      auto graph = group->graph;
      stream->push({"task_update " + name, std::make_shared<Work>([graph, at, node] {
                      std::lock_guard<std::mutex> lock(graph->mutex);
                      if (graph->nodes[at].name != node.name)
                        return report(ACL_ERROR_RT_PARAM_INVALID, "task update puts " + node.name + " where " +
                                                                      graph->nodes[at].name + " was captured");
                      graph->nodes[at] = node;
                      return static_cast<int>(ACL_SUCCESS);
                    })});
    } else if (stream->capture) {
      trace("capture %s", name.c_str());
      stream->capture->nodes.push_back(std::move(node));
    } else {
      stream->push(std::move(node));
    }
    return ACL_SUCCESS;
  });
}

}  // namespace cannsim

using namespace cannsim;

CANNSIM_API aclError aclrtCreateStreamWithConfig(aclrtStream* out, uint32_t, uint32_t) {
  std::lock_guard<std::mutex> lock(g_mutex);
  *out = new_stream(current_device());
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtCreateStream(aclrtStream* out) { return aclrtCreateStreamWithConfig(out, 0, 0); }
CANNSIM_API aclError aclrtDestroyStream(aclrtStream handle) {
  std::unique_ptr<Stream> stream;
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    auto it = g_streams.find(handle);
    if (it == g_streams.end()) return report(ACL_ERROR_RT_PARAM_INVALID, "aclrtDestroyStream: destroyed before");
    stream = std::move(it->second);
    g_streams.erase(it);
  }
  {
    std::lock_guard<std::mutex> lock(stream->mutex);
    stream->stop = true;
    stream->changed.notify_all();
  }
  stream->worker.join();
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }
CANNSIM_API aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
CANNSIM_API aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue*) {
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtSynchronizeStream(aclrtStream handle) {
  return guarded([&] { return synchronize(stream_of(handle)); });
}
CANNSIM_API aclError aclrtSynchronizeStreamWithTimeout(aclrtStream handle, int32_t) {
  return aclrtSynchronizeStream(handle);
}
CANNSIM_API aclError aclrtSynchronizeDevice() {
  std::vector<Stream*> mine;
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    for (auto& [handle, stream] : g_streams)
      if (stream->device == current_device() && !stream->capture) mine.push_back(stream.get());
  }
  int first = ACL_SUCCESS;
  for (Stream* stream : mine)
    if (const int status = synchronize(stream); status && !first) first = status;
  return first;
}
CANNSIM_API aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }
CANNSIM_API aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
  return guarded([&] {
    Stream* stream = stream_of(handle);
    std::lock_guard<std::mutex> lock(stream->mutex);
    const bool idle = stream->queue.empty() && !stream->busy;
    *status = idle ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclrtStreamGetId(aclrtStream handle, int32_t* id) {
  return guarded([&] {
    *id = stream_of(handle)->id;
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return ACL_SUCCESS; }
CANNSIM_API aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* flag) {
  *flag = 0;
  return ACL_SUCCESS;
}

// --- events

CANNSIM_API aclError aclrtCreateEventExWithFlag(aclrtEvent* out, uint32_t flag) {
  auto event = std::make_shared<Event>();
  event->flag = flag;
  std::lock_guard<std::mutex> lock(g_mutex);
  *out = event.get();
  g_events[*out] = event;
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtCreateEventWithFlag(aclrtEvent* out, uint32_t flag) {
  return aclrtCreateEventExWithFlag(out, flag);
}
CANNSIM_API aclError aclrtDestroyEvent(aclrtEvent handle) {
  std::lock_guard<std::mutex> lock(g_mutex);  // queued work keeps its own reference
  return g_events.erase(handle) ? ACL_SUCCESS : report(ACL_ERROR_RT_PARAM_INVALID, "aclrtDestroyEvent: no such event");
}
CANNSIM_API aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle) {
  return guarded([&] {
    auto event = event_of(handle);
    Stream* stream = stream_of(stream_handle);
    uint64_t record;
    {
      std::lock_guard<std::mutex> lock(event->mutex);
      record = ++event->recorded;
      if (!event->external()) event->capture = stream->capture;
    }
    if (event->capture) {  // inside a capture an event only orders streams, and nodes are in that order already
      mark_done(*event, record);
      return static_cast<int>(ACL_SUCCESS);
    }
    return submit(stream_handle, "event_record", [event, record] {
      mark_done(*event, record);
      return ACL_SUCCESS;
    });
  });
}
CANNSIM_API aclError aclrtStreamWaitEvent(aclrtStream stream_handle, aclrtEvent handle) {
  return guarded([&] {
    auto event = event_of(handle);
    Stream* stream = stream_of(stream_handle);
    if (event->external())  // keeps its state from replay to replay, until reset
      return submit(stream_handle, "external_event_wait",
                    [event] { return wait_until(*event, "external_event_wait", [&] { return event->set; }); });
    if (event->capture) {
      if (stream->capture && stream->capture != event->capture)
        throw Refused(ACL_ERROR_RT_PARAM_INVALID, "aclrtStreamWaitEvent: two captures meet in one event");
      stream->capture = event->capture;  // the waiting stream joins the capture
      event->capture->members.insert(stream);
      return static_cast<int>(ACL_SUCCESS);
    }
    uint64_t record;
    {
      std::lock_guard<std::mutex> lock(event->mutex);
      record = event->recorded;
    }
    return submit(stream_handle, "event_wait",
                  [event, record] { return wait_until(*event, "event_wait", [&] { return event->done >= record; }); });
  });
}
CANNSIM_API aclError aclrtResetEvent(aclrtEvent handle, aclrtStream stream) {
  return guarded([&] {
    auto event = event_of(handle);
    return submit(stream, "event_reset", [event] {
      std::lock_guard<std::mutex> lock(event->mutex);
      event->set = false;
      return ACL_SUCCESS;
    });
  });
}
CANNSIM_API aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  return guarded([&] {
    auto event = event_of(handle);
    const uint64_t record = event->recorded;
    return wait_until(*event, "aclrtSynchronizeEvent", [&] { return event->done >= record; });
  });
}
CANNSIM_API aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  return guarded([&] {
    auto event = event_of(handle);
    std::lock_guard<std::mutex> lock(event->mutex);
    const bool done = event->done >= event->recorded;
    *status = done ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus* status) {
  *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
  return guarded([&] {
    auto a = event_of(start), b = event_of(end);
    *milliseconds =
        static_cast<float>(static_cast<double>(b->microseconds) - static_cast<double>(a->microseconds)) / 1e3f;
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclrtEventGetTimestamp(aclrtEvent handle, uint64_t* microseconds) {
  return guarded([&] {
    *microseconds = event_of(handle)->microseconds;
    return ACL_SUCCESS;
  });
}

// --- values in device memory: torch_npu's ExternalEvent is built on them

CANNSIM_API aclError aclrtValueWrite(void* address, uint64_t value, uint32_t, aclrtStream stream) {
  return submit(stream, "value_write", [=] {
    return guarded([&] {
      auto* p = static_cast<uint64_t*>(resolve(address, sizeof(uint64_t), "aclrtValueWrite"));
      __atomic_store_n(p, value, __ATOMIC_RELEASE);
      return ACL_SUCCESS;
    });
  });
}
CANNSIM_API aclError aclrtValueWait(void* address, uint64_t value, uint32_t, aclrtStream stream) {
  return submit(stream, "value_wait", [=] {
    return guarded([&] {
      auto* p = static_cast<uint64_t*>(resolve(address, sizeof(uint64_t), "aclrtValueWait"));
      const auto limit = std::chrono::steady_clock::now() + std::chrono::duration<double>(wait_timeout());
      while (__atomic_load_n(p, __ATOMIC_ACQUIRE) != value) {
        if (std::chrono::steady_clock::now() > limit)
          throw Refused(kVectorCoreException, "aclrtValueWait: the value was not written in time");
        usleep(20);
      }
      return ACL_SUCCESS;
    });
  });
}

// --- host functions

CANNSIM_API aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* args) {
  return submit(stream, "host_func", [=] {
    function(args);
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclrtLaunchCallback(aclrtCallback function, void* data, aclrtCallbackBlockType,
                                         aclrtStream stream) {
  return submit(stream, "callback", [=] {
    function(data);
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
CANNSIM_API aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
CANNSIM_API aclError aclrtProcessReport(int32_t) {  // callbacks run on the stream's worker: never anything to process
  usleep(1000);
  return ACL_ERROR_RT_THREAD_SUBSCRIBE;
}
