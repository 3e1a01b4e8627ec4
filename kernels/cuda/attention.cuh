// Paged attention, the part that decode and prefill share. The unit of work is one tile of 128
// cached tokens at a fixed place in the sequence, met by rows of (query, head of the group): it
// yields a maximum, a sum of weights and a weighted sum of V. Tiles are merged into the row's
// result strictly in order. All kernels do this arithmetic operation for operation (a chain of
// wgmma gives the bits of one of mma), so a token's output is bit-identical whether it was decoded
// or prefilled, in whatever chunk and company. Source of the tile arithmetic: FlashAttention-2
// (arXiv 2307.08691).
#ifndef MOBI_KERNELS_CUDA_ATTENTION_CUH_
#define MOBI_KERNELS_CUDA_ATTENTION_CUH_

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/ops.h"

namespace mobi::cuda {

inline constexpr int kAttentionThreads = 128;
inline constexpr int kAttentionWarps = kAttentionThreads / 32;
inline constexpr int kTileTokens = 128;
inline constexpr int kRowsPerWarp = 16;  // of an mma tile

struct AttentionParams {
  const void* q;
  int64_t q_stride;
  const void* k;
  const void* v;
  int64_t k_stride;
  int64_t v_stride;
  int64_t cache_rows;
  void* out;
  int64_t out_stride;
  const int32_t* query_start;
  const int32_t* context_len;
  const int32_t* block_table;
  int block_table_stride;
  int block_size;
  int box_rows;  // decode: BoxRows of it
  int num_seqs;
  int num_kv_heads;
  int group;             // query heads per kv head
  float scale_log2;      // log2(e) / sqrt(head_dim)
  bool separate_decode;  // sequences with one query are the decode kernel's
  DecodeRope rope;       // decode: rotates and caches the step's own token first
  PrefillImages images;  // not decode: of all rows, or none
  // Decode: the tiles' results where they meet in memory, [seq][head][tile][head_dim] and
  // [seq][head][tile] (maximum, sum); null: they do not.
  float* partial;
  float2* partial_stats;
  int max_tiles;
  int first_seq;
  uint32_t* counters;
};

// Row of the cache that holds a token of the sequence, or -1 past its end.
__device__ __forceinline__ int CacheRow(const AttentionParams& p, const int32_t* blocks, int token,
                                        int context) {
  if (token >= context) return -1;
  return blocks[token / p.block_size] * p.block_size + token % p.block_size;
}

// A tile of K or V in shared memory, aligned to 1024 bytes: in parts of up to 64 dims, rows of
// 16-byte chunks, swizzled so that eight rows of one column lie in different banks; as the copy
// engine does it.
template <int kDim>
struct KvTile {
  static constexpr int kHeadDim = kDim, kPartDims = kDim < 64 ? kDim : 64;
  static constexpr int kPartBytes = kTileTokens * kPartDims * 2;
  static constexpr int kParts = kDim / kPartDims, kBytes = kParts * kPartBytes;
  __device__ __forceinline__ static uint32_t Offset(int row, int chunk) {
    constexpr int kChunks = kPartDims / 8;
    const int swizzle = kChunks == 8 ? row & 7 : (row / 2) & 3;
    return static_cast<uint32_t>(chunk / kChunks * kPartBytes + row * kPartDims * 2 +
                                 ((chunk % kChunks ^ swizzle) << 4));
  }
};

// Begins the copy of one tile by the whole block. rows: cache rows of the tile's tokens.
template <typename T, typename Tile>
__device__ __forceinline__ void CopyTile(uint32_t tile, const void* cache, int64_t stride,
                                         int64_t first_col, const int* rows) {
  constexpr int kChunks = Tile::kHeadDim / 8;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  const T* base = static_cast<const T*>(cache) + first_col + chunk * 8;
#pragma unroll 8
  for (int row = static_cast<int>(threadIdx.x) / kChunks; row < kTileTokens;
       row += kAttentionThreads / kChunks) {
    const int from = rows[row];
    CopyAsync16(tile + Tile::Offset(row, chunk), base + (from < 0 ? 0 : from * stride), from >= 0);
  }
}

// The A fragments of 16 query rows; row_pointers: of rows g and g + 8, null: zeros.
template <typename T, int kHeadDim>
__device__ __forceinline__ void LoadQueries(const T* row0, const T* row1, int t,
                                            uint32_t (&q)[kHeadDim / 16][4]) {
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int col = step * 16 + 2 * t;
    q[step][0] = row0 ? *reinterpret_cast<const uint32_t*>(row0 + col) : 0;
    q[step][1] = row1 ? *reinterpret_cast<const uint32_t*>(row1 + col) : 0;
    q[step][2] = row0 ? *reinterpret_cast<const uint32_t*>(row0 + col + 8) : 0;
    q[step][3] = row1 ? *reinterpret_cast<const uint32_t*>(row1 + col + 8) : 0;
  }
}

// scores[n] = q k^T for tokens first_token + 8 n .. + 7 of the tile.
template <typename T, typename Tile, int kTiles>
__device__ __forceinline__ void Scores(const uint32_t (&q)[Tile::kHeadDim / 16][4], uint32_t k_tile,
                                       int first_token, int lane, float (&scores)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0;
  const int row = first_token + (lane / 16) * 8 + lane % 8, chunk = (lane / 8) % 2;
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
#pragma unroll
    for (int step = 0; step < Tile::kHeadDim / 16; ++step) {
      uint32_t b[4];
      LoadMatrices(k_tile + Tile::Offset(row + n * 8, 2 * step + chunk), b);
      Mma<T>(scores[n], q[step], b[0], b[1]);
      Mma<T>(scores[n + 1], q[step], b[2], b[3]);
    }
  }
}

// Hides tokens after each row's own; `token` is that of scores[0][0].
template <int kTiles>
__device__ __forceinline__ void MaskScores(int token, int position0, int position1,
                                           float (&scores)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (token + 8 * n + i > position0) scores[n][i] = -INFINITY;
      if (token + 8 * n + i > position1) scores[n][2 + i] = -INFINITY;
    }
  }
}

// Scores become weights 2^(score * scale - maximum), and this lane's share of their sums over each
// run of four n-tiles (32 tokens) comes out: sums[run][row half].
template <int kTiles>
__device__ __forceinline__ void Weights(float scale_log2, float maximum0, float maximum1,
                                        float (&scores)[kTiles][4],
                                        float (&sums)[(kTiles + 3) / 4][2]) {
  const float shift0 = maximum0 == -INFINITY ? 0.0f : -maximum0;
  const float shift1 = maximum1 == -INFINITY ? 0.0f : -maximum1;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    scores[n][0] = Exp2(__fmaf_rn(scores[n][0], scale_log2, shift0));
    scores[n][1] = Exp2(__fmaf_rn(scores[n][1], scale_log2, shift0));
    scores[n][2] = Exp2(__fmaf_rn(scores[n][2], scale_log2, shift1));
    scores[n][3] = Exp2(__fmaf_rn(scores[n][3], scale_log2, shift1));
    const float low = __fadd_rn(scores[n][0], scores[n][1]);
    const float high = __fadd_rn(scores[n][2], scores[n][3]);
    sums[n / 4][0] = n % 4 == 0 ? low : __fadd_rn(sums[n / 4][0], low);
    sums[n / 4][1] = n % 4 == 0 ? high : __fadd_rn(sums[n / 4][1], high);
  }
}

// The tile's sum of one row from the sums of its four runs.
__device__ __forceinline__ float SumOfRuns(float a, float b, float c, float d) {
  return __fadd_rn(__fadd_rn(a, b), __fadd_rn(c, d));
}

// values[n] = weights v for dims first_chunk * 8 + 8 n .. + 7; weights as A fragments of 16 tokens.
template <typename T, typename Tile, int kTiles>
__device__ __forceinline__ void WeightedValues(const uint32_t (&weights)[kTileTokens / 16][4],
                                               uint32_t v_tile, int first_chunk, int lane,
                                               float (&values)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) values[n][0] = values[n][1] = values[n][2] = values[n][3] = 0;
  const int row = ((lane / 8) % 2) * 8 + lane % 8, chunk = first_chunk + lane / 16;
#pragma unroll
  for (int step = 0; step < kTileTokens / 16; ++step) {
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      LoadMatricesTransposed(v_tile + Tile::Offset(step * 16 + row, chunk + n), b);
      Mma<T>(values[n], weights[step], b[0], b[1]);
      Mma<T>(values[n + 1], weights[step], b[2], b[3]);
    }
  }
}

// Running result of one row. A tile whose tokens are all hidden changes nothing.
struct RowState {
  float maximum = -INFINITY;
  float sum = 0;

  // Takes in a tile's statistics; the row's values become values * keep + tile * take.
  __device__ __forceinline__ void Merge(float tile_maximum, float tile_sum, float* keep,
                                        float* take) {
    const float merged = fmaxf(maximum, tile_maximum);
    const float shift = merged == -INFINITY ? 0.0f : merged;
    *keep = Exp2(__fsub_rn(maximum, shift));
    *take = Exp2(__fsub_rn(tile_maximum, shift));
    maximum = merged;
    sum = __fmaf_rn(tile_sum, *take, __fmul_rn(sum, *keep));
  }

  __device__ __forceinline__ float Normalizer() const { return sum > 0 ? __frcp_rn(sum) : 0.0f; }
};

__device__ __forceinline__ float MergeValue(float value, float tile, float keep, float take) {
  return __fmaf_rn(tile, take, __fmul_rn(value, keep));
}

// attention_decode.cu and attention_prefill.cu.
template <typename T, int kHeadDim>
cudaError_t LaunchDecodeAttention(const LaunchContext& context, AttentionParams params,
                                  int max_context_len);
template <typename T, int kHeadDim>
cudaError_t LaunchPrefillAttention(const LaunchContext& context, const AttentionParams& params,
                                   int64_t num_tokens);

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_ATTENTION_CUH_
