// How the CUDA ops are launched: stream, device limits and scratch memory in one place. Each launch
// returns its error; CudaBackend makes the first one sticky. Host code only, one thread.
// With dependent_launch a kernel may start while the one before it still runs; every kernel of ours
// therefore calls WaitForPrevious() (device.cuh) before it touches anything but weights and what
// was there before the step's first kernel.
#ifndef MOBI_KERNELS_CUDA_LAUNCH_H_
#define MOBI_KERNELS_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace mobi::cuda {

struct LaunchContext {
  cudaStream_t stream = nullptr;
  int num_sms = 0;
  // Programmatic dependent launch and clusters: compute capability 9.0 and newer.
  bool dependent_launch = false;
  bool clusters = false;
  bool wgmma = false;  // compute capability 9.0 alone
  // Scratch of one op; the next op overwrites it.
  std::byte* scratch = nullptr;
  size_t scratch_bytes = 0;
  // All zero between ops: an op that counts up resets what it used.
  uint32_t* counters = nullptr;
  int num_counters = 0;
};

// cluster_size 0: no clusters.
template <typename... Params, typename... Args>
cudaError_t LaunchClusters(const LaunchContext& context, uint32_t cluster_size,
                           void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                           Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
    // As the matmuls divide a multiprocessor: another division would have to wait for their end.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (context.dependent_launch) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster_size > 0) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {cluster_size, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = context.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

template <typename... Params, typename... Args>
cudaError_t Launch(const LaunchContext& context, void (*kernel)(Params...), dim3 grid, dim3 block,
                   size_t shared_bytes, Args&&... args) {
  return LaunchClusters(context, 0, kernel, grid, block, shared_bytes, std::forward<Args>(args)...);
}

constexpr uint32_t CeilDiv(int64_t a, int64_t b) { return static_cast<uint32_t>((a + b - 1) / b); }

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_LAUNCH_H_
