// Scratch memory of the CPU backend's ops, reused from op to op. It grows when an op is larger than
// any before it and never shrinks, so a step of a size seen before allocates nothing.
// Reserve is called by the op before it runs in parallel; each thread then has its own part.
#ifndef MOBI_KERNELS_CPU_WORKSPACE_H_
#define MOBI_KERNELS_CPU_WORKSPACE_H_

#include <cstddef>
#include <vector>

#include "hwy/aligned_allocator.h"

namespace mobi::cpu {

class Workspace {
 public:
  explicit Workspace(int num_threads) : of_thread_(num_threads) {}

  // Room for `shared` floats seen by all threads and `per_thread` by each. Contents are undefined.
  void Reserve(size_t shared, size_t per_thread) {
    shared_.Grow(shared);
    for (Area& area : of_thread_) area.Grow(per_thread);
  }
  float* shared() const { return shared_.data.get(); }
  float* of_thread(int thread) const { return of_thread_[thread].data.get(); }

 private:
  struct Area {
    void Grow(size_t count) {
      if (count <= size) return;
      data = hwy::AllocateAligned<float>(count);
      size = count;
    }
    hwy::AlignedFreeUniquePtr<float[]> data;
    size_t size = 0;
  };

  Area shared_;
  std::vector<Area> of_thread_;
};

}  // namespace mobi::cpu

#endif  // MOBI_KERNELS_CPU_WORKSPACE_H_
