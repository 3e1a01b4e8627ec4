// Before the product of the batch path (sliced_matmul_batch90.cuh): x as whole numbers, in the
// shape in which the product's blocks take it into shared memory, its tokens by level.
//
// A block of up to N tokens has an image for each segment: [group][column] of 256 bytes, a token
// each, those of the highest level first.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_ORDER_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_ORDER_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_plan.cuh"
#include "kernels/cuda/sliced_matmul_whole.cuh"

namespace mobi::cuda {

struct Batch90Plan {
  int tile_units = 0;                    // units of a tile: one for each warpgroup of a block
  int splits_log = 0;                    // 2^splits_log blocks share a tile's columns
  int segment_tiles[kMaxSegments] = {};  // tiles up to the end of each segment
  int x_stages = 0;                      // groups of x in shared memory
  // In the workspace; images and terms are [block of tokens][segment][group].
  uint8_t* images = nullptr;
  WholeTerms* terms = nullptr;
  float4* sums = nullptr;        // [block of tokens][unit][part]: see BatchWarp90::SumsOf
  uint32_t* arrivals = nullptr;  // [block of tokens][unit]: blocks whose sums are there
  int num_arrivals = 0;
};

template <int N>
inline constexpr int kImageGroupBytes = N * 2 * kGroupSize;

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

// Where a column's terms are among a group's, such that a lane has those of two tiles of four
// columns in one load.
__device__ __forceinline__ int TermsPlace(int column) {
  const int tile = column % 32 / 4;
  return column / 32 * 32 + tile / 2 * 8 + column % 4 * 2 + tile % 2;
}

inline constexpr int kBatchPackThreads = 512;

// Grid: groups, segments, blocks of tokens.
template <int N, bool kBf16>
__global__ void __launch_bounds__(kBatchPackThreads)
    BatchPackKernel(const __grid_constant__ SlicedProblem p,
                    const __grid_constant__ Batch90Plan plan) {
  constexpr int kAtOnce = kBatchPackThreads / 16, kItems = N / kAtOnce;
  ptx::LaunchDependents();
  ptx::WaitForPrevious();
  const int group = blockIdx.x, segment = blockIdx.y, first_token = blockIdx.z * N;
  const int lane = threadIdx.x % 32, half = threadIdx.x / 16;
  uint4 v[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int token = first_token + half + i * kAtOnce;
    v[i] = make_uint4(0, 0, 0, 0);
    if (token < p.num_tokens) {
      v[i] = __ldcg(reinterpret_cast<const uint4*>(p.x + token * p.x_stride + group * kGroupSize) +
                    lane % 16);
    }
  }
  if (blockIdx.x == 0 && segment == 0 && blockIdx.z == 0) {
    for (int i = threadIdx.x; i < plan.num_arrivals; i += kBatchPackThreads) plan.arrivals[i] = 0;
  }
  const ColumnOrder<N> order = OrderColumns<N>(p, segment, first_token, lane);
  const int64_t place = (int64_t{blockIdx.z} * p.num_segments + segment) * p.groups + group;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int column = order.PlaceOf(half + i * kAtOnce);
    const WholeBytes bytes = EncodeWhole<kBf16>(v[i]);
    WriteForWgmma(bytes, column, lane,
                  plan.images + place * kImageGroupBytes<N> + column * 2 * kGroupSize);
    if (lane % 16 == 0) {
      *reinterpret_cast<float2*>(plan.terms + place * N + TermsPlace(column)) =
          make_float2(bytes.terms.step, bytes.terms.sum);
    }
  }
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_ORDER_CUH_
