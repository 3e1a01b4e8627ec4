// The prefill path's kernel: many tokens, so the time is that of the tensor cores.
//
// A block multiplies BM rows of the weight by BN tokens that read one level. One warpgroup turns
// slices into 16-bit weights in shared memory (range * (Q + 1/2) / 4^level + offset, rounded once)
// and copies x beside them, 64 columns at a time; the others run wgmma on what is there, each 64
// rows x BN tokens, sums in registers. Every output is one chain of products in the order of the
// columns, whatever BM, BN and the number of tokens, so a token's bits do not depend on the others.
//
// SlicedSortKernel brings tokens of one level together first; x is gathered and the result is
// scattered by that order.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_PREFILL_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_PREFILL_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_problem.h"
#include "kernels/cuda/sliced_matmul_unpack.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace mobi::cuda {

// Tokens of each segment by level: order[segment * num_tokens + i], those of level l from
// start[segment * 5 + l - 1] to start[segment * 5 + l].
struct TokenOrder {
  int32_t* order = nullptr;
  int32_t* start = nullptr;
};

struct PrefillPlan {
  TokenOrder tokens;
  int token_tiles = 0;                    // of BN tokens, those left over at each level included
  int segment_blocks[kMaxSegments] = {};  // blocks of BM rows up to the end of each segment
};

inline constexpr int kWarpgroup = 128;
inline constexpr int kStepColumns = 64;  // of one step: a row of 128 bytes in shared memory
inline constexpr int kXStages = 4;       // steps of x in shared memory
inline constexpr int kWStages = 2;       // groups (two steps) of weights

template <int BM, int BN>
struct PrefillShared {
  static constexpr int kWStepBytes = BM * kStepColumns * 2;
  static constexpr int kXStepBytes = BN * kStepColumns * 2;
  static constexpr int kX = kWStages * 2 * kWStepBytes;
  static constexpr int kTokens = kX + kXStages * kXStepBytes;  // int32 index of each
  static constexpr int kBarriers = kTokens + BN * 4;
  static constexpr int kBytes = kBarriers + 2 * (kXStages + kWStages) * 8;
  // The result on its way out: rows of one token, padded against bank conflicts.
  static constexpr int kOutStride = BM * 2 + 16;
  static_assert(BN * kOutStride <= kTokens);
};

// Where a block works.
struct PrefillTile {
  int segment, first_row, end_row;  // rows: of the block, cut at the end of its segment
  int level, first, count;          // tokens: a run of the segment's order; count 0: nothing to do

  template <int BM, int BN>
  static __device__ __forceinline__ PrefillTile Of(const SlicedProblem& p,
                                                   const PrefillPlan& plan) {
    PrefillTile tile;
    const int block = blockIdx.x / plan.token_tiles;
    int index = blockIdx.x - block * plan.token_tiles;
    tile.segment = (block >= plan.segment_blocks[0]) + (block >= plan.segment_blocks[1]);
    const int s = tile.segment;
    const int first_block = s == 0 ? 0 : plan.segment_blocks[s - 1];
    const int begin = s == 0 ? 0 : p.segment_tiles[s - 1] * kTileRows;
    tile.first_row = begin + (block - first_block) * BM;
    tile.end_row = min(tile.first_row + BM, p.segment_tiles[s] * kTileRows);
    const int32_t* start = plan.tokens.start + s * (kNumLevels + 1);
    tile.level = 1;
    tile.first = tile.count = 0;
#pragma unroll
    for (int level = 1; level <= kNumLevels; ++level) {
      const int from = __ldcg(start + level - 1), to = __ldcg(start + level);
      const int tiles = (to - from + BN - 1) / BN;
      if (index >= 0 && index < tiles) {
        tile.level = level;
        tile.first = from + index * BN;
        tile.count = min(BN, to - tile.first);
      }
      index -= tiles;
    }
    return tile;
  }
};

// ---- The producing warpgroup.

template <int BM, int BN, bool kBf16>
struct Producer {
  using Shared = PrefillShared<BM, BN>;
  static constexpr int kTiles = BM / kTileRows / 4;  // row tiles per warp

  const SlicedProblem& p;
  const PrefillTile& at;
  uint8_t* shared;
  uint32_t full_x, empty_x, full_w, empty_w;  // first barrier of each kind
  int thread, lane;
  uint32_t tile_index[kTiles];  // of group 0

  __device__ __forceinline__ void CopyX(int step) const {
    const int stage = step % kXStages;
    ptx::BarrierWait(empty_x + stage * 8, (step / kXStages & 1) ^ 1);
    const int chunk = thread % 8;
    const int32_t* const tokens = reinterpret_cast<const int32_t*>(shared + Shared::kTokens);
    const uint32_t to = ptx::SharedAddress(shared) + Shared::kX + stage * Shared::kXStepBytes;
#pragma unroll
    for (int i = 0; i < BN / 16; ++i) {
      const int row = thread / 8 + 16 * i;
      const uint16_t* from = p.x + tokens[row] * p.x_stride + step * kStepColumns + chunk * 8;
      ptx::CopyAsync16(to + row * 128 + ((chunk ^ (row % 8)) << 4), from);
    }
    ptx::BarrierArriveAfterCopies(full_x + stage * 8);
  }

  // A code as it comes from Unpack, to a weight.
  template <int level>
  static __device__ __forceinline__ uint32_t Dequantize(uint32_t code, int fragment, half2 range,
                                                        half2 offset) {
    const int pair = fragment / 2, h = fragment % 2;
    const float bias = level == 1 ? 0.125f - LevelOneBias(pair, h) : CodeOffset(level);
    const half2 fraction = __hadd2(*reinterpret_cast<const half2*>(&code), __float2half2_rn(bias));
    const half2 weight = __hfma2(fraction, range, offset);
    if constexpr (kBf16) {
      const float2 wide = __half22float2(weight);
      const __nv_bfloat162 narrow = __floats2bfloat162_rn(wide.x, wide.y);
      return *reinterpret_cast<const uint32_t*>(&narrow);
    } else {
      return *reinterpret_cast<const uint32_t*>(&weight);
    }
  }

  template <int level>
  struct Words {
    uint4 slices[kTiles][level];
    half2 pairs[kTiles][2];
  };

  template <int level>
  __device__ __forceinline__ void LoadWords(int group, Words<level>& words) const {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const size_t index = tile_index[i] + group;
#pragma unroll
      for (int s = 0; s < level; ++s) words.slices[i][s] = __ldg(p.slices[s] + index * 32 + lane);
      const half2* const pairs = reinterpret_cast<const half2*>(p.scales[level - 1] + index * 4);
      words.pairs[i][0] = __ldg(pairs + lane / 4);
      words.pairs[i][1] = __ldg(pairs + lane / 4 + 8);
    }
  }

  // One group of this warp's tiles. A lane's 8 columns of a word lie side by side: 16 bytes.
  template <int level>
  __device__ __forceinline__ void WriteWeights(int group, const Words<level>& words) const {
    const int stage = group % kWStages, g = lane / 4, t = lane % 4;
    ptx::BarrierWait(empty_w + stage * 8, (group / kWStages & 1) ^ 1);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int row = (thread / 32 + 4 * i) * kTileRows + g;
      uint8_t* const to = shared + (2 * stage + t / 2) * Shared::kWStepBytes + row * 128;
      const half2 range[2] = {__low2half2(words.pairs[i][0]), __low2half2(words.pairs[i][1])};
      const half2 offset[2] = {__high2half2(words.pairs[i][0]), __high2half2(words.pairs[i][1])};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t slices[level], a[8];
#pragma unroll
        for (int s = 0; s < level; ++s) slices[s] = (&words.slices[i][s].x)[w];
        Unpack<level>(slices, a);
#pragma unroll
        for (int k = 0; k < 8; ++k) a[k] = Dequantize<level>(a[k], k, range[k % 2], offset[k % 2]);
        uint8_t* const column = to + (((4 * t + w) % 8 ^ g) << 4);
        *reinterpret_cast<uint4*>(column) = make_uint4(a[0], a[2], a[4], a[6]);
        *reinterpret_cast<uint4*>(column + 8 * 128) = make_uint4(a[1], a[3], a[5], a[7]);
      }
    }
    ptx::FenceAsyncProxy();
    ptx::BarrierArrive(full_w + stage * 8);
  }

  template <int level>
  __device__ __forceinline__ void Run() {
    Words<level> now, next;
    LoadWords(0, now);
    for (int group = 0; group < p.groups; ++group) {
      CopyX(2 * group);
      CopyX(2 * group + 1);
      LoadWords(min(group + 1, p.groups - 1), next);
      WriteWeights(group, now);
      now = next;
    }
  }
};

// ---- The multiplying warpgroups.

template <int BM, int BN, bool kBf16>
struct Consumer {
  using Shared = PrefillShared<BM, BN>;

  const SlicedProblem& p;
  const PrefillTile& at;
  uint8_t* shared;
  uint32_t full_x, empty_x, full_w, empty_w;
  int group_index, thread;  // of the warpgroup; within it

  __device__ __forceinline__ void Release(int step) const {
    if (thread % 32 != 0) return;
    ptx::BarrierArrive(empty_x + step % kXStages * 8);
    if (step % 2 == 1) ptx::BarrierArrive(empty_w + step / 2 % kWStages * 8);
  }

  __device__ __forceinline__ void Multiply(float (&d)[BN / 2]) const {
    const uint32_t base = ptx::SharedAddress(shared);
    for (int step = 0; step < 2 * p.groups; ++step) {
      const int x_stage = step % kXStages, group = step / 2, w_stage = group % kWStages;
      if (step % 2 == 0) ptx::BarrierWait(full_w + w_stage * 8, group / kWStages & 1);
      ptx::BarrierWait(full_x + x_stage * 8, step / kXStages & 1);
      ptx::FenceAsyncProxy();  // x came by ordinary copies
      const uint64_t a = ptx::WgmmaOperand(base + (2 * w_stage + step % 2) * Shared::kWStepBytes +
                                           group_index * 64 * 128);
      const uint64_t b = ptx::WgmmaOperand(base + Shared::kX + x_stage * Shared::kXStepBytes);
      ptx::WgmmaFence();
#pragma unroll
      for (int k = 0; k < kStepColumns / 16; ++k) {
        ptx::Wgmma<BN, kBf16>(d, a + k * ptx::kWgmmaStep, b + k * ptx::kWgmmaStep,
                              step > 0 || k > 0);
      }
      ptx::WgmmaCommit();
      if (step > 0) {
        ptx::WgmmaWait<1>();
        Release(step - 1);
      }
    }
    ptx::WgmmaWait<0>();
  }

  static __device__ __forceinline__ uint32_t Pack(DType type, float low, float high) {
    if (type == DType::kF16) {
      const half2 pair = __floats2half2_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&pair);
    }
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }

  __device__ __forceinline__ void Store(const float (&d)[BN / 2]) const {
    const int32_t* const tokens = reinterpret_cast<const int32_t*>(shared + Shared::kTokens);
    const int warp = thread / 32, lane = thread % 32;
    const int row = group_index * 64 + warp * 16;
    if (p.out_type == DType::kF32) {
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int column = 8 * j + lane % 4 * 2 + k % 2;
          const int at_row = at.first_row + row + lane / 4 + k / 2 * 8;
          if (column < at.count && at_row < at.end_row) {
            static_cast<float*>(p.out)[tokens[column] * p.out_stride + at_row] = d[4 * j + k];
          }
        }
      }
      return;
    }
    // Through shared memory, transposed, so that a token's rows leave side by side. Everything
    // there has been read: all wgmma of this block have ended.
    ptx::NamedBarrier(1, BM / 64 * kWarpgroup);
    const uint32_t to = ptx::SharedAddress(shared) + (lane % 8) * Shared::kOutStride + row * 2 +
                        (lane / 8 % 2) * 16;
#pragma unroll
    for (int j = 0; j < BN / 8; ++j) {
      ptx::StoreMatricesTransposed(to + 8 * j * Shared::kOutStride,
                                   Pack(p.out_type, d[4 * j], d[4 * j + 1]),
                                   Pack(p.out_type, d[4 * j + 2], d[4 * j + 3]));
    }
    ptx::NamedBarrier(1, BM / 64 * kWarpgroup);
    constexpr int kChunks = BM / 8;  // of 16 bytes, in a token's rows
    const bool vectors = p.out_stride % 8 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
    for (int i = group_index * kWarpgroup + thread; i < at.count * kChunks;
         i += BM / 64 * kWarpgroup) {
      const int token = i / kChunks, chunk = i % kChunks, at_row = at.first_row + chunk * 8;
      if (at_row >= at.end_row) continue;
      const uint4 value =
          *reinterpret_cast<const uint4*>(shared + token * Shared::kOutStride + chunk * 16);
      uint16_t* const out = static_cast<uint16_t*>(p.out) + tokens[token] * p.out_stride + at_row;
      if (vectors) {
        *reinterpret_cast<uint4*>(out) = value;
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          out[k] = static_cast<uint16_t>((&value.x)[k / 2] >> (16 * (k % 2)));
        }
      }
    }
  }
};

template <int BM, int BN, bool kBf16>
__global__ void __launch_bounds__((BM / 64 + 1) * kWarpgroup, BM == 64 ? 2 : 1)
    SlicedPrefillKernel(const __grid_constant__ SlicedProblem p,
                        const __grid_constant__ PrefillPlan plan) {
#if MOBI_WGMMA
  using Shared = PrefillShared<BM, BN>;
  extern __shared__ __align__(1024) uint8_t shared[];
  ptx::LaunchDependents();
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const uint32_t full_x = ptx::SharedAddress(shared) + Shared::kBarriers;
  const uint32_t empty_x = full_x + kXStages * 8, full_w = empty_x + kXStages * 8;
  const uint32_t empty_w = full_w + kWStages * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kXStages; ++i) {
      ptx::BarrierInit(full_x + i * 8, kWarpgroup);
      ptx::BarrierInit(empty_x + i * 8, BM / 64 * 4);
    }
    for (int i = 0; i < kWStages; ++i) {
      ptx::BarrierInit(full_w + i * 8, kWarpgroup);
      ptx::BarrierInit(empty_w + i * 8, BM / 64 * 4);
    }
    ptx::FenceAsyncProxy();
  }
  ptx::WaitForPrevious();
  const PrefillTile at = PrefillTile::Of<BM, BN>(p, plan);
  if (at.count == 0) return;
  for (int i = threadIdx.x; i < BN; i += blockDim.x) {
    // Places without a token repeat the first; nothing of them is stored.
    reinterpret_cast<int32_t*>(shared + Shared::kTokens)[i] =
        __ldcg(plan.tokens.order + at.segment * p.num_tokens + at.first + (i < at.count ? i : 0));
  }
  __syncthreads();

  if (warpgroup == BM / 64) {
    Producer<BM, BN, kBf16> producer{p,      at,      shared, full_x,     empty_x,
                                     full_w, empty_w, thread, thread % 32};
#pragma unroll
    for (int i = 0; i < producer.kTiles; ++i) {
      // Row tiles beyond the segment repeat its last; nothing of them is stored.
      const int tile =
          min(at.first_row / kTileRows + thread / 32 + 4 * i, at.end_row / kTileRows - 1);
      producer.tile_index[i] = static_cast<uint32_t>(tile * p.groups);
    }
    switch (at.level) {
      case 1:
        return producer.template Run<1>();
      case 2:
        return producer.template Run<2>();
      case 3:
        return producer.template Run<3>();
      default:
        return producer.template Run<4>();
    }
  }
  const Consumer<BM, BN, kBf16> consumer{p,      at,      shared,    full_x, empty_x,
                                         full_w, empty_w, warpgroup, thread};
  float d[BN / 2];
  consumer.Multiply(d);
  consumer.Store(d);
#endif
}

// ---- Order by level. One block per segment; counts, then places, in the order of the tokens.

inline constexpr int kSortThreads = 1024;

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    SlicedSortKernel(const __grid_constant__ SlicedProblem p, TokenOrder to) {
  __shared__ int warp_counts[kNumLevels][kThreads / 32];
  ptx::LaunchDependents();
  ptx::WaitForPrevious();
  const int segment = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint8_t* const levels = p.levels + segment * p.levels_stride;
  // Consecutive tokens per thread, so that one pass of counts places them all.
  const int each = (p.num_tokens + kThreads - 1) / kThreads;
  const int begin = threadIdx.x * each, end = min(begin + each, p.num_tokens);
  int counts[kNumLevels] = {};
  for (int i = begin; i < end; ++i) {
    const int level = min(max(static_cast<int>(__ldcg(levels + i)), 1), kNumLevels);
#pragma unroll
    for (int l = 0; l < kNumLevels; ++l) counts[l] += level == l + 1;
  }
  int before[kNumLevels];
#pragma unroll
  for (int l = 0; l < kNumLevels; ++l) {
    int sum = counts[l];
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(~0u, sum, offset);
      if (lane >= offset) sum += other;
    }
    before[l] = sum - counts[l];
    if (lane == 31) warp_counts[l][warp] = sum;
  }
  __syncthreads();
  int start = 0;
#pragma unroll
  for (int l = 0; l < kNumLevels; ++l) {
    if (threadIdx.x == 0) to.start[segment * (kNumLevels + 1) + l] = start;
    const int count = warp_counts[l][lane];
    const int total = __reduce_add_sync(~0u, count);
    before[l] += start + __reduce_add_sync(~0u, lane < warp ? count : 0);
    start += total;
  }
  if (threadIdx.x == 0) to.start[segment * (kNumLevels + 1) + kNumLevels] = start;
  for (int i = begin; i < end; ++i) {
    const int level = min(max(static_cast<int>(__ldcg(levels + i)), 1), kNumLevels);
#pragma unroll
    for (int l = 0; l < kNumLevels; ++l) {
      if (level == l + 1) to.order[segment * p.num_tokens + before[l]++] = i;
    }
  }
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_PREFILL_CUH_
