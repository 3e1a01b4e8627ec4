#include <algorithm>

#include "kernels/cuda/step_graphs.h"

namespace mobi::cuda {

StepGraphs::~StepGraphs() { Clear(); }

void StepGraphs::Clear() {
  for (const Entry& entry : entries_) {
    if (entry.exec != nullptr) cudaGraphExecDestroy(entry.exec);
  }
  entries_.clear();
}

cudaError_t StepGraphs::Run(const StepKey& key, cudaStream_t stream,
                            absl::FunctionRef<void()> body) {
  ++uses_;
  auto entry =
      std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.key == key; });
  if (entry == entries_.end()) {
    if (entries_.size() >= kMaxGraphs) Evict(stream);
    entries_.push_back({key, nullptr, uses_});
    body();
    return cudaSuccess;
  }
  entry->last_use = uses_;
  if (entry->exec == nullptr) {
    const cudaError_t error = Capture(stream, body, *entry);
    if (error != cudaSuccess) return error;
  }
  return cudaGraphLaunch(entry->exec, stream);
}

cudaError_t StepGraphs::Capture(cudaStream_t stream, absl::FunctionRef<void()> body, Entry& entry) {
  cudaError_t error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  if (error != cudaSuccess) return error;
  capturing_ = true;
  body();
  capturing_ = false;
  cudaGraph_t graph = nullptr;
  error = cudaStreamEndCapture(stream, &graph);
  if (error != cudaSuccess) return error;
  error = cudaGraphInstantiate(&entry.exec, graph, 0);
  cudaGraphDestroy(graph);
  return error;
}

void StepGraphs::Evict(cudaStream_t stream) {
  const auto oldest =
      std::min_element(entries_.begin(), entries_.end(),
                       [](const Entry& a, const Entry& b) { return a.last_use < b.last_use; });
  if (oldest->exec != nullptr) {
    // An error here belongs to earlier work and stays for Synchronize to report.
    cudaStreamSynchronize(stream);
    cudaGraphExecDestroy(oldest->exec);
  }
  entries_.erase(oldest);
}

}  // namespace mobi::cuda
