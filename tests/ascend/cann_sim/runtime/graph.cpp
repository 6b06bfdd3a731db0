// Graph capture (aclmdlRI), replay and task update.
#include <cstdio>
#include <utility>

#include "runtime.h"
#include "acl/acl_mdl.h"
#include "acl/acl_rt.h"

namespace cannsim {
namespace {

// Never destroyed: workers may still run when the process ends.
std::mutex& g_mutex = *new std::mutex;
auto& g_graphs = *new std::map<aclmdlRI, std::shared_ptr<Graph>>;
auto& g_groups = *new std::map<aclrtTaskGrp, std::unique_ptr<TaskGroup>>;
std::atomic<uint32_t> g_graph_ids{1};
thread_local aclmdlRICaptureMode t_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

std::shared_ptr<Graph> graph_of(aclmdlRI handle) {
  std::lock_guard<std::mutex> lock(g_mutex);
  auto it = g_graphs.find(handle);
  if (it == g_graphs.end()) throw Refused(ACL_ERROR_RT_PARAM_INVALID, "a graph was used after its destruction");
  return it->second;
}

int run(const std::shared_ptr<Graph>& graph) {
  // Each node is fetched when its turn comes: a task update may replace it while the replay waits for its event.
  for (size_t i = 0; i < graph->nodes.size(); ++i) {
    Node node;
    {
      std::lock_guard<std::mutex> lock(graph->mutex);
      node = graph->nodes[i];
    }
    trace("graph %u replays %s", graph->id, node.name.c_str());
    if (const int status = (*node.work)()) return status;
  }
  return ACL_SUCCESS;
}

Stream* capturing(aclrtStream handle, const char* who) {
  Stream* stream = stream_of(handle);
  if (!stream->capture) throw Refused(ACL_ERROR_RT_PARAM_INVALID, std::string(who) + ": the stream is not capturing");
  return stream;
}

}  // namespace
}  // namespace cannsim

using namespace cannsim;

CANNSIM_API aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  std::swap(*mode, t_mode);
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode) {
  return guarded([&] {
    Stream* stream = stream_of(handle);
    if (stream->capture) throw Refused(ACL_ERROR_RT_PARAM_INVALID, "aclmdlRICaptureBegin: already capturing");
    auto graph = std::make_shared<Graph>();
    graph->id = g_graph_ids++;
    graph->members.insert(stream);
    stream->capture = graph;
    trace("capture begins: graph %u", graph->id);
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI* out) {
  return guarded([&] {
    auto graph = capturing(handle, "aclmdlRICaptureEnd")->capture;
    for (Stream* member : graph->members) member->capture = nullptr;
    graph->members.clear();
    if (!graph->invalid.empty()) throw Refused(kStreamCaptured, "the capture is invalid: " + graph->invalid);
    std::lock_guard<std::mutex> lock(g_mutex);
    *out = graph.get();
    g_graphs[*out] = graph;
    trace("capture ends: graph %u, %zu nodes", graph->id, graph->nodes.size());
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus* status, aclmdlRI* out) {
  return guarded([&] {
    auto graph = stream_of(handle)->capture;
    *status = !graph                   ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
              : graph->invalid.empty() ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE
                                       : ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED;
    if (out) *out = graph.get();
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclmdlRIGetId(aclmdlRI handle, uint32_t* id) {
  *id = static_cast<Graph*>(handle)->id;  // also asked for while the graph is still being captured
  return ACL_SUCCESS;
}
CANNSIM_API aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream stream) {
  return guarded([&] {
    auto graph = graph_of(handle);
    return submit(stream, "graph " + std::to_string(graph->id), [graph] { return run(graph); });
  });
}
CANNSIM_API aclError aclmdlRIExecute(aclmdlRI handle, int32_t) {
  if (const int status = aclmdlRIExecuteAsync(handle, nullptr)) return status;
  return aclrtSynchronizeStream(nullptr);
}
CANNSIM_API aclError aclmdlRIDestroy(aclmdlRI handle) {
  std::lock_guard<std::mutex> lock(g_mutex);  // queued replays keep their own reference
  return g_graphs.erase(handle) ? ACL_SUCCESS : report(ACL_ERROR_RT_PARAM_INVALID, "aclmdlRIDestroy: no such graph");
}
CANNSIM_API aclError aclmdlRIDebugPrint(aclmdlRI handle) {
  return guarded([&] {
    for (const Node& node : graph_of(handle)->nodes) printf("%s\n", node.name.c_str());
    return ACL_SUCCESS;
  });
}

// --- task groups: captured operators whose host-side arguments (attention's lengths) change from replay to replay

CANNSIM_API aclError aclmdlRICaptureTaskGrpBegin(aclrtStream handle) {
  return guarded([&] {
    Stream* stream = capturing(handle, "aclmdlRICaptureTaskGrpBegin");
    stream->group_begin = stream->capture->nodes.size();
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclmdlRICaptureTaskGrpEnd(aclrtStream handle, aclrtTaskGrp* out) {
  return guarded([&] {
    Stream* stream = capturing(handle, "aclmdlRICaptureTaskGrpEnd");
    auto group = std::make_unique<TaskGroup>();
    *group = {stream->capture, stream->group_begin, stream->capture->nodes.size()};
    std::lock_guard<std::mutex> lock(g_mutex);
    *out = group.get();
    g_groups[*out] = std::move(group);
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp group) {
  return guarded([&] {
    Stream* stream = stream_of(handle);
    std::lock_guard<std::mutex> lock(g_mutex);
    auto it = g_groups.find(group);
    if (it == g_groups.end()) throw Refused(ACL_ERROR_RT_PARAM_INVALID, "task update: no such task group");
    stream->update = it->second.get();
    stream->update_next = it->second->begin;
    return ACL_SUCCESS;
  });
}
CANNSIM_API aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream handle) {
  return guarded([&] {
    Stream* stream = stream_of(handle);
    const TaskGroup* group = std::exchange(stream->update, nullptr);
    if (!group) throw Refused(ACL_ERROR_RT_PARAM_INVALID, "task update: ended before it began");
    if (stream->update_next != group->end)
      throw Refused(ACL_ERROR_RT_PARAM_INVALID, "task update: " + std::to_string(stream->update_next - group->begin) +
                                                    " tasks for a group of " +
                                                    std::to_string(group->end - group->begin));
    return ACL_SUCCESS;
  });
}
