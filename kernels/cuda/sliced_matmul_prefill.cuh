// The prefill path's kernel: many tokens, so the time is that of the tensor cores.
//
// A block takes tiles of 128 rows x BN tokens that read one level, one after another. A warpgroup
// keeps slices and images of x (sliced_matmul_prefill_order.cuh) coming into shared memory; two
// turn slices into 16-bit weights in registers (range * (Q + 1/2) / 4^level + offset,
// rounded once) and multiply them, 64 rows each, sums in registers. While one warpgroup
// makes weights, the other's products keep the tensor cores busy.
// A tile with few tokens is multiplied as a narrower one. Every output is one chain of products in
// a fixed order of the columns, whatever the widths, so a token's bits do not depend on the others.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_PREFILL_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_PREFILL_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_plan.cuh"
#include "kernels/cuda/sliced_matmul_prefill_order.cuh"
#include "kernels/cuda/sliced_matmul_unpack.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_registers.cuh"

namespace mobi::cuda {

inline constexpr int kWarpgroup = 128;
inline constexpr int kConsumers = 2;  // warpgroups that multiply; a third keeps them fed
inline constexpr int kPrefillRows = kConsumers * 64;
inline constexpr int kPrefillThreads = (kConsumers + 1) * kWarpgroup;
// Registers go to those who hold sums; together they are what 168 for each would be.
inline constexpr int kConsumerRegisters = 216, kFeederRegisters = 72;
inline constexpr int kPrefillRowTiles = kPrefillRows / kTileRows;

template <int BN>
struct PrefillShared {
  static constexpr int kXStages = BN == 256 ? 5 : BN == 128 ? 6 : 8;  // steps
  static constexpr int kWStages = BN == 256 ? 3 : BN == 128 ? 6 : 7;  // groups
  static constexpr int kXStageBytes = BN * kImageRowBytes;
  // [row tile][slice] of one group, then [row tile] of pairs.
  static constexpr int kPairs = kPrefillRowTiles * kNumSlices * kTileBytes;
  static constexpr int kWStageBytes = kPairs + kPrefillRowTiles * kTileScaleBytes;
  // The result on its way out: 64 rows of some tokens at a time, padded against bank conflicts.
  static constexpr int kOutTokens = 32, kOutStride = 64 * 2 + 16;
  static constexpr int kW = kXStages * kXStageBytes;
  static constexpr int kOut = kW + kWStages * kWStageBytes;  // [warpgroup]
  static constexpr int kStarts = kOut + kConsumers * kOutTokens * kOutStride;
  static constexpr int kBarriers = kStarts + 128;
  static constexpr int kBytes = kBarriers + 2 * (kXStages + kWStages) * 8;
  static_assert(kMaxSegments * kStartsOfSegment * 4 <= 128);
  static_assert(kBytes <= 227 * 1024);
};

// A place in a ring of stages, and the parity of its barriers.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// Barriers of a ring, as shared addresses of the first of each kind.
struct RingBarriers {
  uint32_t full, empty;
};

struct PrefillTile {
  int segment, first_row, end_row;  // end_row: where the rows of the block or of the segment end
  int image, first_of_image;        // index of the image of its tokens, and where they begin in it
  TokenTile tokens;                 // count 0: there are no more tiles
};

// The tiles, row block by row block of each segment, as the grid's blocks take them in turn.
template <int BN>
struct PrefillTiles {
  const SlicedProblem& p;
  const PrefillPlan& plan;
  const int32_t* starts;
  int count, halved;  // of the tiles, the last that are cut in two

  __device__ __forceinline__ PrefillTiles(const SlicedProblem& p, const PrefillPlan& plan,
                                          const int32_t* starts)
      : p(p), plan(plan), starts(starts), count(0) {
    for (int s = 0, begin_block = 0; s < p.num_segments; ++s) {
      count += (plan.segment_blocks[s] - begin_block) * TokenTilesOf(s);
      begin_block = plan.segment_blocks[s];
    }
    // Where the last round leaves half of the blocks idle.
    const int blocks = static_cast<int>(gridDim.x), rest = count % blocks;
    halved = BN > 64 && 2 * rest <= blocks ? rest : 0;
  }

  __device__ __forceinline__ int TokenTilesOf(int segment) const {
    return CountTokenTiles<BN>(starts + plan.OrderOf(segment) * kStartsOfSegment);
  }

  __device__ __forceinline__ PrefillTile At(int index) const {
    const int of_halved = index - (count - halved);
    if (of_halved < 0 || halved == 0) return Whole(index);
    PrefillTile tile = Whole(count - halved + of_halved / 2);
    tile.first_of_image = of_halved % 2 * (BN / 2);
    tile.tokens.first += tile.first_of_image;
    tile.tokens.count = min(max(tile.tokens.count - tile.first_of_image, 0), BN / 2);
    return tile;
  }

  __device__ __forceinline__ PrefillTile Whole(int index) const {
    PrefillTile tile{};
    int begin_row = 0, begin_block = 0;
    for (int s = 0; s < p.num_segments; ++s) {
      const int32_t* const start = starts + plan.OrderOf(s) * kStartsOfSegment;
      const int end_row = p.segment_tiles[s] * kTileRows, end_block = plan.segment_blocks[s];
      const int token_tiles = TokenTilesOf(s), tiles = (end_block - begin_block) * token_tiles;
      if (index < tiles) {
        // Turned by one from row block to row block: a block of the grid, which takes every so many
        // tiles, would else meet the same tokens again and again, and tiles differ in size.
        const int of_rows = index / token_tiles, of_block = (index + of_rows) % token_tiles;
        tile.segment = s;
        tile.first_row = begin_row + of_rows * kPrefillRows;
        tile.end_row = min(tile.first_row + kPrefillRows, end_row);
        tile.image = start[kImageSegment] * plan.token_tiles + of_block;
        tile.tokens = FindTokenTile<BN>(start, of_block);
        return tile;
      }
      index -= tiles;
      begin_row = end_row;
      begin_block = end_block;
    }
    return tile;
  }
};

// ---- The warpgroup that keeps the others fed: two warps bring slices, half of the row tiles each,
// and one thread of a third brings x. With few tokens in a tile their instructions are what the
// others wait for.

inline constexpr int kWeightFeeders = 2;

template <int BN>
struct Feeder {
  using Shared = PrefillShared<BN>;
  static constexpr int kTiles = kPrefillRowTiles / kWeightFeeders;  // row tiles of a warp
  static_assert(kTiles == 4);  // so that half a warp has all of their pairs

  const SlicedProblem& p;
  const PrefillPlan& plan;
  uint32_t shared;
  RingBarriers x, w;
  int warp, lane;  // warp: of the warpgroup
  RingPlace<Shared::kXStages> at_x;
  RingPlace<Shared::kWStages> at_w;

  // The index of group 0 of this warp's i-th row tile. Beyond the segment its last is repeated;
  // nothing of that is stored.
  __device__ __forceinline__ int64_t IndexOf(const PrefillTile& tile, int i) const {
    const int of_all =
        min(tile.first_row / kTileRows + warp * kTiles + i, tile.end_row / kTileRows - 1);
    return int64_t{of_all} * p.groups;
  }

  template <int level>
  __device__ __forceinline__ void FeedWeights(const PrefillTile& tile) {
    const uint4 *from[level], *pairs;
    int offset[kTiles];  // from the first row tile, in words of 16 bytes
#pragma unroll
    for (int s = 0; s < level; ++s) from[s] = p.slices[s] + IndexOf(tile, 0) * 32 + lane;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      offset[i] = static_cast<int>(IndexOf(tile, i) - IndexOf(tile, 0)) * 32;
    }
    pairs = p.scales[level - 1] + IndexOf(tile, lane / 4) * 4 + lane % 4;
    const uint32_t to = shared + Shared::kW + warp * kTiles * kNumSlices * kTileBytes + lane * 16;
    const uint32_t pairs_to =
        shared + Shared::kW + Shared::kPairs + warp * kTiles * kTileScaleBytes + lane * 16;
    for (int group = 0; group < p.groups; ++group) {
      ptx::BarrierWait(w.empty + at_w.stage * 8, at_w.parity ^ 1);
      const uint32_t stage = at_w.stage * Shared::kWStageBytes;
#pragma unroll
      for (int s = 0; s < level; ++s) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          ptx::CopyAsync16(to + stage + (i * kNumSlices + s) * kTileBytes, from[s] + offset[i]);
        }
        from[s] += 32;
      }
      if (lane < 4 * kTiles) ptx::CopyAsync16(pairs_to + stage, pairs);
      pairs += 4;
      ptx::BarrierArriveAfterCopies(w.full + at_w.stage * 8);
      at_w.Next();
    }
  }

  __device__ __forceinline__ void FeedX(const PrefillTile& tile) {
    constexpr int kStepBytes = BN * kImageRowBytes;
    const uint8_t* image = plan.images + int64_t{tile.image} * 2 * p.groups * kStepBytes +
                           tile.first_of_image * kImageRowBytes;
    const uint32_t bytes = (tile.tokens.count + 7) / 8 * 8 * kImageRowBytes;
    for (int step = 0; step < 2 * p.groups; ++step, image += kStepBytes) {
      ptx::BarrierWait(x.empty + at_x.stage * 8, at_x.parity ^ 1);
      const uint32_t full = x.full + at_x.stage * 8;
      ptx::BarrierArriveExpecting(full, bytes);
      ptx::BulkCopy(shared + at_x.stage * Shared::kXStageBytes, image, bytes, full);
      at_x.Next();
    }
  }

  __device__ __forceinline__ void Feed(const PrefillTile& tile) {
    if (warp >= kWeightFeeders) {
      if (warp == kWeightFeeders && lane == 0) FeedX(tile);
      return;
    }
    switch (tile.tokens.level) {
      case 1:
        return FeedWeights<1>(tile);
      case 2:
        return FeedWeights<2>(tile);
      case 3:
        return FeedWeights<3>(tile);
      default:
        return FeedWeights<4>(tile);
    }
  }
};

// ---- The multiplying warpgroups.

template <int BN, bool kBf16>
struct Consumer {
  using Shared = PrefillShared<BN>;

  const SlicedProblem& p;
  const PrefillPlan& plan;
  uint8_t* shared;
  RingBarriers x, w;
  int warpgroup, warp, lane;  // warp: of the warpgroup
  RingPlace<Shared::kXStages> at_x;
  RingPlace<Shared::kWStages> at_w;

  // A pair of codes as it comes from Unpack, to weights.
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

  // Range and offset of rows g and g + 8.
  struct Pairs {
    half2 range[2], offset[2];
  };
  __device__ __forceinline__ Pairs LoadPairs(const uint8_t* stage) const {
    const half2* const from = reinterpret_cast<const half2*>(
        stage + Shared::kPairs + (warpgroup * 4 + warp) * kTileScaleBytes);
    const half2 low = from[lane / 4], high = from[lane / 4 + 8];
    return {{__low2half2(low), __low2half2(high)}, {__high2half2(low), __high2half2(high)}};
  }

  // The fragments of half a group of this warp's row tile.
  template <int level>
  __device__ __forceinline__ void MakeWeights(const uint8_t* stage, int half, const Pairs& pairs,
                                              uint32_t (&a)[16]) const {
    uint2 words[level];
#pragma unroll
    for (int s = 0; s < level; ++s) {
      words[s] = *reinterpret_cast<const uint2*>(
          stage + ((warpgroup * 4 + warp) * kNumSlices + s) * kTileBytes + lane * 16 + half * 8);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t slices[level];
#pragma unroll
      for (int s = 0; s < level; ++s) slices[s] = i == 0 ? words[s].x : words[s].y;
      Unpack<level>(slices, a + 8 * i);
    }
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      a[k] = Dequantize<level>(a[k], k % 8, pairs.range[k % 2], pairs.offset[k % 2]);
    }
  }

  __device__ __forceinline__ void Release(uint32_t empty, int stage) const {
    if (lane == 0) ptx::BarrierArrive(empty + stage * 8);
  }

  // The next group's slices are here.
  __device__ __forceinline__ const uint8_t* AwaitWeights() const {
    ptx::BarrierWait(w.full + at_w.stage * 8, at_w.parity);
    return shared + Shared::kW + at_w.stage * Shared::kWStageBytes;
  }

  // Their weights are in registers. All lanes arrive: racecheck does not see that a lane's reads
  // are ordered before another lane's arrival.
  __device__ __forceinline__ void PassWeights() {
    ptx::BarrierArrive(w.empty + at_w.stage * 8);
    at_w.Next();
  }

  // Half a group: one step of x. n: tokens that are multiplied.
  template <int n>
  __device__ __forceinline__ void StartStep(const uint32_t (&a)[16], float (&d)[n / 2]) const {
    ptx::BarrierWait(x.full + at_x.stage * 8, at_x.parity);
    const uint64_t b =
        ptx::WgmmaOperand(ptx::SharedAddress(shared) + at_x.stage * Shared::kXStageBytes);
    ptx::WgmmaFence();
#pragma unroll
    for (int k = 0; k < kStepColumns / 16; ++k) {
      ptx::WgmmaRegisters<n, kBf16>(d, a + 4 * k, b + k * ptx::kWgmmaStep);
    }
    ptx::WgmmaCommit();
  }

  __device__ __forceinline__ void FinishStep() {
    ptx::WgmmaWait<0>();
    Release(x.empty, at_x.stage);
    at_x.Next();
  }

  // The other warpgroup's products run while this one makes weights.
  template <int level, int n>
  __device__ __forceinline__ void Multiply(float (&d)[n / 2]) {
    for (int group = 0; group < p.groups; ++group) {
      const uint8_t* const stage = AwaitWeights();
      const Pairs pairs = LoadPairs(stage);
      uint32_t a[16];
      MakeWeights<level>(stage, 0, pairs, a);
      StartStep<n>(a, d);
      FinishStep();
      MakeWeights<level>(stage, 1, pairs, a);
      PassWeights();
      StartStep<n>(a, d);
      FinishStep();
    }
  }

  // Few tokens' products take less time than the weights, and leave registers: the next weights are
  // made while this warpgroup's own products run.
  template <int level, int n>
  __device__ __forceinline__ void MultiplyAhead(float (&d)[n / 2]) {
    uint32_t a[16], b[16];
    const uint8_t* stage = AwaitWeights();
    Pairs pairs = LoadPairs(stage);
    MakeWeights<level>(stage, 0, pairs, a);
    for (int group = 1;; ++group) {
      StartStep<n>(a, d);
      MakeWeights<level>(stage, 1, pairs, b);
      PassWeights();
      FinishStep();
      StartStep<n>(b, d);
      if (group == p.groups) break;
      stage = AwaitWeights();
      pairs = LoadPairs(stage);
      MakeWeights<level>(stage, 0, pairs, a);
      FinishStep();
    }
    FinishStep();
  }

  // ---- The result.

  static __device__ __forceinline__ uint32_t Pack(DType type, float low, float high) {
    if (type == DType::kF16) {
      const half2 pair = __floats2half2_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&pair);
    }
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }

  __device__ __forceinline__ int64_t Token(const PrefillTile& tile, int column) const {
    return plan.Token(tile.segment, p.num_tokens, tile.tokens.first + column);
  }

  template <int n>
  __device__ __forceinline__ void StoreWide(const PrefillTile& tile,
                                            const float (&d)[n / 2]) const {
#pragma unroll
    for (int j = 0; j < n / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int column = 8 * j + lane % 4 * 2 + k % 2;
        const int row = tile.first_row + (warpgroup * 4 + warp) * 16 + lane / 4 + k / 2 * 8;
        if (column < tile.tokens.count && row < tile.end_row) {
          static_cast<float*>(p.out)[Token(tile, column) * p.out_stride + row] = d[4 * j + k];
        }
      }
    }
  }

  // Through shared memory, transposed, so that a token's rows leave side by side.
  template <int n>
  __device__ __forceinline__ void StoreNarrow(const PrefillTile& tile,
                                              const float (&d)[n / 2]) const {
    constexpr int kTokens = Shared::kOutTokens, kStride = Shared::kOutStride;
    uint8_t* const staged = shared + Shared::kOut + warpgroup * (kTokens * kStride);
    const uint32_t to =
        ptx::SharedAddress(staged) + lane % 8 * kStride + warp * 32 + lane / 8 % 2 * 16;
    const bool vectors = p.out_stride % 8 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
#pragma unroll
    for (int first = 0; first < n; first += kTokens) {
      ptx::NamedBarrier(1 + warpgroup, kWarpgroup);  // what was staged before has left
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const float* const of_tile = d + (first / 8 + j) * 4;
        ptx::StoreMatricesTransposed(to + 8 * j * kStride, Pack(p.out_type, of_tile[0], of_tile[1]),
                                     Pack(p.out_type, of_tile[2], of_tile[3]));
      }
      ptx::NamedBarrier(1 + warpgroup, kWarpgroup);
#pragma unroll
      for (int i = 0; i < kTokens / 16; ++i) {
        const int token = (warp * 32 + lane) / 8 + 16 * i, chunk = lane % 8;  // of 8 rows
        const int row = tile.first_row + warpgroup * 64 + chunk * 8;
        if (first + token >= tile.tokens.count || row >= tile.end_row) continue;
        StoreChunk(*reinterpret_cast<const uint4*>(staged + token * kStride + chunk * 16), vectors,
                   Token(tile, first + token) * p.out_stride + row);
      }
    }
  }

  __device__ __forceinline__ void StoreChunk(const uint4& value, bool vectors, int64_t at) const {
    uint16_t* const out = static_cast<uint16_t*>(p.out) + at;
    if (vectors) {
      *reinterpret_cast<uint4*>(out) = value;
      return;
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      out[k] = static_cast<uint16_t>((&value.x)[k / 2] >> (16 * (k % 2)));
    }
  }

  template <int level, int n>
  __device__ __forceinline__ void RunWith(const PrefillTile& tile) {
    float d[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; ++i) d[i] = 0;
    if constexpr (n > 128) {
      Multiply<level, n>(d);
    } else {
      MultiplyAhead<level, n>(d);
    }
    if (p.out_type == DType::kF32) {
      StoreWide<n>(tile, d);
    } else {
      StoreNarrow<n>(tile, d);
    }
  }

  template <int level>
  __device__ __forceinline__ void RunAt(const PrefillTile& tile) {
    if constexpr (BN > 128) {
      if (tile.tokens.count > 128) return RunWith<level, 256>(tile);
    }
    if constexpr (BN > 64) {
      if (tile.tokens.count > 64) return RunWith<level, 128>(tile);
    }
    RunWith<level, 64>(tile);
  }

  __device__ __forceinline__ void Run(const PrefillTile& tile) {
    switch (tile.tokens.level) {
      case 1:
        return RunAt<1>(tile);
      case 2:
        return RunAt<2>(tile);
      case 3:
        return RunAt<3>(tile);
      default:
        return RunAt<4>(tile);
    }
  }
};

// Grid: as many blocks as the device holds, or as there may be tiles.
template <int BN, bool kBf16>
__global__ void __launch_bounds__(kPrefillThreads, 1)
    SlicedPrefillKernel(const __grid_constant__ SlicedProblem p,
                        const __grid_constant__ PrefillPlan plan) {
#if MOBI_WGMMA
  using Shared = PrefillShared<BN>;
  extern __shared__ __align__(1024) uint8_t shared[];
  ptx::LaunchDependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t barriers = ptx::SharedAddress(shared) + Shared::kBarriers;
  const RingBarriers x{barriers, barriers + Shared::kXStages * 8};
  const RingBarriers w{x.empty + Shared::kXStages * 8,
                       x.empty + (Shared::kXStages + Shared::kWStages) * 8};
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kXStages; ++i) {
      ptx::BarrierInit(x.full + i * 8, 1);
      ptx::BarrierInit(x.empty + i * 8, kConsumers * 4);
    }
    for (int i = 0; i < Shared::kWStages; ++i) {
      ptx::BarrierInit(w.full + i * 8, 32 * kWeightFeeders);
      ptx::BarrierInit(w.empty + i * 8, kConsumers * kWarpgroup);
    }
    ptx::FenceBarrierInit();
  }
  ptx::WaitForPrevious();
  int32_t* const starts = reinterpret_cast<int32_t*>(shared + Shared::kStarts);
  if (threadIdx.x < plan.orders * kStartsOfSegment) {
    starts[threadIdx.x] = plan.Start(threadIdx.x, p.num_tokens);
  }
  __syncthreads();
  const PrefillTiles<BN> tiles(p, plan, starts);
  if (warp >= kConsumers * 4) {
    ptx::GiveRegisters<kFeederRegisters>();
    Feeder<BN> feeder{p, plan, ptx::SharedAddress(shared), x, w, warp % 4, lane, {}, {}};
    for (int index = blockIdx.x;; index += gridDim.x) {
      const PrefillTile tile = tiles.At(index);
      if (tile.tokens.count == 0) return;
      feeder.Feed(tile);
    }
  } else {
    ptx::TakeRegisters<kConsumerRegisters>();
    Consumer<BN, kBf16> consumer{p, plan, shared, x, w, warp / 4, warp % 4, lane, {}, {}};
    for (int index = blockIdx.x;; index += gridDim.x) {
      const PrefillTile tile = tiles.At(index);
      if (tile.tokens.count == 0) return;
      consumer.Run(tile);
    }
  }
#endif
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_PREFILL_CUH_
