// Writes x into the images that the batch path of the sliced matmul reads.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_IMAGE_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_IMAGE_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_batch90_image.h"
#include "kernels/cuda/sliced_matmul_problem.h"
#include "kernels/cuda/sliced_matmul_whole.cuh"

namespace mobi::cuda {

// Where the terms of one of an image's columns are among a group's, such that a lane of the product
// has those of two tiles of four columns in one load.
__device__ __forceinline__ int TermsPlace(int column) {
  const int tile = column / 4;
  return tile / 2 * 8 + column % 4 * 2 + tile % 2;
}

// Where a group of a token is in the images.
struct ImagePlace {
  uint8_t* bytes;
  WholeTerms* terms;
  int column;

  __device__ __forceinline__ ImagePlace(const BatchImages& images, int token, int group)
      : column(token % kImageTokens) {
    const int64_t first = (int64_t{token / kImageTokens} * images.groups + group) * kImageTokens;
    bytes = images.bytes + (first + column) * kImageTokenBytes;
    terms = images.terms + first + TermsPlace(column);
  }

  __device__ __forceinline__ void Advance(int groups) {
    bytes += groups * kImageTokens * kImageTokenBytes;
    terms += groups * kImageTokens;
  }
};

// A token's group by half a warp, eight elements a lane. All lanes of the warp come here; `there`:
// the half has a token.
template <bool kBf16>
__device__ __forceinline__ void LeaveImage(const ImagePlace& to, bool there,
                                           const uint4& elements) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const WholeBytes bytes = EncodeWhole<kBf16>(elements);
  if (!there) return;
  WriteForWgmma(bytes, to.column, lane, to.bytes);
  if (lane % 16 != 0) return;
  *reinterpret_cast<float2*>(to.terms) = make_float2(bytes.terms.step, bytes.terms.sum);
}

// What `block` of `blocks` clears.
__device__ __forceinline__ void ClearArrivals(const BatchImages& to, int block, int blocks) {
  const int threads = static_cast<int>(blockDim.x);
  for (int i = block * threads + static_cast<int>(threadIdx.x); i < to.num_arrivals;
       i += blocks * threads) {
    to.arrivals[i] = 0;
  }
}

inline constexpr int kImageThreads = 512;

// Grid: groups, images.
template <bool kBf16>
__global__ void __launch_bounds__(kImageThreads)
    BatchImageKernel(const __grid_constant__ SlicedProblem p,
                     const __grid_constant__ BatchImages to) {
  static_assert(kImageThreads == 16 * kImageTokens);
  ptx::LaunchDependents();
  ptx::WaitForPrevious();
  const int group = static_cast<int>(blockIdx.x);
  const int token = static_cast<int>((blockIdx.y * kImageThreads + threadIdx.x) / 16);
  uint4 elements = make_uint4(0, 0, 0, 0);
  if (token < p.num_tokens) {
    const uint16_t* const from = p.x + token * p.x_stride + group * kGroupSize;
    elements = __ldcg(reinterpret_cast<const uint4*>(from) + threadIdx.x % 16);
  }
  if (group == 0) ClearArrivals(to, static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y));
  LeaveImage<kBf16>(ImagePlace(to, token, group), token < p.num_tokens, elements);
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_IMAGE_CUH_
