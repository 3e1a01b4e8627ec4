// What the two kernels of prefill attention share: which rows a block has, and what becomes of a
// tile's scores.
#ifndef MOBI_KERNELS_CUDA_ATTENTION_PREFILL_CUH_
#define MOBI_KERNELS_CUDA_ATTENTION_PREFILL_CUH_

#include <cstdint>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/prefill_image.cuh"
#include "kernels/cuda/transpose.cuh"

namespace mobi::cuda {

struct RowTile {
  int seq = -1;
  int first_row = 0;
};

// The tile of kRows rows with number `index` of the batch: sequences one after another, query_len *
// group rows each. Every warp looks on its own.
template <int kRows>
__device__ __forceinline__ RowTile FindRowTile(const AttentionParams& p, int index) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int first = 0; first < p.num_seqs; first += 32) {
    const int seq = first + lane;
    int tiles = 0;
    if (seq < p.num_seqs) {
      const int queries = p.query_start[seq + 1] - p.query_start[seq];
      const bool skip = p.separate_decode && queries == 1;
      if (!skip) tiles = (queries * p.group + kRows - 1) / kRows;
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
      return {first + owner, (index - begin) * kRows};
    }
    index -= __shfl_sync(kFullWarp, end, 31);
  }
  return {};
}

// A block's sequence.
struct PrefillSequence {
  int first_query, queries, context;
  const int32_t* blocks;

  __device__ __forceinline__ PrefillSequence(const AttentionParams& p, int seq)
      : first_query(p.query_start[seq]),
        queries(p.query_start[seq + 1] - first_query),
        context(p.context_len[seq]),
        blocks(p.block_table + int64_t{seq} * p.block_table_stride) {}

  __device__ __forceinline__ int Rows(const AttentionParams& p) const { return queries * p.group; }
  // Tiles that the rows before end_row see.
  __device__ __forceinline__ int Tiles(const AttentionParams& p, int end_row) const {
    const int last = min(end_row, Rows(p)) - 1;
    return (context - queries + last / p.group) / kTileTokens + 1;
  }
};

// A lane's two rows of a warp's 16, and what they have come to.
template <typename T, int kHeadDim>
struct PrefillRows {
  static constexpr int kDimTiles = kHeadDim / 8, kTiles = kTileTokens / 8;

  const AttentionParams& p;
  const PrefillSequence& sequence;
  int kv_head, first_row;
  int position[2];  // tokens up to here are seen
  RowState state[2];
  float keep[2], take[2];  // of the last tile's merge

  __device__ __forceinline__ PrefillRows(const AttentionParams& p, const PrefillSequence& sequence,
                                         int kv_head, int first_row)
      : p(p), sequence(sequence), kv_head(kv_head), first_row(first_row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      position[i] = sequence.context - sequence.queries + Row(i) / p.group;
    }
  }

  // Of the sequence; there may be no such row.
  __device__ __forceinline__ int Row(int i) const {
    return first_row + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * i;
  }
  __device__ __forceinline__ bool HasRow(int i) const { return Row(i) < sequence.Rows(p); }
  __device__ __forceinline__ int64_t Token(int i) const {
    return sequence.first_query + Row(i) / p.group;
  }
  __device__ __forceinline__ int Head(int i) const { return kv_head * p.group + Row(i) % p.group; }

  __device__ __forceinline__ void Load(uint32_t (&q)[kHeadDim / 16][4]) const {
    const auto query = [&](int i) {
      return HasRow(i) ? static_cast<const T*>(p.q) + Token(i) * p.q_stride + Head(i) * kHeadDim
                       : nullptr;
    };
    LoadQueries<T, kHeadDim>(query(0), query(1), static_cast<int>(threadIdx.x) % 4, q);
  }

  // The scores of a tile become weights, as operands of 16 tokens each.
  __device__ __forceinline__ void Weigh(int tile, float (&scores)[kTiles][4],
                                        uint32_t (&weights)[kTileTokens / 16][4]) {
    const int t = static_cast<int>(threadIdx.x) % 4;
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
#pragma unroll
    for (int step = 0; step < kTileTokens / 16; ++step) {
      weights[step][0] = Pack<T>(scores[2 * step][0], scores[2 * step][1]);
      weights[step][1] = Pack<T>(scores[2 * step][2], scores[2 * step][3]);
      weights[step][2] = Pack<T>(scores[2 * step + 1][0], scores[2 * step + 1][1]);
      weights[step][3] = Pack<T>(scores[2 * step + 1][2], scores[2 * step + 1][3]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = SumOfRuns(QuadSum(runs[0][i]), QuadSum(runs[1][i]), QuadSum(runs[2][i]),
                                  QuadSum(runs[3][i]));
      state[i].Merge(maximum[i], sum, &keep[i], &take[i]);
    }
  }

  // A tile's weighted values, after Weigh.
  __device__ __forceinline__ void Merge(const float (&part)[kDimTiles][4],
                                        float (&values)[kDimTiles][4]) const {
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[n][i] = MergeValue(values[n][i], part[n][i], keep[i / 2], take[i / 2]);
      }
    }
  }

  __device__ __forceinline__ void Store(const float (&values)[kDimTiles][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float normalizer = state[i].Normalizer();
      const auto pair = [&](int n) {
        return Pack<T>(__fmul_rn(values[n][2 * i], normalizer),
                       __fmul_rn(values[n][2 * i + 1], normalizer));
      };
      if (p.images.bytes != nullptr) {
        if (HasRow(i)) LeaveInImage(i, pair);
      } else {
        StoreRow(i, pair);
      }
    }
  }

 private:
  // Four tiles of dims at a time, so that a lane writes eight dims side by side.
  template <typename Pair>
  __device__ __forceinline__ void StoreRow(int i, const Pair& pair) const {
    const int t = static_cast<int>(threadIdx.x) % 4;
    T* const out = static_cast<T*>(p.out) + Token(i) * p.out_stride + Head(i) * kHeadDim;
#pragma unroll
    for (int n = 0; n < kDimTiles; n += 4) {
      uint4 words = make_uint4(pair(n), pair(n + 1), pair(n + 2), pair(n + 3));
      TransposeWords<1>(words, t);
      if (HasRow(i)) *reinterpret_cast<uint4*>(out + 8 * (n + t)) = words;
    }
  }

  // A lane has the words that are side by side in the image.
  template <typename Pair>
  __device__ __forceinline__ void LeaveInImage(int i, const Pair& pair) const {
    constexpr int kWords = kHeadDim / 32, kHeads = kGroupSize / kHeadDim;  // of a chunk, a group
    const ImageRow row(p.images, Token(i));
    const int head = Head(i), part = head % kHeads * kWords;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const ImageChunk chunk(word, static_cast<int>(threadIdx.x) % 4);
      auto* const to = reinterpret_cast<uint32_t*>(row.At(head / kHeads, chunk)) + part;
      if constexpr (kWords == 4) {
        *reinterpret_cast<uint4*>(to) =
            make_uint4(pair(word), pair(4 + word), pair(8 + word), pair(12 + word));
      } else if constexpr (kWords == 2) {
        *reinterpret_cast<uint2*>(to) = make_uint2(pair(word), pair(4 + word));
      } else {
        *to = pair(word);
      }
    }
  }
};

inline constexpr int kLeastHeadDim90 = 64;  // a row of a swizzle
// attention_prefill90.cu: false: not on this device, or of these blocks of the cache.
template <typename T, int kHeadDim>
bool LaunchPrefillAttention90(const LaunchContext& context, const AttentionParams& params,
                              int64_t num_tokens, cudaError_t* error);

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_ATTENTION_PREFILL_CUH_
