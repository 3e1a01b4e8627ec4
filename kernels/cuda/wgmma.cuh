// What goes round wgmma (compute capability 9.0): fences, waits, and how an operand in shared
// memory is described: K contiguous, 128-byte swizzle. The instructions are in wgmma_registers.cuh.
#ifndef MOBI_KERNELS_CUDA_WGMMA_CUH_
#define MOBI_KERNELS_CUDA_WGMMA_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace mobi::cuda::ptx {

// Orders the registers d between ordinary instructions and wgmma.
__device__ __forceinline__ void WgmmaFence() {
#if MOBI_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void WgmmaCommit() {
#if MOBI_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int pending>
__device__ __forceinline__ void WgmmaWait() {
#if MOBI_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#endif
}

// Describes rows of 64 16-bit elements (128 bytes, swizzled in blocks of 8 rows) at a shared
// address.
__device__ __forceinline__ uint64_t WgmmaOperand(uint32_t shared) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kBlockStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kBlockStride | uint64_t{1} << 16 | (shared & 0x3FFFF) >> 4;
}

// Steps of 16 columns within the 64.
inline constexpr uint64_t kWgmmaStep = 32 >> 4;

}  // namespace mobi::cuda::ptx

#endif  // MOBI_KERNELS_CUDA_WGMMA_CUH_
