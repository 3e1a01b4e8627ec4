// Before the prefill path's product: tokens sorted by the level they read, and x brought into the
// shape in which the product's blocks take it into shared memory.
//
// A tile is up to BN tokens of one segment that read one level, in one image (prefill_image.cuh).
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_PREFILL_ORDER_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_PREFILL_ORDER_CUH_

#include <cstdint>

#include "kernels/cuda/prefill_image.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_problem.h"
#include "kernels/cuda/transpose.cuh"

namespace mobi::cuda {

inline constexpr int kImageSegment = kNumLevels + 1;  // after the starts
inline constexpr int kStartsOfSegment = kImageSegment + 1;

struct PrefillPlan {
  // Tokens of each segment by level: order[segment * num_tokens + i], those of level l from
  // start[segment * kStartsOfSegment + l - 1] to the next. At kImageSegment: the segment whose
  // images serve this one, which reads the same levels. Of `orders` segments: with one, it is all
  // segments'.
  // Where all tokens read `level`, both are null: the images are in the order of tokens.
  int32_t* order = nullptr;
  int32_t* start = nullptr;
  uint8_t* images = nullptr;  // [segment][tile], room for token_tiles each
  int orders = 1;
  int level = 0;
  int token_tiles = 0;                    // at most, of a segment
  int segment_blocks[kMaxSegments] = {};  // row blocks up to the end of each segment

  __device__ __forceinline__ int OrderOf(int segment) const { return min(segment, orders - 1); }
  __device__ __forceinline__ int32_t Start(int index, int num_tokens) const {
    if (start != nullptr) return __ldcg(start + index);
    return index >= level && index < kImageSegment ? num_tokens : 0;
  }
  __device__ __forceinline__ int64_t Token(int segment, int num_tokens, int place) const {
    return order == nullptr ? place : __ldcg(order + OrderOf(segment) * num_tokens + place);
  }
};

// A tile's tokens: a run of its segment's order.
struct TokenTile {
  int level = 0, first = 0, count = 0;  // count 0: there is no such tile
};

// Tile `index` of the segment whose starts these are.
template <int BN>
__device__ __forceinline__ TokenTile FindTokenTile(const int32_t* start, int index) {
  TokenTile tile;
#pragma unroll
  for (int level = 1; level <= kNumLevels; ++level) {
    const int from = start[level - 1], to = start[level];
    const int tiles = (to - from + BN - 1) / BN;
    if (index >= 0 && index < tiles) {
      tile.level = level;
      tile.first = from + index * BN;
      tile.count = min(BN, to - tile.first);
    }
    index -= tiles;
  }
  return tile;
}

template <int BN>
__device__ __forceinline__ int CountTokenTiles(const int32_t* start) {
  int tiles = 0;
#pragma unroll
  for (int level = 1; level <= kNumLevels; ++level) {
    tiles += (start[level] - start[level - 1] + BN - 1) / BN;
  }
  return tiles;
}

// ---- Order by level.

inline constexpr int kPackThreads = 256;
inline constexpr int kPackWarps = kPackThreads / 32;
inline constexpr int kPackTokens = kPackThreads / 16;
inline constexpr int kPackGroups = 8;  // of a block

struct PackShared {
  uint64_t warp_counts[kPackWarps];
  int32_t start[kNumLevels + 1];
  int32_t tokens[kPackTokens];
};

// Counts of tokens by level, 16 bits each.
inline constexpr int kMostPackTokens = 1 << 15;
__device__ __forceinline__ int CountOf(uint64_t counts, int level) {
  return static_cast<int>(counts >> (16 * (level - 1)) & 0xFFFF);
}

// A thread's tokens begin .. end - 1 of one segment. Levels are read eight at a time: what they
// take is the wait for memory.
struct OwnTokens {
  static constexpr int kAtOnce = 8;
  const uint8_t* levels;
  int begin, end;
  uint32_t first;  // the first eight

  __device__ __forceinline__ OwnTokens(const SlicedProblem& p, int segment, int begin, int end)
      : levels(p.levels + segment * p.levels_stride), begin(begin), end(end), first(Read(begin)) {}

  // From token `from` on, four bits each; 0: no token of this thread.
  __device__ __forceinline__ uint32_t Read(int from) const {
    uint32_t all = 0;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (from + k >= end) continue;
      const int level = min(max(static_cast<int>(__ldcg(levels + from + k)), 1), kNumLevels);
      all |= static_cast<uint32_t>(level) << (4 * k);
    }
    return all;
  }

  __device__ __forceinline__ uint32_t At(int from) const {
    return from == begin ? first : Read(from);
  }

  // call(token, level)
  template <typename Call>
  __device__ __forceinline__ void ForEach(const Call& call) const {
    for (int from = begin; from < end; from += kAtOnce) {
      const uint32_t all = At(from);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int level = static_cast<int>(all >> (4 * k) & 15);
        if (level > 0) call(from + k, level);
      }
    }
  }

  __device__ __forceinline__ bool SameAs(const OwnTokens& other) const {
    bool same = true;
    for (int from = begin; from < end; from += kAtOnce) same &= At(from) == other.At(from);
    return same;
  }
};

// Counts of tokens by level: this thread's, and those of the threads before it.
struct OwnCounts {
  uint64_t own, before;
};

// Also s.start.
__device__ __forceinline__ OwnCounts CountTokens(const OwnTokens& tokens, PackShared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t own = 0;
  tokens.ForEach([&](int, int level) { own += uint64_t{1} << (16 * (level - 1)); });
  uint64_t sum = own;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) s.warp_counts[warp] = sum;
  __syncthreads();
  uint64_t before = sum - own, all = 0;
#pragma unroll
  for (int w = 0; w < kPackWarps; ++w) {
    if (w < warp) before += s.warp_counts[w];
    all += s.warp_counts[w];
  }
  if (threadIdx.x == 0) {
    int start = 0;
#pragma unroll
    for (int level = 1; level <= kNumLevels; ++level) {
      s.start[level - 1] = start;
      start += CountOf(all, level);
    }
    s.start[kNumLevels] = start;
  }
  __syncthreads();
  return {own, before};
}

// The first segment in which all tokens read the same levels as in this one, whose these are.
__device__ __forceinline__ int FirstWithLevels(const SlicedProblem& p, int segment,
                                               const OwnTokens& tokens) {
  for (int other = 0; other < segment; ++other) {
    if (__syncthreads_and(tokens.SameAs({p, other, tokens.begin, tokens.end}))) return other;
  }
  return segment;
}

// Lists `count` of a level's tokens from the place `first` of their segment's order on. Few threads
// have any of them.
__device__ __forceinline__ void ListTokens(const OwnTokens& tokens, const OwnCounts& counts,
                                           int level, int first, int count, PackShared& s) {
  if (count == 0) return;
  int place = s.start[level - 1] + CountOf(counts.before, level) - first;
  if (place >= count || place + CountOf(counts.own, level) <= 0) return;
  tokens.ForEach([&](int token, int of_token) {
    if (of_token != level) return;
    if (place >= 0 && place < count) s.tokens[place] = token;
    ++place;
  });
}

// ---- Images. Half a warp carries one group of one token at a time, 16 bytes a lane.

// Grid: blocks of kPackTokens tokens of all segments' tiles; blocks of kPackGroups groups. Every
// block sorts for itself: that takes less than a kernel more in the chain.
template <int BN>
__global__ void __launch_bounds__(kPackThreads)
    SlicedPackKernel(const __grid_constant__ SlicedProblem p,
                     const __grid_constant__ PrefillPlan plan) {
  constexpr int kParts = BN / kPackTokens, kGroupBytes = 2 * BN * kImageRowBytes;
  __shared__ PackShared s;
  ptx::LaunchDependents();
  ptx::WaitForPrevious();
  const int place = blockIdx.x / kParts, segment = place / plan.token_tiles;
  const int of_segment = place % plan.token_tiles, first_row = blockIdx.x % kParts * kPackTokens;
  const int each = (p.num_tokens + kPackThreads - 1) / kPackThreads, first = threadIdx.x * each;
  const OwnTokens own(p, segment, first, min(first + each, p.num_tokens));
  const int image_segment = FirstWithLevels(p, segment, own);
  if (image_segment != segment && blockIdx.y > 0) return;
  const OwnCounts counts = CountTokens(own, s);
  const TokenTile tile = FindTokenTile<BN>(s.start, of_segment);
  const int rows = max(min(kPackTokens, tile.count - first_row), 0);
  if (rows == 0 && blockIdx.y > 0) return;
  const int thread = threadIdx.x, row = thread / 16;
  ListTokens(own, counts, tile.level, tile.first + first_row, rows, s);
  __syncthreads();
  if (blockIdx.y == 0) {
    if (thread < rows) {
      plan.order[segment * p.num_tokens + tile.first + first_row + thread] = s.tokens[thread];
    }
    if (of_segment == 0 && first_row == 0 && thread < kStartsOfSegment) {
      plan.start[segment * kStartsOfSegment + thread] =
          thread == kImageSegment ? image_segment : s.start[thread];
    }
  }
  if (rows == 0 || image_segment != segment) return;
  // Rows without a token are written by nobody: their products are stored by nobody.
  const bool mine = row < rows;
  const ImageChunk chunk(threadIdx.x % 16);
  const int begin = blockIdx.y * kPackGroups;
  const uint4* const from =
      reinterpret_cast<const uint4*>(p.x + s.tokens[mine ? row : 0] * p.x_stride) +
      threadIdx.x % 16;
  uint4 v[kPackGroups];
#pragma unroll
  for (int i = 0; i < kPackGroups; ++i) {
    v[i] = make_uint4(0, 0, 0, 0);
    if (mine && begin + i < p.groups) v[i] = __ldcg(from + (begin + i) * 16);
  }
  const int of_tile = first_row + row;
  uint8_t* const to =
      plan.images + int64_t{place} * p.groups * kGroupBytes + chunk.Offset(BN, of_tile);
#pragma unroll
  for (int i = 0; i < kPackGroups; ++i) {
    TransposeWords<4>(v[i], chunk.t);
    if (mine && begin + i < p.groups) {
      *reinterpret_cast<uint4*>(to + int64_t{begin + i} * kGroupBytes) = v[i];
    }
  }
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_PREFILL_ORDER_CUH_
