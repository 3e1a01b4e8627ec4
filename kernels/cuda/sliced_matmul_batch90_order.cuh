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

// How the tokens of a block are ordered for one segment, those of the highest level first: 8 bits
// for each level, the columns of this level and those above it.
struct ColumnOrder {
  uint32_t ends;

  __device__ __forceinline__ int End(int level) const { return ends >> (8 * (level - 1)) & 255; }
  __device__ __forceinline__ int Begin(int level) const {
    return level == kNumLevels ? 0 : End(level + 1);
  }
  __device__ __forceinline__ int HighestLevel() const {
    return 1 + (End(2) > 0) + (End(3) > 0) + (End(4) > 0);
  }
  __device__ __forceinline__ bool IsMixed(int num_tokens) const {
    return End(HighestLevel()) < num_tokens;
  }
};

// By a warp. levels: of the block's tokens lane + 32 i; 0 where there is none. tokens[column]: the
// token that is there; those of no token come last.
template <int N>
__device__ __forceinline__ ColumnOrder OrderColumns(const int (&levels)[N / 32], int lane,
                                                    uint8_t* tokens) {
  const uint32_t before = (1u << lane) - 1;
  ColumnOrder order{};
  int end = 0;
#pragma unroll
  for (int level = kNumLevels; level >= 0; --level) {
#pragma unroll
    for (int i = 0; i < N / 32; ++i) {
      const uint32_t here = __ballot_sync(~0u, levels[i] == level);
      if (levels[i] == level) {
        tokens[end + __popc(here & before)] = static_cast<uint8_t>(lane + 32 * i);
      }
      end += __popc(here);
    }
    if (level > 0) order.ends |= static_cast<uint32_t>(end) << (8 * (level - 1));
  }
  return order;
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_ORDER_CUH_
