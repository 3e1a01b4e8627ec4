// How the decode path on compute capability 9.0 is cut: constants, the choices of one launch, and
// where that puts a warp. Shared by the pieces of its kernel (sliced_matmul_decode90.cuh) and its
// launch.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_PLAN_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_PLAN_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_plan.cuh"
#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {

inline constexpr int kUnitTiles = 4;  // row tiles of a unit: one for each warp of a warpgroup
inline constexpr int kUnitRows = kUnitTiles * kTileRows;
// Up to so many tokens are multiplied by mma, each warp for itself; more by wgmma, which reads x
// once for four warps.
template <int N>
inline constexpr bool kUsesMma = N <= 8;
inline constexpr int kTileTokens = 4;  // of a tile of 8 columns: two for each
inline constexpr int kTileXBytes = 2 * kTileTokens * kGroupSize;  // of a group
inline constexpr int kStages = 2;  // of a warp's ring: more are slower, the first fill is longer
inline constexpr int kPrefetchBytes = 4096;  // per warp, of the first slice
inline constexpr int kChunkRows = 8;  // of a unit: what one warp's lanes hold of one row half

// One stage of a warp's ring: 4 slices of one group, 2 slices of two, or one slice of four, and
// the pairs of range and offset.
inline constexpr int kWarpStageScales = 4 * kTileBytes;
inline constexpr int kWarpStageBytes = kWarpStageScales + 4 * kTileScaleBytes;

struct Decode90Plan {
  int parts_log = 0;                 // 2^parts_log parts per block: the cluster has the others
  int run_units = 0, long_runs = 0;  // units per cluster; the first long_runs have one more
  int round_units = 0;               // that the block's warpgroups have at a time
  int rounds = 0, long_rounds = 0;   // of a short and of a long run
  int round_buffers = 2;             // for exchanges, of each unit of a round
  bool one_each = false;             // round_buffers are as many as rounds
  int pairs_log = 0;                 // 2^pairs_log pairs of tokens are staged
  int tokens_log = 0;                // of at most four tokens, 2^tokens_log are exchanged
  // Offsets in shared memory; x is at 0.
  int ring = 0, terms = 0, buffers = 0, levels = 0, barriers = 0;
  // Of a kernel that routes by itself. Halves of x: 0, in the place of x; W1: of so many turns.
  int head = 0, head_barriers = 0, halves = 0, w1 = 0, w1_turns = 0;
  int shared_bytes = 0;
};

inline constexpr int kSharedBytes = 227 * 1024;  // of a block that has a multiprocessor for itself

// ---- Host side.

inline int MostRounds(const Decode90Plan& plan) {
  return plan.long_runs > 0 ? plan.long_rounds : plan.rounds;
}

// Cuts the rows for `clusters` clusters of blocks of W warpgroups; plan.parts_log is given.
template <int W>
void CutRows(int units, int clusters, Decode90Plan& plan) {
  plan.round_units = W >> plan.parts_log;
  plan.run_units = units / clusters;
  plan.long_runs = units % clusters;
  plan.rounds = (plan.run_units + plan.round_units - 1) / plan.round_units;
  plan.long_rounds = plan.run_units / plan.round_units + 1;
  plan.one_each = MostRounds(plan) <= plan.round_buffers;
}

// What a block gets of one part's sums of one chunk of rows.
template <int N>
__host__ __device__ constexpr int ExchangedBytes(const Decode90Plan& plan) {
  return kChunkRows * 4 * (N == kTileTokens ? 1 << plan.tokens_log : N);
}

// How many tokens are staged and exchanged.
inline void CountTokens(int num_tokens, Decode90Plan& plan) {
  while (2 << plan.pairs_log < num_tokens) ++plan.pairs_log;
  while (plan.tokens_log < 2 && 1 << plan.tokens_log < num_tokens) ++plan.tokens_log;
}

// Lays out shared memory; `groups` of x, `head_bytes` for a router.
template <int N, int W>
void LayOut(int groups, int head_bytes, Decode90Plan& plan) {
  int at = 0;
  const auto take = [&at](int bytes) {
    const int begin = at;
    at += (bytes + 127) / 128 * 128;
    return begin;
  };
  const int parts = 1 << plan.parts_log;
  take(groups * N / kTileTokens * kTileXBytes);
  plan.ring = take(4 * W * kStages * kWarpStageBytes);
  plan.terms = take(groups * N * 8);
  plan.buffers =
      take(plan.round_units * plan.round_buffers * kParts * parts * ExchangedBytes<N>(plan));
  plan.levels = take(kMaxSegments * N);
  plan.barriers = take(plan.round_buffers * W * 8);
  plan.head = take(head_bytes);
  plan.head_barriers = take(head_bytes > 0 ? 24 : 0);
  plan.shared_bytes = at;
}

// False: it does not fit.
template <int N, int W>
bool FitShared(const SlicedProblem& problem, int head_bytes, Decode90Plan& plan) {
  const int groups = ((problem.groups << plan.parts_log) + kParts - 1) / kParts;
  LayOut<N, W>(groups, head_bytes, plan);
  return plan.shared_bytes <= kSharedBytes;
}

// Of a launch in clusters of 2^(kPartsLog - plan.parts_log) blocks; attributes: two.
inline cudaLaunchConfig_t Configure(const SlicedMatmulLaunch& launch, const Decode90Plan& plan,
                                    int clusters, int token_blocks, int threads,
                                    cudaLaunchAttribute* attributes) {
  const unsigned size = kParts >> plan.parts_log;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {size, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * size, token_blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = launch.stream;
  config.attrs = attributes;
  config.numAttrs = launch.pdl ? 2 : 1;
  return config;
}

// ---- Device side.

// One warp's place.
struct Decode90Place {
  const SlicedProblem& p;
  const Decode90Plan& plan;
  uint8_t* shared;
  int lane, warp, own;            // own: the warp's place in its warpgroup, its tile of a unit
  int rank;                       // of the block in its cluster
  int first_unit, num_units;      // the cluster's run
  int slot, rounds;               // this warpgroup's unit among those of a round
  int part, begin, end;           // its part; the part's groups, counted from the block's first
  int first_group, block_groups;  // the block's columns
  int first_token, num_tokens;

  __device__ __forceinline__ Decode90Place(const SlicedProblem& p, const Decode90Plan& plan,
                                           uint8_t* shared, int block_tokens)
      : p(p), plan(plan), shared(shared) {
    lane = ptx::LaneId();
    warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same for all lanes, as the compiler sees
    own = warp % 4;
    const int warpgroup = warp / 4, cluster_log = kPartsLog - plan.parts_log;
    rank = blockIdx.x & ((1 << cluster_log) - 1);
    const int cluster = blockIdx.x >> cluster_log;
    first_unit = cluster * plan.run_units + min(cluster, plan.long_runs);
    num_units = plan.run_units + (cluster < plan.long_runs);
    slot = warpgroup >> plan.parts_log;
    rounds = cluster < plan.long_runs ? plan.long_rounds : plan.rounds;
    first_group = FirstGroup(rank << plan.parts_log);
    block_groups = FirstGroup((rank + 1) << plan.parts_log) - first_group;
    part = (rank << plan.parts_log) + (warpgroup & ((1 << plan.parts_log) - 1));
    begin = FirstGroup(part) - first_group;
    end = FirstGroup(part + 1) - first_group;
    first_token = blockIdx.y * block_tokens;
    num_tokens = min(p.num_tokens - first_token, block_tokens);
  }

  __device__ __forceinline__ int Tiles() const { return p.rows / kTileRows; }
  __device__ __forceinline__ int UnitOf(int round) const {
    return first_unit + round * plan.round_units + slot;
  }
  __device__ __forceinline__ bool HasUnit(int round) const {
    return round * plan.round_units + slot < num_units;
  }
  __device__ __forceinline__ int MyRounds() const { return rounds - !HasUnit(rounds - 1); }
  __device__ __forceinline__ int FirstGroup(int part) const { return p.groups * part >> kPartsLog; }
  __device__ __forceinline__ uint32_t FirstOf(int round) const {
    return static_cast<uint32_t>(TileOf(UnitOf(round), own) * p.groups + first_group + begin);
  }
  // Tiles beyond the last repeat it; nothing of them is stored.
  __device__ __forceinline__ int TileOf(int unit, int place) const {
    return min(unit * kUnitTiles + place, Tiles() - 1);
  }
  __device__ __forceinline__ int SegmentOf(int tile) const {
    return (tile >= p.segment_tiles[0]) + (tile >= p.segment_tiles[1]);
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_PLAN_CUH_
