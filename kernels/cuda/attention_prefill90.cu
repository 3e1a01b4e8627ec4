// Prefill attention on compute capability 9.0: a block has 128 rows (query, head) of one sequence
// and kv head, 64 to a warpgroup. One warp keeps tiles of K and V coming through the copy engine;
// while one warpgroup makes weights of its scores, the other's products keep the tensor cores busy.
// The arithmetic is the other kernels' (attention.cuh), bit for bit.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_prefill.cuh"
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_attention.cuh"

namespace mobi::cuda {
namespace {

constexpr int kWarpgroup = 128, kGroupRows = 4 * kRowsPerWarp;
constexpr int kConsumers = 2;  // warpgroups that multiply; a third keeps them fed
constexpr int kRows = kConsumers * kGroupRows;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
// Registers go to those who hold sums; together they are what 168 for each would be.
constexpr int kConsumerRegisters = 232, kFeederRegisters = 40;
constexpr int kStages = 2;
constexpr int kZeroBarrier = 1;

// A ring of tiles of K or of V: where they are, and when.
template <int kHeadDim>
struct TileRing {
  using Tile = KvTile<kHeadDim>;
  uint32_t tiles, full, empty;  // shared addresses
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t At() const { return tiles + stage * Tile::kBytes; }
  __device__ __forceinline__ uint32_t Full() const { return full + stage * 8; }
  __device__ __forceinline__ uint32_t Empty() const { return empty + stage * 8; }
  __device__ __forceinline__ void Next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// What a block keeps beside its tiles.
struct TileBarriers {
  uint64_t full[2][kStages], empty[2][kStages];  // of K, of V

  __device__ __forceinline__ void Init() {
    for (int i = 0; i < 2 * kStages; ++i) {
      ptx::BarrierInit(ptx::SharedAddress(&full[0][0] + i), 1);
      ptx::BarrierInit(ptx::SharedAddress(&empty[0][0] + i), kConsumers * 4);
    }
    ptx::FenceBarrierInit();
  }

  template <int kHeadDim>
  __device__ __forceinline__ TileRing<kHeadDim> Ring(int which, uint32_t shared) {
    return {shared + which * kStages * KvTile<kHeadDim>::kBytes, ptx::SharedAddress(full[which]),
            ptx::SharedAddress(empty[which])};
  }
};

// The warp that asks for tiles: a lane has a box of each.
template <int kHeadDim>
__device__ __forceinline__ void Feed(const AttentionParams& p, const CacheMaps& maps,
                                     const PrefillSequence& sequence, int first_col, int tiles,
                                     TileRing<kHeadDim> k, TileRing<kHeadDim> v) {
  using Tile = KvTile<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x) % 32, of_box = lane * p.box_rows;
  const auto ask = [&](TileRing<kHeadDim>& ring, const CUtensorMap& map, int row, int count) {
    ptx::BarrierWait(ring.Empty(), ring.parity ^ 1);
    const int boxes = (count + p.box_rows - 1) / p.box_rows;
    if (lane == 0) {
      ptx::BarrierArriveExpecting(ring.Full(), boxes * p.box_rows * kHeadDim * 2);
    }
    __syncwarp();
    if (lane < boxes) {
#pragma unroll
      for (int part = 0; part < Tile::kParts; ++part) {
        ptx::BoxCopy(ring.At() + part * Tile::kPartBytes + of_box * Tile::kPartDims * 2, &map,
                     first_col + part * Tile::kPartDims, row, ring.Full());
      }
    }
    ring.Next();
  };
  for (int tile = 0; tile < tiles; ++tile) {
    const int token = tile * kTileTokens + of_box;
    const int count = min(sequence.context - tile * kTileTokens, kTileTokens);
    int row = 0;
    if (of_box < count) {
      row = sequence.blocks[token / p.block_size] * p.block_size + token % p.block_size;
    }
    ask(k, maps.k, row, count);
    ask(v, maps.v, row, count);
  }
}

// Rows of V behind the context, which hold anything: their weights are zero. By all warpgroups that
// multiply.
template <int kHeadDim>
__device__ __forceinline__ void ClearBehind(uint32_t v_tile, int count) {
  constexpr int kChunks = kHeadDim / 8;
  for (int e = count * kChunks + static_cast<int>(threadIdx.x); e < kTileTokens * kChunks;
       e += kConsumers * kWarpgroup) {
    ptx::StoreZeros16(v_tile + KvTile<kHeadDim>::Offset(e / kChunks, e % kChunks));
  }
  ptx::FenceAsyncProxy();
  ptx::NamedBarrier(kZeroBarrier, kConsumers * kWarpgroup);
}

#if MOBI_WGMMA
// A warpgroup's 64 rows.
template <typename T, int kHeadDim>
__device__ __forceinline__ void Attend(const PrefillSequence& sequence,
                                       PrefillRows<T, kHeadDim>& rows, int tiles,
                                       TileRing<kHeadDim> k, TileRing<kHeadDim> v) {
  using Tile = KvTile<kHeadDim>;
  using Rows = PrefillRows<T, kHeadDim>;
  constexpr bool kBf16 = std::is_same_v<T, bfloat16>;
  using Score = ptx::WgmmaAttention<kTileTokens, kBf16, false>;
  using Value = ptx::WgmmaAttention<kHeadDim, kBf16, true>;
  constexpr int kSteps = kHeadDim / 16, kStepsOfPart = Tile::kPartDims / 16;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto release = [&](TileRing<kHeadDim>& ring) {
    ptx::WgmmaWait<0>();
    if (lane == 0) ptx::BarrierArrive(ring.Empty());
    ring.Next();
  };
  uint32_t q[kSteps][4];
  rows.Load(q);
  float values[Rows::kDimTiles][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    float scores[Rows::kTiles][4];
    auto& score_sums = reinterpret_cast<float(&)[kTileTokens / 2]>(scores);
    ptx::BarrierWait(k.Full(), k.parity);
    ptx::WgmmaFence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint64_t b = ptx::WgmmaOperand(k.At() + step / kStepsOfPart * Tile::kPartBytes) +
                         step % kStepsOfPart * ptx::kWgmmaStep;
      if (step == 0) {
        Score::FromZero(score_sums, q[step], b);
      } else {
        Score::Add(score_sums, q[step], b);
      }
    }
    ptx::WgmmaCommit();
    release(k);
    uint32_t weights[kTileTokens / 16][4];
    rows.Weigh(tile, scores, weights);
    ptx::BarrierWait(v.Full(), v.parity);
    const int count = sequence.context - tile * kTileTokens;
    if (count < kTileTokens) ClearBehind<kHeadDim>(v.At(), count);
    float part[Rows::kDimTiles][4];
    auto& part_sums = reinterpret_cast<float(&)[kHeadDim / 2]>(part);
    ptx::WgmmaFence();
#pragma unroll
    for (int step = 0; step < kTileTokens / 16; ++step) {
      const uint64_t b = ptx::WgmmaTransposedOperand(v.At(), Tile::kPartBytes) +
                         step * (16 * Tile::kPartDims * 2 >> 4);
      if (step == 0) {
        Value::FromZero(part_sums, weights[step], b);
      } else {
        Value::Add(part_sums, weights[step], b);
      }
    }
    ptx::WgmmaCommit();
    release(v);
    rows.Merge(part, values);
  }
  rows.Store(values);
}
#endif

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    PrefillAttention90Kernel(const __grid_constant__ AttentionParams p,
                             const __grid_constant__ CacheMaps maps) {
#if MOBI_WGMMA
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ TileBarriers barriers;
  AllowNext();
  if (threadIdx.x == 0) {
    ptx::PrefetchMap(&maps.k);
    ptx::PrefetchMap(&maps.v);
    barriers.Init();
  }
  __syncthreads();
  WaitForPrevious();
  // Late rows see the longest context: they start first.
  const RowTile where = FindRowTile<kRows>(p, static_cast<int>(gridDim.x - 1 - blockIdx.x));
  if (where.seq < 0) return;
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0);
  const int kv_head = static_cast<int>(blockIdx.y);
  const PrefillSequence sequence(p, where.seq);
  const int tiles = sequence.Tiles(p, where.first_row + kRows);
  const TileRing<kHeadDim> k = barriers.Ring<kHeadDim>(0, ptx::SharedAddress(shared));
  const TileRing<kHeadDim> v = barriers.Ring<kHeadDim>(1, ptx::SharedAddress(shared));
  if (warp >= kConsumers * 4) {
    ptx::GiveRegisters<kFeederRegisters>();
    if (warp == kConsumers * 4) {
      Feed<kHeadDim>(p, maps, sequence, kv_head * kHeadDim, tiles, k, v);
    }
  } else {
    ptx::TakeRegisters<kConsumerRegisters>();
    PrefillRows<T, kHeadDim> rows(p, sequence, kv_head, where.first_row + warp * kRowsPerWarp);
    Attend<T, kHeadDim>(sequence, rows, tiles, k, v);
  }
#endif
}

}  // namespace

template <typename T, int kHeadDim>
bool LaunchPrefillAttention90(const LaunchContext& context, const AttentionParams& params,
                              int64_t num_tokens, cudaError_t* error) {
  CacheMaps maps{};
  if (!context.wgmma || params.box_rows < kLeastBoxRows ||
      !MakeCacheMaps<kHeadDim>(params, &maps)) {
    return false;
  }
  // At most this many row tiles: one partly filled per sequence.
  const dim3 grid(CeilDiv(num_tokens * params.group, kRows) + params.num_seqs, params.num_kv_heads);
  *error = Launch(context, PrefillAttention90Kernel<T, kHeadDim>, grid, kThreads,
                  2 * kStages * KvTile<kHeadDim>::kBytes, params, maps);
  return true;
}

#define MOBI_INSTANTIATE(T, kHeadDim)                  \
  template bool LaunchPrefillAttention90<T, kHeadDim>( \
      const LaunchContext&, const AttentionParams&, int64_t, cudaError_t*)
MOBI_INSTANTIATE(half, 64);
MOBI_INSTANTIATE(half, 128);
MOBI_INSTANTIATE(bfloat16, 64);
MOBI_INSTANTIATE(bfloat16, 128);
#undef MOBI_INSTANTIATE

}  // namespace mobi::cuda
