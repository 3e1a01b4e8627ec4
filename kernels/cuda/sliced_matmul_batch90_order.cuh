// How the batch path of the sliced matmul (sliced_matmul_batch90.cuh) cuts its work, and the order
// by level in which a block has its tokens.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_ORDER_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_ORDER_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_batch90_image.h"
#include "kernels/cuda/sliced_matmul_plan.cuh"
#include "kernels/cuda/sliced_matmul_whole.cuh"

namespace mobi::cuda {

struct Batch90Plan {
  int tile_units = 0;                    // units of a tile: one for each warpgroup of a block
  int splits_log = 0;                    // 2^splits_log blocks share a tile's columns
  int segment_tiles[kMaxSegments] = {};  // tiles up to the end of each segment
  int x_stages = 0;                      // groups of x in shared memory
  // In the workspace.
  BatchImages x;
  float4* sums = nullptr;  // [block of tokens][unit][part]: see BatchWarp90::SumsOf
};

template <int N>
inline constexpr int kGroupBytes = N* kImageTokenBytes;  // of x

// How the tokens of a block are ordered for one segment. A warp makes it together.
template <int N>
struct ColumnOrder {
  static constexpr int kPerLane = N / 32;
  uint32_t ends;         // 8 bits for each level: columns of this level and those above it
  int places[kPerLane];  // columns of the tokens lane + 32 i; those of no token come last

  __device__ __forceinline__ int End(int level) const { return ends >> (8 * (level - 1)) & 255; }
  __device__ __forceinline__ int Begin(int level) const {
    return level == kNumLevels ? 0 : End(level + 1);
  }
  __device__ __forceinline__ int PlaceOf(int token) const {
    int place = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int of_lane = __shfl_sync(~0u, places[i], token % 32);
      if (token / 32 == i) place = of_lane;
    }
    return place;
  }
};

// `levels` of the block's tokens; 0 where there is none.
template <int N>
__device__ __forceinline__ ColumnOrder<N> OrderColumns(const int (&levels)[N / 32], int lane) {
  constexpr int kPerLane = N / 32;
  const uint32_t before = (1u << lane) - 1;
  ColumnOrder<N> order{};
  int end = 0;
#pragma unroll
  for (int level = kNumLevels; level >= 0; --level) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const uint32_t here = __ballot_sync(~0u, levels[i] == level);
      if (levels[i] == level) order.places[i] = end + __popc(here & before);
      end += __popc(here);
    }
    if (level > 0) order.ends |= static_cast<uint32_t>(end) << (8 * (level - 1));
  }
  order.ends = __shfl_sync(~0u, order.ends, 0);  // the same for all lanes, as the compiler sees
  return order;
}

template <int N>
__device__ __forceinline__ ColumnOrder<N> OrderColumns(const SlicedProblem& p, int segment,
                                                       int first_token, int lane) {
  int levels[N / 32] = {};
#pragma unroll
  for (int i = 0; i < N / 32; ++i) {
    const int token = first_token + lane + 32 * i;
    if (token >= p.num_tokens) continue;
    const int level = __ldcg(p.levels + segment * p.levels_stride + token);
    levels[i] = min(max(level, 1), kNumLevels);
  }
  return OrderColumns<N>(levels, lane);
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_ORDER_CUH_
