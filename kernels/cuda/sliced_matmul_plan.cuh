// How the decode path is cut: constants, the choices of one launch, and where that puts a warp.
// Shared by the pieces of its kernel (sliced_matmul_decode.cuh) and its launch.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_PLAN_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_PLAN_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {

inline constexpr int kPartsLog = 3;
inline constexpr int kParts = 1 << kPartsLog;  // of the columns; a sum's order depends on it
inline constexpr int kDecodeWarps = kParts;
inline constexpr int kDecodeThreads = 32 * kDecodeWarps;
inline constexpr int kPanelTiles = 2;  // row tiles that a warp works on at once
inline constexpr int kPanelRows = kPanelTiles * kTileRows;
inline constexpr int kPairBytes = 4;                            // {range, offset}
inline constexpr int kTileScaleBytes = kTileRows * kPairBytes;  // 64

// Groups of one tile that a stage of a ring holds at a level.
__host__ __device__ constexpr int GroupsPerStage(int level) { return level > 2 ? 1 : 4 / level; }

// A cluster of 2^cluster_log blocks takes a run of row tiles; each of its blocks takes
// kParts / 2^cluster_log of the parts. A block's warps take one part each; where the block has
// fewer parts than warps, its warps form 2^cluster_log teams that take the run's panels by turns.
struct DecodePlan {
  int cluster_log = 0;
  int run_tiles = 0, long_runs = 0;  // tiles per run; the first long_runs have one more
  int round_panels = 0;              // of a team, between exchanges
  int chunk_groups = 0;              // of each part's x, at a time in shared memory
  int chunks = 0;                    // several only with one round
  int token_log = 0;                 // 2^token_log tokens are kept per tile of 8
  int buffer_tokens = 0;             // tokens in an exchange buffer
  // Offsets in shared memory.
  int x = 0, sums = 0, bias = 0, unit = 0, buffers = 0, levels = 0, shared_bytes = 0;
};

// One warp's place.
struct DecodePlace {
  int lane, warp, team, part;   // part: within the block
  int rank;                     // of the block in its cluster
  int first_tile, num_tiles;    // the run
  int first_group, num_groups;  // the part
  int first_token, num_tokens;

  __device__ __forceinline__ DecodePlace(const SlicedProblem& p, const DecodePlan& plan,
                                         int block_tokens) {
    lane = ptx::LaneId();
    warp = threadIdx.x / 32;
    const int parts_log = kPartsLog - plan.cluster_log;
    team = warp >> parts_log;
    part = warp & ((1 << parts_log) - 1);
    rank = blockIdx.x & ((1 << plan.cluster_log) - 1);
    const int cluster = blockIdx.x >> plan.cluster_log;
    first_tile = cluster * plan.run_tiles + min(cluster, plan.long_runs);
    num_tiles = plan.run_tiles + (cluster < plan.long_runs);
    const int of_all = (rank << parts_log) + part;
    first_group = p.groups * of_all >> kPartsLog;
    num_groups = (p.groups * (of_all + 1) >> kPartsLog) - first_group;
    first_token = blockIdx.y * block_tokens;
    num_tokens = min(p.num_tokens - first_token, block_tokens);
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_PLAN_CUH_
