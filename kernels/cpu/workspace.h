// Scratch memory of the CPU backend's ops, reused from op to op. It grows when an op is larger than
// any before it and never shrinks, so a step of a size seen before allocates nothing.
// An op asks for what it needs before it runs in parallel; each thread then has its own part.
#ifndef MOBI_KERNELS_CPU_WORKSPACE_H_
#define MOBI_KERNELS_CPU_WORKSPACE_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "hwy/aligned_allocator.h"

namespace mobi::cpu {

class Workspace {
 public:
  explicit Workspace(int num_threads) : of_thread_(num_threads) {}

  // Shared areas of at least `count` floats, contents undefined. A matmul keeps its inputs in
  // `inputs`, an op that calls a matmul its own intermediate results in `results`.
  float* inputs(size_t count) { return inputs_.Get(count); }
  float* results(size_t count) { return results_.Get(count); }
  int32_t* indices(size_t count) {
    if (indices_.size() < count) indices_.resize(count);
    return indices_.data();
  }

  // Room for `count` floats of every thread.
  void ReservePerThread(size_t count) {
    for (Area& area : of_thread_) area.Get(count);
  }
  float* of_thread(int thread) const { return of_thread_[thread].data.get(); }

 private:
  struct Area {
    float* Get(size_t count) {
      if (count > size) {
        data = hwy::AllocateAligned<float>(count);
        size = count;
      }
      return data.get();
    }
    hwy::AlignedFreeUniquePtr<float[]> data;
    size_t size = 0;
  };

  Area inputs_, results_;
  std::vector<int32_t> indices_;
  std::vector<Area> of_thread_;
};

}  // namespace mobi::cpu

#endif  // MOBI_KERNELS_CPU_WORKSPACE_H_
