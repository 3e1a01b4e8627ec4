// The end of a router, from the columns' partial products to levels: shared by route.cu's kernel
// with and without clusters. Runs in one block of kRouteThreads; a token's scores do not depend on
// the other tokens.
#ifndef MOBI_KERNELS_CUDA_ROUTE_CUH_
#define MOBI_KERNELS_CUDA_ROUTE_CUH_

#include "kernels/backend.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/ops.h"

namespace mobi::cuda {

inline constexpr int kRouteThreads = 256;
inline constexpr int kRouteWarps = kRouteThreads / 32;
inline constexpr int kRouteRanks = 8;  // blocks that share the columns
inline constexpr int kMaxScores = kMaxSegments * kNumLevels;

struct RouteParams {
  const half* w1;
  int64_t w1_stride;
  const float* b1;
  const float* u;
  const float* w2;
  int64_t w2_stride;
  const float* b2;
  int num_hidden;
  int cols;
  int num_segments;
  float bytes[kMaxSegments][kNumLevels];
  uint32_t tiles[kMaxSegments];
  RoutingBatch batch;
  uint8_t* levels;
  int64_t levels_stride;
  float* partials;     // without clusters: [group][rank][token][hidden, then the sum of squares]
  float* losses;       // [token][score] of coherent tokens, where there are several groups
  uint32_t* counters;  // [group], then blocks done, then the highest level per segment
  // The input x, and what it is made from: see RouteInput.
  void* x;
  int64_t x_stride;
  void* source;
  int64_t source_stride;
  const void* delta;
  int64_t delta_stride;
  const float* norm_weight;
  float eps;
};

// The tokens of a group that one block finishes: first, first + step, ... below count.
struct RouteTokens {
  int group_first;
  int first;
  int step;
  int count;

  __device__ __forceinline__ int mine() const { return (count - first + step - 1) / step; }
  __device__ __forceinline__ int InGroup(int slot) const { return first + slot * step; }
  __device__ __forceinline__ int Token(int slot) const { return group_first + InGroup(slot); }
};

template <int kTokens, int kWidth>
struct RouteShared {
  float sums[kRouteWarps][kTokens][kWidth];
  float partials[kRouteRanks][(kTokens + kRouteRanks - 1) / kRouteRanks][kWidth];
  float squares[kRouteRanks][kTokens];
  float losses[kTokens][kMaxScores];
  float rank_highest[kRouteRanks][kMaxSegments];
  float w2[kMaxScores][kMaxRouterHidden + 1];
  float b2[kMaxScores];
  float b1[kMaxRouterHidden];
  float u[kMaxRouterHidden];
  int highest[kMaxSegments];  // level that a token of this block reads
  int pinned[kRouteWarps];
  double together[kMaxScores];
  int flag;
};

template <typename Shared>
__device__ __forceinline__ void LoadRouter(const RouteParams& p, Shared& s) {
  const int tid = static_cast<int>(threadIdx.x), scores = p.num_segments * kNumLevels;
  for (int i = tid; i < scores * p.num_hidden; i += kRouteThreads) {
    s.w2[i / p.num_hidden][i % p.num_hidden] =
        p.w2[(i / p.num_hidden) * p.w2_stride + i % p.num_hidden];
  }
  if (tid < p.num_hidden) s.b1[tid] = p.b1[tid], s.u[tid] = p.u[tid];
  if (tid < scores) s.b2[tid] = p.b2[tid];
  if (tid < kMaxSegments) s.highest[tid] = 0;
}

// s.sums[0][slot] (W1 x and the sum of squares) -> losses[slot][score] = exp(score).
template <int kTokens, int kWidth>
__device__ __forceinline__ void ScoreTokens(const RouteParams& p, int slots,
                                            RouteShared<kTokens, kWidth>& s,
                                            float (*losses)[kMaxScores]) {
  const int tid = static_cast<int>(threadIdx.x);
  auto& sums = s.sums[0];
  for (int e = tid; e < slots * p.num_hidden; e += kRouteThreads) {
    const int slot = e / p.num_hidden, h = e % p.num_hidden;
    const float log_rms = 0.5f * logf(sums[slot][kWidth - 1] / static_cast<float>(p.cols));
    const float value = sums[slot][h] + s.b1[h] + s.u[h] * log_rms;
    sums[slot][h] = value / (1.0f + expf(-value));
  }
  __syncthreads();
  // Eight lanes to a score: each takes every eighth hidden unit.
  const int scores = p.num_segments * kNumLevels, part = tid % 8;
  for (int first = 0; first < slots * scores; first += kRouteThreads / 8) {
    const int e = first + tid / 8, slot = e / scores, at = e % scores;
    float score = 0;
    if (e < slots * scores) {
      for (int h = part; h < p.num_hidden; h += 8) score = fmaf(s.w2[at][h], sums[slot][h], score);
    }
    score = QuadSum(score);
    score += __shfl_xor_sync(kFullWarp, score, 4);
    if (e < slots * scores && part == 0) losses[slot][at] = expf(score + s.b2[at]);
  }
  __syncthreads();
}

// The lowest of the levels in [lowest, highest] whose cost[level - 1] is least.
__device__ __forceinline__ int Cheapest(const double (&cost)[kNumLevels], int lowest, int highest) {
  int best = lowest;
  double least = INFINITY;
#pragma unroll
  for (int level = 1; level <= kNumLevels; ++level) {
    if (level < lowest || level > highest || !(cost[level - 1] < least)) continue;
    best = level;
    least = cost[level - 1];
  }
  return best;
}

__device__ __forceinline__ bool AllFinite(const float* losses) {
  bool finite = true;
#pragma unroll
  for (int k = 0; k < kNumLevels; ++k) finite &= isfinite(losses[k]);
  return finite;
}

// The choice of one token for one segment on its own.
__device__ __forceinline__ int ChooseAlone(const RouteParams& p, int token, int segment,
                                           const float* losses) {
  const int lowest = p.batch.min_level[token], highest = p.batch.max_level[token];
  if (!AllFinite(losses)) return highest;
  double cost[kNumLevels];
#pragma unroll
  for (int k = 0; k < kNumLevels; ++k) {
    cost[k] = losses[k] + static_cast<double>(p.batch.price[token]) * p.bytes[segment][k];
  }
  return Cheapest(cost, lowest, highest);
}

__device__ __forceinline__ void SetLevel(const RouteParams& p, int token, int segment, int level,
                                         int* highest) {
  p.levels[segment * p.levels_stride + token] = static_cast<uint8_t>(level);
  atomicMax(highest + segment, level);
  atomicAdd(p.batch.level_tiles + token, level * p.tiles[segment]);
}

// The coherent tokens' shared level per segment, and their own after clamping. losses
// [token][score].
template <typename Shared>
__device__ __forceinline__ void ChooseTogether(const RouteParams& p, const float* losses,
                                               Shared& s) {
  const int tid = static_cast<int>(threadIdx.x);
  int pinned = 0;  // the highest level that is read whatever the others choose
  for (int i = tid; i < p.batch.num_tokens; i += kRouteThreads) {
    if (p.batch.min_level[i] == p.batch.max_level[i]) pinned = max(pinned, p.batch.max_level[i]);
  }
  pinned = static_cast<int>(__reduce_max_sync(kFullWarp, static_cast<uint32_t>(pinned)));
  if (tid % 32 == 0) s.pinned[tid / 32] = pinned;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kRouteWarps; ++w) pinned = max(pinned, s.pinned[w]);
  // Sixteen lanes to a score: each adds every sixteenth token.
  constexpr int kLanes = 16;
  const int at = tid / kLanes, part = tid % kLanes, scores = p.num_segments * kNumLevels;
  double sum = 0;
  if (at < scores) {
    const int first = at / kNumLevels * kNumLevels;
    for (int i = part; i < p.batch.num_coherent; i += kLanes) {
      const float* of_token = losses + i * kMaxScores;
      if (p.batch.min_level[i] == p.batch.max_level[i] || !AllFinite(of_token + first)) continue;
      sum += static_cast<double>(of_token[at]) / p.batch.price[i];
    }
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, offset);
  }
  if (at < scores && part == 0) {
    const int segment = at / kNumLevels, k = at % kNumLevels;
    const double paid = pinned > 0 ? p.bytes[segment][pinned - 1] : 0.0;
    s.together[at] = sum + (k < pinned ? 0.0 : p.bytes[segment][k] - paid);
  }
  __syncthreads();
  for (int e = tid; e < p.batch.num_coherent * p.num_segments; e += kRouteThreads) {
    const int token = e / p.num_segments, segment = e % p.num_segments;
    double cost[kNumLevels];
#pragma unroll
    for (int k = 0; k < kNumLevels; ++k) cost[k] = s.together[segment * kNumLevels + k];
    const int lowest = p.batch.min_level[token], highest = p.batch.max_level[token];
    const bool finite = AllFinite(losses + token * kMaxScores + segment * kNumLevels);
    const int shared = Cheapest(cost, 1, kNumLevels);
    const int level = finite ? min(max(shared, lowest), highest) : highest;
    SetLevel(p, token, segment, level, s.highest);
  }
}

// Bytes of the step's weights: every segment up to the highest level that a token reads.
__device__ __forceinline__ void CountBytes(const RouteParams& p, const int* highest) {
  uint64_t bytes = 0;
  for (int segment = 0; segment < p.num_segments; ++segment) {
    bytes += static_cast<uint64_t>(p.bytes[segment][highest[segment] - 1]);
  }
  *p.batch.loaded_bytes += bytes;
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_ROUTE_CUH_
