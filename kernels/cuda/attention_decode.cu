// Attention of sequences with one query each: a block for a sequence, a kv head and a share of the
// tiles, whose results meet in the block's registers, in its cluster's shared memory, or in
// scratch.
#include <algorithm>
#include <cstdint>
#include <utility>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/ops.h"

namespace mobi::cuda {
namespace {

constexpr int kWeightStride =
    kTileTokens + 8;  // of a row of weights in shared memory: no conflicts
constexpr int kMaxClusterBlocks = 8;
constexpr int kBlocksPerSm = 3;

// Where a block keeps the results of its tiles for its cluster, behind K, V and the weights:
// [tile of the block][head of the group][head_dim], then their (maximum, sum).
template <int kHeadDim>
struct KeptTiles {
  static constexpr int kBegin = 2 * KvTile<kHeadDim>::kBytes + kRowsPerWarp * kWeightStride * 2;

  int tiles, group;

  __host__ __device__ constexpr int Values(int tile, int head) const {
    return kBegin + (tile * group + head) * kHeadDim * static_cast<int>(sizeof(float));
  }
  __host__ __device__ constexpr int Stats(int tile, int head) const {
    return Values(tiles, 0) + (tile * group + head) * static_cast<int>(sizeof(float2));
  }
  constexpr int Bytes() const { return Stats(tiles, 0); }
};

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
    k[0] = at[0], k[1] = at[kHeadDim / 2];
    at += int64_t{p.num_kv_heads} * kHeadDim;
    v[0] = at[0], v[1] = at[kHeadDim / 2];
  }

  __device__ __forceinline__ void Turn() {
    const float2 turned = Rotate(ToFloat(k[0]), ToFloat(k[1]), cos, sin);
    k[0] = FromFloat<T>(turned.x), k[1] = FromFloat<T>(turned.y);
  }

  // Both halves of a row in shared memory, and the cache.
  __device__ __forceinline__ static void Put(uint8_t* tile, int row, const T (&values)[2],
                                             T* cached) {
    if (threadIdx.x >= kHeadDim / 2) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int col = Dim() + i * kHeadDim / 2;
      *reinterpret_cast<T*>(tile + KvTile<kHeadDim>::Offset(row, col / 8) + col % 8 * 2) =
          values[i];
      cached[col] = values[i];
    }
  }
};

template <int kHeadDim>
inline constexpr int kWarpDimTiles = kHeadDim >= 64 ? kHeadDim / 8 / kAttentionWarps : 2;

// A block takes tiles blockIdx.x, + gridDim.x, ... of one sequence and kv head; the rows of its mma
// are the group's heads. Warps share a tile: 32 tokens each for the scores, a part of the dims each
// for the values. Results are merged in the order of tiles: where one block has them all, as they
// come; else by the blocks of a cluster together, or, without clusters, by the last to arrive.
// Where the step's own token comes with q, the cache holds what earlier steps wrote, and tiles are
// asked for before the previous kernel has ended: what a step uploads was there before its first
// kernel began.
template <typename T, int kHeadDim>
struct DecodeAttention {
  using Tile = KvTile<kHeadDim>;
  static constexpr int kDimTiles = kWarpDimTiles<kHeadDim>;
  using Values = float[kDimTiles][4];

  struct Shared {
    float maxima[kAttentionWarps][kRowsPerWarp], sums[kAttentionWarps][kRowsPerWarp];
    typename TileCopies<T, kHeadDim>::Shared copies;
    int flag;
  };

  // Of this lane's two rows.
  struct Stats {
    float maximum[2], sum[2];
  };

  const AttentionParams& p;
  Shared& s;
  uint8_t* shared;
  int warp, lane, g, t;
  int seq, kv_head, query = 0, context = 0, tiles = 0;
  int64_t first_head;
  TileCopies<T, kHeadDim> copies;
  uint32_t q[kHeadDim / 16][4];
  OwnToken<T, kHeadDim> own_token;
  int own_slot = -1;  // of the cache, where the block's last tile has the step's own token

  __device__ __forceinline__ DecodeAttention(const AttentionParams& p, const CacheMaps& maps,
                                             uint8_t* shared, Shared& s)
      : p(p),
        s(s),
        shared(shared),
        copies{p, maps, s.copies,
               p.block_table +
                   int64_t{p.first_seq + static_cast<int>(blockIdx.z)} * p.block_table_stride} {
    warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    g = lane / 4, t = lane % 4;
    seq = p.first_seq + static_cast<int>(blockIdx.z), kv_head = static_cast<int>(blockIdx.y);
    first_head = (int64_t{blockIdx.z} * p.num_kv_heads + kv_head) * p.group;
    copies.k_tile = SharedAddress(shared), copies.v_tile = copies.k_tile + Tile::kBytes;
    copies.first_col = kv_head * kHeadDim;
  }

  __device__ __forceinline__ T* Weights() const {
    return reinterpret_cast<T*>(shared + 2 * Tile::kBytes);
  }
  __device__ __forceinline__ bool HasDims() const { return warp * kDimTiles * 8 < kHeadDim; }

  // The first tile is under way and q is here; false: the sequence is not this kernel's. What q
  // needs is asked for before V, behind which it would wait.
  __device__ __forceinline__ bool Begin() {
    const bool with_rope = p.rope.cos != nullptr;
    const int tile = static_cast<int>(blockIdx.x);
    copies.Begin();
    if (!with_rope) WaitForPrevious();
    copies.Look(tile);
    query = p.query_start[seq];
    const int queries = p.query_start[seq + 1] - query;
    context = p.context_len[seq];
    // With rope every sequence has one token, and so its number.
    const int64_t position = with_rope ? p.rope.positions[seq] : 0;
    const int slot = with_rope ? p.rope.slots[seq] : -1;
    if (queries != 1) {
      WaitForPrevious();  // a kernel that ends tells the next that all before it have ended
      return false;
    }
    tiles = (context + kTileTokens - 1) / kTileTokens;
    copies.SetCount(tile, context);
    QueryAngles<T, kHeadDim> angles;
    if (with_rope && tile < tiles) {
      angles.Load(p.rope, position * p.rope.table_stride, t);
      own_token.LoadAngles(p.rope, position * p.rope.table_stride);
    }
    copies.AskK();
    if (with_rope) WaitForPrevious();
    if (tile < tiles) {
      const T* head = static_cast<const T*>(p.q) + query * p.q_stride +
                      (int64_t{kv_head} * p.group + g) * kHeadDim;
      LoadQueries<T, kHeadDim>(g < p.group ? head : nullptr,
                               g + 8 < p.group ? head + 8 * kHeadDim : nullptr, t, q);
      if (with_rope) own_token.Load(p, query, kv_head);
    }
    copies.AskV();
    if (with_rope && tile < tiles) {
      own_slot = slot;
      own_token.Turn();
      angles.Turn(q);
    }
    return true;
  }

  __device__ __forceinline__ bool Owns(int tile) const {
    return tile == tiles - 1 && own_slot >= 0;
  }

  // The step's own token where the copies brought older bytes.
  __device__ __forceinline__ void PutOwn(uint8_t* tile, const T (&values)[2], const void* cache,
                                         int64_t stride) const {
    T* const cached =
        static_cast<T*>(const_cast<void*>(cache)) + own_slot * stride + int64_t{kv_head} * kHeadDim;
    own_token.Put(tile, (context - 1) % kTileTokens, values, cached);
    __syncthreads();
  }

  // This warp's scores of a tile become weights in shared memory; K is asked for anew.
  __device__ __forceinline__ void MultiplyK(int tile, float (&maximum)[2]) {
    copies.AwaitK();
    if (Owns(tile)) PutOwn(shared, own_token.k, p.k, p.k_stride);
    float scores[4][4];
    Scores<T, Tile, 4>(q, copies.k_tile, 32 * warp, lane, scores);
    MaskScores<4>(tile * kTileTokens + 32 * warp + 2 * t, context - 1, context - 1, scores);
    maximum[0] = maximum[1] = -INFINITY;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      maximum[0] = fmaxf(maximum[0], fmaxf(scores[n][0], scores[n][1]));
      maximum[1] = fmaxf(maximum[1], fmaxf(scores[n][2], scores[n][3]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      maximum[i] = QuadMax(maximum[i]);
      if (t == 0) s.maxima[warp][g + 8 * i] = maximum[i];
    }
    __syncthreads();  // the maxima are here, K is free
    copies.AskK();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int w = 0; w < kAttentionWarps; ++w) {
        maximum[i] = fmaxf(maximum[i], s.maxima[w][g + 8 * i]);
      }
      maximum[i] = __fmul_rn(maximum[i], p.scale_log2);
    }
    float run[1][2];
    cuda::Weights<4>(p.scale_log2, maximum[0], maximum[1], scores, run);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = QuadSum(run[0][i]);
      if (t == 0) s.sums[warp][g + 8 * i] = sum;
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      T* const at = Weights() + g * kWeightStride + 32 * warp + 8 * n + 2 * t;
      *reinterpret_cast<uint32_t*>(at) = Pack<T>(scores[n][0], scores[n][1]);
      *reinterpret_cast<uint32_t*>(at + 8 * kWeightStride) = Pack<T>(scores[n][2], scores[n][3]);
    }
  }

  // This warp's dims of the tile's values, and the sums of its weights; V is asked for anew.
  __device__ __forceinline__ void MultiplyV(int tile, Values& values, float (&sum)[2]) {
    copies.AwaitV();  // and the weights and the sums
    if (Owns(tile)) PutOwn(shared + Tile::kBytes, own_token.v, p.v, p.v_stride);
    uint32_t a[kTileTokens / 16][4];
    const T* const weights = Weights() + g * kWeightStride;
    LoadQueries<T, kTileTokens>(weights, weights + 8 * kWeightStride, t, a);
    if (HasDims()) {
      WeightedValues<T, Tile, kDimTiles>(a, copies.v_tile, warp * kDimTiles, lane, values);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = g + 8 * i;
      sum[i] = SumOfRuns(s.sums[0][row], s.sums[1][row], s.sums[2][row], s.sums[3][row]);
    }
    __syncthreads();  // V, the weights and the sums are free
    copies.AskV();
  }

  // take(tile, values, stats): for each of the block's tiles.
  template <typename Take>
  __device__ __forceinline__ void ForTiles(const Take& take) {
    const int step = static_cast<int>(gridDim.x);
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += step) {
      copies.Look(tile + step);
      copies.SetCount(tile + step, context);
      Values values;
      Stats stats;
      MultiplyK(tile, stats.maximum);
      MultiplyV(tile, values, stats.sum);
      take(tile, values, stats);
    }
  }

  // Where the group's output begins.
  __device__ __forceinline__ T* Out() const {
    return static_cast<T*>(p.out) + query * p.out_stride + int64_t{kv_head} * p.group * kHeadDim;
  }

  // One block has all tiles.
  __device__ __forceinline__ void RunAlone() {
    RowState state[2];
    Values merged = {};
    ForTiles([&](int, const Values& values, const Stats& stats) {
      float keep[2], take[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        state[i].Merge(stats.maximum[i], stats.sum[i], &keep[i], &take[i]);
      }
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          merged[n][e] = MergeValue(merged[n][e], values[n][e], keep[e / 2], take[e / 2]);
        }
      }
    });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (g + 8 * i >= p.group || !HasDims()) continue;
      const float normalizer = state[i].Normalizer();
      T* const to = Out() + (g + 8 * i) * kHeadDim + warp * kDimTiles * 8 + 2 * t;
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
        *reinterpret_cast<uint32_t*>(to + 8 * n) = Pack<T>(
            __fmul_rn(merged[n][2 * i], normalizer), __fmul_rn(merged[n][2 * i + 1], normalizer));
      }
    }
  }

  // Leaves a tile's results: at(head) -> where its dims begin, and its stats.
  template <typename At>
  __device__ __forceinline__ void Leave(const Values& values, const Stats& stats,
                                        const At& at) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (g + 8 * i >= p.group || !HasDims()) continue;
      const auto [to, of_head] = at(g + 8 * i);
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
        *reinterpret_cast<float2*>(to + warp * kDimTiles * 8 + 2 * t + 8 * n) =
            make_float2(values[n][2 * i], values[n][2 * i + 1]);
      }
      if (warp == 0 && t == 0) *of_head = make_float2(stats.maximum[i], stats.sum[i]);
    }
  }

  // Merges the group's heads over all tiles and writes their output; this block the `part`-th of
  // `parts` equal shares. fetch(tile, head, dim, stat, value).
  template <typename Fetch>
  __device__ __forceinline__ void Merge(int part, int parts, const Fetch& fetch) const {
    constexpr int kAhead = 4;
    const int values = p.group * kHeadDim, share = (values + parts - 1) / parts;
    const int end = min((part + 1) * share, values);
    for (int i = part * share + static_cast<int>(threadIdx.x); i < end; i += kAttentionThreads) {
      RowState row;
      float value = 0;
      for (int first = 0; first < tiles; first += kAhead) {
        float2 stat[kAhead];
        float of_tile[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          fetch(min(first + a, tiles - 1), i / kHeadDim, i % kHeadDim, &stat[a], &of_tile[a]);
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          if (first + a >= tiles) break;
          float keep, take;
          row.Merge(stat[a].x, stat[a].y, &keep, &take);
          value = MergeValue(value, of_tile[a], keep, take);
        }
      }
      Out()[i] = FromFloat<T>(__fmul_rn(value, row.Normalizer()));
    }
  }

  // The cluster's blocks keep their tiles' results and read one another's.
  __device__ __forceinline__ void RunInCluster() {
    // Their number is a power of two.
    const int log = __ffs(static_cast<int>(gridDim.x)) - 1, rank_mask = (1 << log) - 1;
    const KeptTiles<kHeadDim> kept{(p.max_tiles + rank_mask) >> log, p.group};
    ForTiles([&](int tile, const Values& values, const Stats& stats) {
      Leave(values, stats, [&](int head) {
        const int slot = tile >> log;
        return std::pair(reinterpret_cast<float*>(shared + kept.Values(slot, head)),
                         reinterpret_cast<float2*>(shared + kept.Stats(slot, head)));
      });
    });
    ClusterSync();
    const uint32_t base = SharedAddress(shared);
    Merge(static_cast<int>(blockIdx.x), 1 << log,
          [&](int tile, int head, int dim, float2* stat, float* value) {
            const uint32_t of_rank = ptx::MapToRank(base, tile & rank_mask);
            const int slot = tile >> log;
            const uint32_t at = of_rank + kept.Stats(slot, head);
            *stat = make_float2(ptx::LoadCluster(at), ptx::LoadCluster(at + 4));
            *value = ptx::LoadCluster(of_rank + kept.Values(slot, head) +
                                      dim * static_cast<int>(sizeof(float)));
          });
    ptx::ClusterArriveRelaxed();  // no block ends while another reads
    ClusterWait();
  }

  // Results meet in memory.
  template <bool kClusters>
  __device__ __forceinline__ void RunInScratch() {
    ForTiles([&](int tile, const Values& values, const Stats& stats) {
      Leave(values, stats, [&](int head) {
        const int64_t at = (first_head + head) * p.max_tiles + tile;
        return std::pair(p.partial + at * kHeadDim, p.partial_stats + at);
      });
    });
    int part = 0, parts = 1;
    if constexpr (kClusters) {
      part = static_cast<int>(blockIdx.x), parts = static_cast<int>(gridDim.x);
      ClusterSync();
    } else {
      uint32_t* counter = p.counters + blockIdx.z * p.num_kv_heads + kv_head;
      if (!ArriveLast(counter, gridDim.x, &s.flag)) return;
    }
    Merge(part, parts, [&](int tile, int head, int dim, float2* stat, float* value) {
      const int64_t at = (first_head + head) * p.max_tiles + tile;
      *stat = __ldcg(p.partial_stats + at);
      *value = __ldcg(p.partial + at * kHeadDim + dim);
    });
  }
};

template <typename T, int kHeadDim, bool kClusters>
__global__ void __launch_bounds__(kAttentionThreads, kBlocksPerSm)
    DecodeAttentionKernel(const __grid_constant__ AttentionParams p,
                          const __grid_constant__ CacheMaps maps) {
  extern __shared__ __align__(1024) uint8_t shared[];
  using Decode = DecodeAttention<T, kHeadDim>;
  __shared__ typename Decode::Shared s;
  AllowNext();
  Decode self(p, maps, shared, s);
  if (!self.Begin()) return;
  if (gridDim.x == 1) {
    self.RunAlone();
  } else if (kClusters && p.partial == nullptr) {
    self.RunInCluster();
  } else {
    self.template RunInScratch<kClusters>();
  }
}

// Blocks of one sequence and head: as many as run at once, if there are tiles for them.
int BlocksOf(const LaunchContext& context, const AttentionParams& params, int seqs) {
  const int wanted = std::clamp(kBlocksPerSm * context.num_sms / (seqs * params.num_kv_heads), 1,
                                params.max_tiles);
  if (!context.clusters) return wanted;
  int blocks = 1;
  while (2 * blocks <= std::min(wanted, kMaxClusterBlocks)) blocks *= 2;
  return blocks;
}

// Shared memory of a block, if the tiles' results meet there; 0: too many tiles for all blocks to
// run at once.
template <int kHeadDim>
size_t KeptBytes(const LaunchContext& context, const AttentionParams& params, int seqs,
                 int blocks) {
  constexpr int64_t kSmBytes = 224 * 1024, kBlockBytes = 2 * 1024;  // those it reserves, too
  const KeptTiles<kHeadDim> kept{static_cast<int>(CeilDiv(params.max_tiles, blocks)), params.group};
  const int64_t per_sm = CeilDiv(int64_t{blocks} * seqs * params.num_kv_heads, context.num_sms);
  return per_sm * (kept.Bytes() + kBlockBytes) <= kSmBytes ? kept.Bytes() : 0;
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
  params.counters = context.counters;
  CacheMaps maps{};
  if (context.clusters && !MakeCacheMaps<kHeadDim>(params, &maps)) return cudaErrorInvalidValue;
  for (int first = 0; first < params.num_seqs; first += seqs_at_once) {
    const int seqs = std::min(seqs_at_once, params.num_seqs - first);
    params.first_seq = first;
    params.partial = reinterpret_cast<float*>(context.scratch);
    params.partial_stats = reinterpret_cast<float2*>(params.partial + seqs * partials * kHeadDim);
    const int blocks = BlocksOf(context, params, seqs);
    const dim3 grid(blocks, params.num_kv_heads, seqs);
    size_t shared_bytes = KeptTiles<kHeadDim>::kBegin;
    cudaError_t error = cudaSuccess;
    if (context.clusters) {
      const size_t kept_bytes = blocks > 1 ? KeptBytes<kHeadDim>(context, params, seqs, blocks) : 0;
      if (kept_bytes > 0) params.partial = nullptr, shared_bytes = kept_bytes;
      error = LaunchClusters(context, blocks, DecodeAttentionKernel<T, kHeadDim, true>, grid,
                             kAttentionThreads, shared_bytes, params, maps);
    } else {
      error = Launch(context, DecodeAttentionKernel<T, kHeadDim, false>, grid, kAttentionThreads,
                     shared_bytes, params, maps);
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
