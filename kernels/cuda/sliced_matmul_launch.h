// What the launches of the sliced matmul's kernels share. Host code.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_LAUNCH_H_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_LAUNCH_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {

constexpr int DivideUp(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Enqueues a kernel without clusters.
template <typename Kernel, typename... Params>
cudaError_t LaunchSliced(const SlicedMatmulLaunch& launch, Kernel* kernel, dim3 blocks, int threads,
                         int shared_bytes, const Params&... params) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = launch.pdl ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_LAUNCH_H_
