#include <algorithm>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/ops.h"

namespace mobi::cuda {
namespace {

constexpr int kWeightStride =
    kTileTokens + 8;  // of a row of weights in shared memory: no conflicts
constexpr int kMaxClusterBlocks = 8;
constexpr int kBlocksPerSm = 3;

template <int kHeadDim>
constexpr size_t SharedBytes() {
  return 2 * kTileTokens * kHeadDim * 2 + kRowsPerWarp * kWeightStride * 2;
}

// Merges the tiles of the group's heads in order and writes their output. This block does the
// `part`-th of `parts` equal shares of the values.
template <typename T, int kHeadDim>
__device__ __forceinline__ void MergeTiles(const AttentionParams& p, int64_t first_head, int tiles,
                                           int part, int parts, T* out) {
  constexpr int kAhead = 8;
  const int values = p.group * kHeadDim, share = (values + parts - 1) / parts;
  const int end = min((part + 1) * share, values);
  for (int i = part * share + static_cast<int>(threadIdx.x); i < end; i += kAttentionThreads) {
    const int64_t base = (first_head + i / kHeadDim) * p.max_tiles;
    const float2* stats = p.partial_stats + base;
    const float* partial = p.partial + base * kHeadDim + i % kHeadDim;
    RowState row;
    float value = 0;
    for (int first = 0; first < tiles; first += kAhead) {
      float2 stat[kAhead];
      float of_tile[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int tile = min(first + a, tiles - 1);
        stat[a] = __ldcg(stats + tile);
        of_tile[a] = __ldcg(partial + int64_t{tile} * kHeadDim);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (first + a >= tiles) break;
        float keep, take;
        row.Merge(stat[a].x, stat[a].y, &keep, &take);
        value = MergeValue(value, of_tile[a], keep, take);
      }
    }
    out[i] = FromFloat<T>(__fmul_rn(value, row.Normalizer()));
  }
}

// Rotates the query rows in their fragments: columns d and d + head_dim / 2 of a row are the same
// lane's, half the steps apart.
template <typename T, int kHeadDim>
struct QueryAngles {
  static constexpr int kHalf = kHeadDim / 32;  // steps
  float2 cos[kHalf][2], sin[kHalf][2];

  // `at`: of the token's row in the tables.
  __device__ __forceinline__ void Load(const DecodeRope& rope, int64_t at, int t) {
#pragma unroll
    for (int step = 0; step < kHalf; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t col = at + step * 16 + 8 * i + 2 * t;
        cos[step][i] = *reinterpret_cast<const float2*>(rope.cos + col);
        sin[step][i] = *reinterpret_cast<const float2*>(rope.sin + col);
      }
    }
  }

  __device__ __forceinline__ void Turn(uint32_t (&q)[kHeadDim / 16][4]) const {
#pragma unroll
    for (int step = 0; step < kHalf; ++step) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        uint32_t& low = q[step][e];
        uint32_t& high = q[step + kHalf][e];
        const float2 a = Unpack<T>(low), b = Unpack<T>(high);
        const float2 c = cos[step][e / 2], s = sin[step][e / 2];
        const float2 first = Rotate(a.x, b.x, c.x, s.x);
        const float2 second = Rotate(a.y, b.y, c.y, s.y);
        low = Pack<T>(first.x, second.x);
        high = Pack<T>(first.y, second.y);
      }
    }
  }
};

// The step's own token in the tile that holds it: its k and v go to the cache and, as the copies
// brought older bytes, to row `row` of the tile in shared memory. One element pair per thread.
template <typename T, int kHeadDim>
struct OwnToken {
  T k[2], v[2];
  float cos, sin;

  __device__ __forceinline__ static int Dim() {
    return static_cast<int>(threadIdx.x) % (kHeadDim / 2);
  }

  // `at`: of the token's row in the tables.
  __device__ __forceinline__ void LoadAngles(const DecodeRope& rope, int64_t at) {
    cos = rope.cos[at + Dim()], sin = rope.sin[at + Dim()];
  }

  __device__ __forceinline__ void Load(const AttentionParams& p, int query, int kv_head) {
    const T* at = static_cast<const T*>(p.q) + query * p.q_stride +
                  (int64_t{p.num_kv_heads} * p.group + kv_head) * kHeadDim + Dim();
    const float2 turned = Rotate(ToFloat(at[0]), ToFloat(at[kHeadDim / 2]), cos, sin);
    k[0] = FromFloat<T>(turned.x), k[1] = FromFloat<T>(turned.y);
    at += int64_t{p.num_kv_heads} * kHeadDim;
    v[0] = at[0], v[1] = at[kHeadDim / 2];
  }

  // Both halves of a row in shared memory, and the cache.
  __device__ __forceinline__ static void Put(uint8_t* tile, int row, const T (&values)[2],
                                             T* cached) {
    if (threadIdx.x >= kHeadDim / 2) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int col = Dim() + i * kHeadDim / 2;
      *reinterpret_cast<T*>(tile + TileOffset<kHeadDim>(row, col / 8) + col % 8 * 2) = values[i];
      cached[col] = values[i];
    }
  }
};

// A block takes tiles blockIdx.x, + gridDim.x, ... of one sequence and kv head; the rows of its mma
// are the group's heads. Warps share a tile: 32 tokens each for the scores, a part of the dims each
// for the values. The blocks of one sequence and kv head are a cluster and merge together, or,
// without clusters, the last of them to arrive merges. Where the step's own token comes with q, the
// cache holds what earlier steps wrote, and tiles are asked for before the previous kernel has
// ended: what a step uploads was there before its first kernel began.
template <typename T, int kHeadDim, bool kClusters>
__global__ void __launch_bounds__(kAttentionThreads)
    DecodeAttentionKernel(const __grid_constant__ AttentionParams p) {
  constexpr int kDimTiles = kHeadDim >= 64 ? kHeadDim / 8 / kAttentionWarps : 2;
  constexpr int kTileBytes = kTileTokens * kHeadDim * 2;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float maxima[kAttentionWarps][kRowsPerWarp], sums[kAttentionWarps][kRowsPerWarp];
  __shared__ int rows[2][kTileTokens];
  __shared__ int flag;
  T* weights = reinterpret_cast<T*>(shared + 2 * kTileBytes);
  const uint32_t k_tile = SharedAddress(shared), v_tile = k_tile + kTileBytes;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int g = lane / 4, t = lane % 4;
  AllowNext();
  const bool with_rope = p.rope.cos != nullptr;
  if (!with_rope) WaitForPrevious();
  const int seq = p.first_seq + static_cast<int>(blockIdx.z);
  const int kv_head = static_cast<int>(blockIdx.y);
  const int32_t* blocks = p.block_table + int64_t{seq} * p.block_table_stride;
  int tile = static_cast<int>(blockIdx.x);
  // Read before it is known whether the sequence is that long, to save a round trip.
  const int own = tile * kTileTokens + tid;
  const int own_block = own / p.block_size < p.block_table_stride ? blocks[own / p.block_size] : 0;
  const int query = p.query_start[seq];
  const int queries = p.query_start[seq + 1] - query;
  const int context = p.context_len[seq];
  if (queries != 1) {
    WaitForPrevious();  // a kernel that ends tells the next that all before it have ended
    return;
  }
  const int tiles = (context + kTileTokens - 1) / kTileTokens;
  const int64_t kv_col = int64_t{kv_head} * kHeadDim;
  const int64_t first_head = (int64_t{blockIdx.z} * p.num_kv_heads + kv_head) * p.group;

  uint32_t q[kHeadDim / 16][4];
  QueryAngles<T, kHeadDim> angles;
  OwnToken<T, kHeadDim> own_token;
  int own_slot = -1;
  if (with_rope && tile < tiles) {
    const int64_t at = p.rope.positions[query] * p.rope.table_stride;
    angles.Load(p.rope, at, t);
    own_token.LoadAngles(p.rope, at);
    own_slot = p.rope.slots[query];
  }
  if (tile < tiles) {
    rows[0][tid] = own < context ? own_block * p.block_size + own % p.block_size : -1;
    __syncthreads();
    CopyTile<T, kHeadDim>(k_tile, p.k, p.k_stride, kv_col, rows[0]);
    CommitCopies();
    CopyTile<T, kHeadDim>(v_tile, p.v, p.v_stride, kv_col, rows[0]);
    CommitCopies();
  }
  if (with_rope) WaitForPrevious();
  if (tile < tiles) {
    const T* head = static_cast<const T*>(p.q) + query * p.q_stride +
                    (int64_t{kv_head} * p.group + g) * kHeadDim;
    LoadQueries<T, kHeadDim>(g < p.group ? head : nullptr,
                             g + 8 < p.group ? head + 8 * kHeadDim : nullptr, t, q);
    if (with_rope) {
      own_token.Load(p, query, kv_head);
      angles.Turn(q);
    }
  }
  for (int buffer = 0; tile < tiles; tile += static_cast<int>(gridDim.x), buffer ^= 1) {
    const int next = tile + static_cast<int>(gridDim.x);
    const int own_row = (context - 1) % kTileTokens;
    const bool owns = tile == tiles - 1 && own_slot >= 0;
    if (next < tiles) {
      rows[buffer ^ 1][tid] = CacheRow(p, blocks, next * kTileTokens + tid, context);
    }
    WaitCopies<1>();
    __syncthreads();  // K is here
    if (owns) {
      own_token.Put(shared, own_row, own_token.k,
                    static_cast<T*>(const_cast<void*>(p.k)) + own_slot * p.k_stride + kv_col);
      __syncthreads();
    }
    float scores[4][4];
    Scores<T, kHeadDim, 4>(q, k_tile, 32 * warp, lane, scores);
    MaskScores<4>(tile * kTileTokens + 32 * warp + 2 * t, context - 1, context - 1, scores);
    float maximum0 = -INFINITY, maximum1 = -INFINITY;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      maximum0 = fmaxf(maximum0, fmaxf(scores[n][0], scores[n][1]));
      maximum1 = fmaxf(maximum1, fmaxf(scores[n][2], scores[n][3]));
    }
    maximum0 = QuadMax(maximum0), maximum1 = QuadMax(maximum1);
    if (t == 0) maxima[warp][g] = maximum0, maxima[warp][g + 8] = maximum1;
    __syncthreads();  // the maxima are here, K is free
    if (next < tiles) {
      CopyTile<T, kHeadDim>(k_tile, p.k, p.k_stride, kv_col, rows[buffer ^ 1]);
    }
    CommitCopies();
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      maximum0 = fmaxf(maximum0, maxima[w][g]);
      maximum1 = fmaxf(maximum1, maxima[w][g + 8]);
    }
    maximum0 = __fmul_rn(maximum0, p.scale_log2), maximum1 = __fmul_rn(maximum1, p.scale_log2);
    float run[1][2];
    Weights<4>(p.scale_log2, maximum0, maximum1, scores, run);
    const float sum0 = QuadSum(run[0][0]), sum1 = QuadSum(run[0][1]);
    if (t == 0) sums[warp][g] = sum0, sums[warp][g + 8] = sum1;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      T* at = weights + g * kWeightStride + 32 * warp + 8 * n + 2 * t;
      *reinterpret_cast<uint32_t*>(at) = Pack<T>(scores[n][0], scores[n][1]);
      *reinterpret_cast<uint32_t*>(at + 8 * kWeightStride) = Pack<T>(scores[n][2], scores[n][3]);
    }
    WaitCopies<1>();
    __syncthreads();  // V, the weights and the sums are here
    if (owns) {
      own_token.Put(shared + kTileBytes, own_row, own_token.v,
                    static_cast<T*>(const_cast<void*>(p.v)) + own_slot * p.v_stride + kv_col);
      __syncthreads();
    }
    uint32_t a[kTileTokens / 16][4];
    LoadQueries<T, kTileTokens>(weights + g * kWeightStride, weights + (g + 8) * kWeightStride, t,
                                a);
    float values[kDimTiles][4];
    const bool has_dims = warp * kDimTiles * 8 < kHeadDim;
    if (has_dims) {
      WeightedValues<T, kHeadDim, kDimTiles>(a, v_tile, warp * kDimTiles, lane, values);
    }
    float tile_sum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = g + 8 * i;
      tile_sum[i] = SumOfRuns(sums[0][row], sums[1][row], sums[2][row], sums[3][row]);
    }
    __syncthreads();  // V, the weights and the sums are free
    if (next < tiles) {
      CopyTile<T, kHeadDim>(v_tile, p.v, p.v_stride, kv_col, rows[buffer ^ 1]);
    }
    CommitCopies();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (g + 8 * i >= p.group || !has_dims) continue;
      const int64_t at = (first_head + g + 8 * i) * p.max_tiles + tile;
      float* to = p.partial + at * kHeadDim + warp * kDimTiles * 8 + 2 * t;
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
        *reinterpret_cast<float2*>(to + 8 * n) =
            make_float2(values[n][2 * i], values[n][2 * i + 1]);
      }
      if (warp == 0 && t == 0) {
        p.partial_stats[at] = make_float2(i == 0 ? maximum0 : maximum1, tile_sum[i]);
      }
    }
  }
  int part = 0, parts = 1;
  if constexpr (kClusters) {
    part = static_cast<int>(blockIdx.x), parts = static_cast<int>(gridDim.x);
    ClusterSync();
  } else {
    uint32_t* counter = p.counters + blockIdx.z * p.num_kv_heads + kv_head;
    if (!ArriveLast(counter, gridDim.x, &flag)) return;
  }
  T* out = static_cast<T*>(p.out) + query * p.out_stride + int64_t{kv_head} * p.group * kHeadDim;
  MergeTiles<T, kHeadDim>(p, first_head, tiles, part, parts, out);
}

}  // namespace

template <typename T, int kHeadDim>
cudaError_t LaunchDecodeAttention(const LaunchContext& context, AttentionParams params,
                                  int max_context_len) {
  params.max_tiles = static_cast<int>(CeilDiv(max_context_len, kTileTokens));
  const int64_t partials = int64_t{params.num_kv_heads} * params.group * params.max_tiles;
  const size_t bytes_per_seq = partials * (kHeadDim * sizeof(float) + sizeof(float2));
  const int seqs_at_once = static_cast<int>(
      std::min<int64_t>(context.num_counters / params.num_kv_heads,
                        static_cast<int64_t>(context.scratch_bytes / bytes_per_seq)));
  if (seqs_at_once < 1) return cudaErrorInvalidValue;
  params.partial = reinterpret_cast<float*>(context.scratch);
  params.counters = context.counters;
  for (int first = 0; first < params.num_seqs; first += seqs_at_once) {
    const int seqs = std::min(seqs_at_once, params.num_seqs - first);
    params.first_seq = first;
    params.partial_stats = reinterpret_cast<float2*>(params.partial + seqs * partials * kHeadDim);
    // As many blocks as run at once, if there are tiles for them; each loops over its tiles.
    const int wanted = std::clamp(kBlocksPerSm * context.num_sms / (seqs * params.num_kv_heads), 1,
                                  params.max_tiles);
    cudaError_t error = cudaSuccess;
    if (context.clusters) {
      uint32_t splits = 1;
      while (2 * splits <= std::min<uint32_t>(wanted, kMaxClusterBlocks)) splits *= 2;
      error = LaunchClusters(context, splits, DecodeAttentionKernel<T, kHeadDim, true>,
                             dim3(splits, params.num_kv_heads, seqs), kAttentionThreads,
                             SharedBytes<kHeadDim>(), params);
    } else {
      error = Launch(context, DecodeAttentionKernel<T, kHeadDim, false>,
                     dim3(wanted, params.num_kv_heads, seqs), kAttentionThreads,
                     SharedBytes<kHeadDim>(), params);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

#define MOBI_INSTANTIATE(T, kHeadDim)                                                            \
  template cudaError_t LaunchDecodeAttention<T, kHeadDim>(const LaunchContext&, AttentionParams, \
                                                          int)
MOBI_INSTANTIATE(half, 32);
MOBI_INSTANTIATE(half, 64);
MOBI_INSTANTIATE(half, 128);
MOBI_INSTANTIATE(bfloat16, 32);
MOBI_INSTANTIATE(bfloat16, 64);
MOBI_INSTANTIATE(bfloat16, 128);
#undef MOBI_INSTANTIATE

}  // namespace mobi::cuda
