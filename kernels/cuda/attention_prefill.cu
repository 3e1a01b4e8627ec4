#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/ops.h"

namespace mobi::cuda {
namespace {

constexpr int kRowsPerBlock = kAttentionWarps * kRowsPerWarp;

struct RowTile {
  int seq = -1;
  int first_row = 0;
};

// The row tile with number `index` of the batch: sequences one after another, query_len * group
// rows each. Every warp looks on its own.
__device__ __forceinline__ RowTile FindRowTile(const AttentionParams& p, int index) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int first = 0; first < p.num_seqs; first += 32) {
    const int seq = first + lane;
    int tiles = 0;
    if (seq < p.num_seqs) {
      const int queries = p.query_start[seq + 1] - p.query_start[seq];
      const bool skip = p.separate_decode && queries == 1;
      if (!skip) tiles = (queries * p.group + kRowsPerBlock - 1) / kRowsPerBlock;
    }
    int end = tiles;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int before = __shfl_up_sync(kFullWarp, end, offset);
      if (lane >= offset) end += before;
    }
    const uint32_t found = __ballot_sync(kFullWarp, index < end);
    if (found != 0) {
      const int owner = __ffs(static_cast<int>(found)) - 1;
      const int begin = __shfl_sync(kFullWarp, end - tiles, owner);
      return {first + owner, (index - begin) * kRowsPerBlock};
    }
    index -= __shfl_sync(kFullWarp, end, 31);
  }
  return {};
}

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
  const int g = lane / 4, t = lane % 4, kv_head = static_cast<int>(blockIdx.y);
  AllowNext();
  WaitForPrevious();
  // Late rows see the longest context: they start first.
  const RowTile where = FindRowTile(p, static_cast<int>(gridDim.x - 1 - blockIdx.x));
  if (where.seq < 0) return;
  const int first_query = p.query_start[where.seq];
  const int queries = p.query_start[where.seq + 1] - first_query;
  const int context = p.context_len[where.seq];
  const int32_t* blocks = p.block_table + int64_t{where.seq} * p.block_table_stride;
  const int64_t kv_col = int64_t{kv_head} * kHeadDim;

  const int num_rows = queries * p.group;
  const int last_row = min(where.first_row + kRowsPerBlock, num_rows) - 1;
  const int tiles = (context - queries + last_row / p.group) / kTileTokens + 1;
  int position[2], row[2];
  const T* query[2];
  T* out[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    row[i] = where.first_row + warp * kRowsPerWarp + g + 8 * i;
    const int at = row[i] / p.group, head = kv_head * p.group + row[i] % p.group;
    position[i] = context - queries + at;
    query[i] = row[i] < num_rows ? static_cast<const T*>(p.q) + (first_query + at) * p.q_stride +
                                       int64_t{head} * kHeadDim
                                 : nullptr;
    out[i] = static_cast<T*>(p.out) + (first_query + at) * p.out_stride + int64_t{head} * kHeadDim;
  }
  cache_rows[0][threadIdx.x] = CacheRow(p, blocks, static_cast<int>(threadIdx.x), context);
  __syncthreads();
  CopyTile<T, Tile>(k_tile, p.k, p.k_stride, kv_col, cache_rows[0]);
  CommitCopies();
  CopyTile<T, Tile>(v_tile, p.v, p.v_stride, kv_col, cache_rows[0]);
  CommitCopies();
  uint32_t q[kHeadDim / 16][4];
  LoadQueries<T, kHeadDim>(query[0], query[1], t, q);

  RowState state[2];
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
    if (tile * kTileTokens + kTileTokens - 1 > position[0]) {
      MaskScores<kTiles>(tile * kTileTokens + 2 * t, position[0], position[1], scores);
    }
    float maximum[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      maximum[0] = fmaxf(maximum[0], fmaxf(scores[n][0], scores[n][1]));
      maximum[1] = fmaxf(maximum[1], fmaxf(scores[n][2], scores[n][3]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) maximum[i] = __fmul_rn(QuadMax(maximum[i]), p.scale_log2);
    float runs[4][2];
    Weights<kTiles>(p.scale_log2, maximum[0], maximum[1], scores, runs);
    uint32_t weights[kTileTokens / 16][4];
#pragma unroll
    for (int step = 0; step < kTileTokens / 16; ++step) {
      weights[step][0] = Pack<T>(scores[2 * step][0], scores[2 * step][1]);
      weights[step][1] = Pack<T>(scores[2 * step][2], scores[2 * step][3]);
      weights[step][2] = Pack<T>(scores[2 * step + 1][0], scores[2 * step + 1][1]);
      weights[step][3] = Pack<T>(scores[2 * step + 1][2], scores[2 * step + 1][3]);
    }
    float keep[2], take[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = SumOfRuns(QuadSum(runs[0][i]), QuadSum(runs[1][i]), QuadSum(runs[2][i]),
                                  QuadSum(runs[3][i]));
      state[i].Merge(maximum[i], sum, &keep[i], &take[i]);
    }
    WaitCopies<1>();
    __syncthreads();  // V is here
    float part[kDimTiles][4];
    WeightedValues<T, Tile, kDimTiles>(weights, v_tile, 0, lane, part);
    __syncthreads();  // V is free
    if (tile + 1 < tiles) {
      CopyTile<T, Tile>(v_tile, p.v, p.v_stride, kv_col, next_rows);
    }
    CommitCopies();
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[n][i] = MergeValue(values[n][i], part[n][i], keep[i / 2], take[i / 2]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (row[i] >= num_rows) continue;
    const float normalizer = state[i].Normalizer();
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
      *reinterpret_cast<uint32_t*>(out[i] + 8 * n + 2 * t) = Pack<T>(
          __fmul_rn(values[n][2 * i], normalizer), __fmul_rn(values[n][2 * i + 1], normalizer));
    }
  }
}

}  // namespace

template <typename T, int kHeadDim>
cudaError_t LaunchPrefillAttention(const LaunchContext& context, const AttentionParams& params,
                                   int64_t num_tokens) {
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
