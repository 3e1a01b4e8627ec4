#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_prefill.cuh"
#include "kernels/cuda/ops.h"

namespace mobi::cuda {
namespace {

constexpr int kRowsPerBlock = kAttentionWarps * kRowsPerWarp;

// One block: 64 rows (query, head) of one sequence and kv head, 16 to a warp, over all tiles that
// they see. K of the next tile arrives while V is used, V while K is used.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    PrefillAttentionKernel(const __grid_constant__ AttentionParams p) {
  using Tile = KvTile<kHeadDim>;
  constexpr int kTiles = kTileTokens / 8, kDimTiles = kHeadDim / 8;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ int cache_rows[2][kTileTokens];
  const uint32_t k_tile = SharedAddress(shared), v_tile = k_tile + Tile::kBytes;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int kv_head = static_cast<int>(blockIdx.y);
  AllowNext();
  WaitForPrevious();
  // Late rows see the longest context: they start first.
  const RowTile where = FindRowTile<kRowsPerBlock>(p, static_cast<int>(gridDim.x - 1 - blockIdx.x));
  if (where.seq < 0) return;
  const PrefillSequence sequence(p, where.seq);
  const int context = sequence.context;
  const int32_t* const blocks = sequence.blocks;
  const int64_t kv_col = int64_t{kv_head} * kHeadDim;
  const int tiles = sequence.Tiles(p, where.first_row + kRowsPerBlock);
  PrefillRows<T, kHeadDim> rows(p, sequence, kv_head, where.first_row + warp * kRowsPerWarp);
  cache_rows[0][threadIdx.x] = CacheRow(p, blocks, static_cast<int>(threadIdx.x), context);
  __syncthreads();
  CopyTile<T, Tile>(k_tile, p.k, p.k_stride, kv_col, cache_rows[0]);
  CommitCopies();
  CopyTile<T, Tile>(v_tile, p.v, p.v_stride, kv_col, cache_rows[0]);
  CommitCopies();
  uint32_t q[kHeadDim / 16][4];
  rows.Load(q);

  float values[kDimTiles][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    const int* next_rows = cache_rows[(tile + 1) % 2];
    cache_rows[(tile + 1) % 2][threadIdx.x] =
        CacheRow(p, blocks, (tile + 1) * kTileTokens + static_cast<int>(threadIdx.x), context);
    WaitCopies<1>();
    __syncthreads();  // K is here
    float scores[kTiles][4];
    Scores<T, Tile, kTiles>(q, k_tile, 0, lane, scores);
    __syncthreads();  // K is free
    if (tile + 1 < tiles) {
      CopyTile<T, Tile>(k_tile, p.k, p.k_stride, kv_col, next_rows);
    }
    CommitCopies();
    uint32_t weights[kTileTokens / 16][4];
    rows.Weigh(tile, scores, weights);
    WaitCopies<1>();
    __syncthreads();  // V is here
    float part[kDimTiles][4];
    WeightedValues<T, Tile, kDimTiles>(weights, v_tile, 0, lane, part);
    __syncthreads();  // V is free
    if (tile + 1 < tiles) {
      CopyTile<T, Tile>(v_tile, p.v, p.v_stride, kv_col, next_rows);
    }
    CommitCopies();
    rows.Merge(part, values);
  }
  rows.Store(values);
}

}  // namespace

template <typename T, int kHeadDim>
cudaError_t LaunchPrefillAttention(const LaunchContext& context, const AttentionParams& params,
                                   int64_t num_tokens) {
  if constexpr (kHeadDim >= kLeastHeadDim90) {
    cudaError_t error;
    if (LaunchPrefillAttention90<T, kHeadDim>(context, params, num_tokens, &error)) return error;
  }
  // At most this many row tiles: one partly filled per sequence.
  const dim3 grid(CeilDiv(num_tokens * params.group, kRowsPerBlock) + params.num_seqs,
                  params.num_kv_heads);
  return Launch(context, PrefillAttentionKernel<T, kHeadDim>, grid, kAttentionThreads,
                2 * KvTile<kHeadDim>::kBytes, params);
}

#define MOBI_INSTANTIATE(T, kHeadDim)                                            \
  template cudaError_t LaunchPrefillAttention<T, kHeadDim>(const LaunchContext&, \
                                                           const AttentionParams&, int64_t)
MOBI_INSTANTIATE(half, 32);
MOBI_INSTANTIATE(half, 64);
MOBI_INSTANTIATE(half, 128);
MOBI_INSTANTIATE(bfloat16, 32);
MOBI_INSTANTIATE(bfloat16, 64);
MOBI_INSTANTIATE(bfloat16, 128);
#undef MOBI_INSTANTIATE

}  // namespace mobi::cuda
