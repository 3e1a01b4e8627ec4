// A 4 x 4 transposition of words among lanes.
#ifndef MOBI_KERNELS_CUDA_TRANSPOSE_CUH_
#define MOBI_KERNELS_CUDA_TRANSPOSE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace mobi::cuda {

// words[i] of lane t of four, kApart lanes apart -> words[t] of lane i. By the lanes of `mask`.
template <int kApart>
__device__ __forceinline__ void TransposeWords(uint4& v, int t, uint32_t mask = ~0u) {
  const auto exchange = [=](uint32_t& low, uint32_t& high, int bit) {
    const uint32_t got = __shfl_xor_sync(mask, t & bit ? low : high, kApart * bit);
    (t & bit ? low : high) = got;
  };
  exchange(v.x, v.y, 1);
  exchange(v.z, v.w, 1);
  exchange(v.x, v.z, 2);
  exchange(v.y, v.w, 2);
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_TRANSPOSE_CUH_
