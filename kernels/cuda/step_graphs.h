// Records of decode steps as CUDA graphs, by key: the first run of a key is plain (it also loads
// kernels), the second is captured, later ones replay. The least recently used record goes when
// there are too many. One thread.
#ifndef MOBI_KERNELS_CUDA_STEP_GRAPHS_H_
#define MOBI_KERNELS_CUDA_STEP_GRAPHS_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/backend.h"

namespace mobi::cuda {

class StepGraphs {
 public:
  StepGraphs() = default;
  ~StepGraphs();
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;

  // Enqueues the step, by calling `body` or by replaying it.
  cudaError_t Run(const StepKey& key, cudaStream_t stream, absl::FunctionRef<void()> body);
  bool capturing() const { return capturing_; }
  // Forgets all records, of which none may still run: when memory goes, they may have pointers to
  // it, and what comes next may have equal keys.
  void Clear();

 private:
  static constexpr size_t kMaxGraphs = 64;

  struct Entry {
    StepKey key;
    cudaGraphExec_t exec = nullptr;
    uint64_t last_use = 0;
  };

  cudaError_t Capture(cudaStream_t stream, absl::FunctionRef<void()> body, Entry& entry);
  void Evict(cudaStream_t stream);

  std::vector<Entry> entries_;
  uint64_t uses_ = 0;
  bool capturing_ = false;
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_STEP_GRAPHS_H_
