// The end of a router, from the columns' partial products to levels: shared by route.cu's kernel
// with and without clusters, by that for many tokens (route_many.cu) and by the matmul that routes
// by itself (sliced_matmul_decode90_route.cuh). Runs in one block of Shared::kThreads; a token's
// scores do not depend on the other tokens.
#ifndef MOBI_KERNELS_CUDA_ROUTE_CUH_
#define MOBI_KERNELS_CUDA_ROUTE_CUH_

#include <algorithm>
#include <type_traits>

#include "kernels/backend.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sliced_matmul_batch90_image.h"

namespace mobi::cuda {

inline constexpr int kRouteThreads = 256;
inline constexpr int kRouteWarps = kRouteThreads / 32;
inline constexpr int kRouteRanks = 8;  // blocks that share the columns
inline constexpr int kMaxScores = kMaxSegments * kNumLevels;

// A linear's input x, and what it is made from: see RouteInput.
struct InputParams {
  RouteInput input;
  int cols;
  void* x;
  int64_t x_stride;
  void* source;
  int64_t source_stride;
  const void* delta;
  int64_t delta_stride;
  const float* norm_weight;
  float eps;
};

struct RouteParams : InputParams {
  const half* w1;
  int64_t w1_stride;
  const float* b1;
  const float* u;
  const float* w2;
  int64_t w2_stride;
  const float* b2;
  int num_hidden;  // 0: nothing is routed
  int num_segments;
  float bytes[kMaxSegments][kNumLevels];
  uint32_t tiles[kMaxSegments];
  RoutingBatch batch;
  int others_level;  // that tokens of the step beyond the batch read in every segment; 0: no such
  uint8_t* levels;
  int64_t levels_stride;
  float* partials;  // without clusters: [group][rank][token][hidden, then the sum of squares]
  // [token][score] of coherent tokens, where there are several groups; of all, where the matmul
  // chooses (sliced_matmul_batch90_choice.cuh).
  float* losses;
  uint32_t* counters;  // [group], then blocks done, then the highest level per segment
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
struct alignas(16) RouteShared {
  static constexpr int kThreads = kRouteThreads, kSumWidth = kWidth;
  float sums[kRouteWarps][kTokens][kWidth];
  float partials[kRouteRanks][(kTokens + kRouteRanks - 1) / kRouteRanks][kWidth];
  float squares[kRouteRanks][kTokens];
  float losses[kTokens][kMaxScores];
  float rank_highest[kRouteRanks][kMaxSegments];
  float w2[kMaxScores][kMaxRouterHidden + 1];
  float b2[kMaxScores];
  float b1[kMaxRouterHidden];
  float u[kMaxRouterHidden];
  float price[kFewRoutedTokens];  // see FewTokens
  uint8_t min_level[kFewRoutedTokens], max_level[kFewRoutedTokens];
  int highest[kMaxSegments];  // level that a token of this block reads
  int pinned[kThreads / 32];
  double together[kMaxScores];
  int flag;
};

// Begins the copies; ptx::WaitCopies and a barrier end them.
template <typename Shared>
__device__ __forceinline__ void LoadRouter(const RouteParams& p, Shared& s) {
  const int tid = static_cast<int>(threadIdx.x), scores = p.num_segments * kNumLevels;
  for (int i = tid; i < scores * p.num_hidden; i += Shared::kThreads) {
    const int score = i / p.num_hidden, h = i % p.num_hidden;
    ptx::CopyAsync4(ptx::SharedAddress(&s.w2[score][h]), p.w2 + score * p.w2_stride + h);
  }
  if (tid < p.num_hidden) {
    ptx::CopyAsync4(ptx::SharedAddress(s.b1 + tid), p.b1 + tid);
    ptx::CopyAsync4(ptx::SharedAddress(s.u + tid), p.u + tid);
  }
  if (tid < scores) ptx::CopyAsync4(ptx::SharedAddress(s.b2 + tid), p.b2 + tid);
  ptx::CommitCopies();
}

// The prices and limits of a batch of few tokens: asked for early, as they were there before the
// step's first kernel, and kept in shared memory later. A thread has a token.
struct FewTokens {
  float price;
  uint8_t min_level, max_level;
  bool wanted;

  __device__ __forceinline__ bool Has(const RoutingBatch& batch) const {
    return wanted && static_cast<int>(threadIdx.x) < batch.num_tokens;
  }

  __device__ __forceinline__ FewTokens(const RoutingBatch& batch, bool wanted)
      : wanted(wanted && batch.num_tokens <= kFewRoutedTokens) {
    if (!Has(batch)) return;
    price = batch.price[threadIdx.x];
    min_level = batch.min_level[threadIdx.x], max_level = batch.max_level[threadIdx.x];
  }

  // To be read after the next barrier.
  template <typename Shared>
  __device__ __forceinline__ void Keep(Shared& s, RoutingBatch& batch) const {
    static_assert(Shared::kThreads >= kFewRoutedTokens);
    if (Has(batch)) {
      s.price[threadIdx.x] = price;
      s.min_level[threadIdx.x] = min_level, s.max_level[threadIdx.x] = max_level;
    }
    if (!wanted) return;
    batch.price = s.price, batch.min_level = s.min_level, batch.max_level = s.max_level;
  }
};

// A rank's sums of all warps, to the blocks of the cluster that finish the tokens: each every
// blocks-th.
template <int kTokens, int kWidth, int kSlots>
__device__ __forceinline__ void SendRankSums(const float (&warps)[kRouteWarps][kTokens][kWidth],
                                             int count, int blocks,
                                             float (&partials)[kSlots][kWidth], int threads) {
  for (int e = static_cast<int>(threadIdx.x); e < count * kWidth; e += threads) {
    const int token = e / kWidth, at = e % kWidth;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) sum += warps[w][token][at];
    StoreRemote(&partials[token / blocks][at], token % blocks, sum);
  }
}

// s.partials of all ranks -> s.sums[0], for the tokens that this block finishes.
template <typename Shared>
__device__ __forceinline__ void AddRanks(int slots, Shared& s) {
  constexpr int kWidth = Shared::kSumWidth;
  for (int e = static_cast<int>(threadIdx.x); e < slots * kWidth; e += Shared::kThreads) {
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kRouteRanks; ++r) sum += s.partials[r][e / kWidth][e % kWidth];
    s.sums[0][e / kWidth][e % kWidth] = sum;
  }
  __syncthreads();
}

// A hidden unit from its sum over the columns and the sum of x's squares.
__device__ __forceinline__ float HiddenUnit(float sum, float b1, float u, float squares, int cols) {
  const float log_rms = 0.5f * logf(squares / static_cast<float>(cols));
  const float value = sum + b1 + u * log_rms;
  return value / (1.0f + expf(-value));
}

// A score by eight lanes that follow one another; each takes every eighth hidden unit.
template <int kMaxHidden>
__device__ __forceinline__ float Score(const float* w2, const float* hidden, int num_hidden,
                                       bool valid) {
  float score = 0;
#pragma unroll
  for (int i = 0; i < kMaxHidden; i += 8) {
    const int h = i + static_cast<int>(threadIdx.x) % 8;
    if (valid && h < num_hidden) score = fmaf(w2[h], hidden[h], score);
  }
  score = QuadSum(score);
  return score + __shfl_xor_sync(kFullWarp, score, 4);
}

// s.sums[0][slot] (W1 x and the sum of squares) -> losses[slot][score] = exp(score).
template <typename Shared>
__device__ __forceinline__ void ScoreTokens(const RouteParams& p, int slots, Shared& s,
                                            float (*losses)[kMaxScores]) {
  constexpr int kThreads = Shared::kThreads;
  const int tid = static_cast<int>(threadIdx.x);
  auto& sums = s.sums[0];
  for (int e = tid; e < slots * p.num_hidden; e += kThreads) {
    const int slot = e / p.num_hidden, h = e % p.num_hidden;
    sums[slot][h] =
        HiddenUnit(sums[slot][h], s.b1[h], s.u[h], sums[slot][Shared::kSumWidth - 1], p.cols);
  }
  __syncthreads();
  const int scores = p.num_segments * kNumLevels;
  for (int first = 0; first < slots * scores; first += kThreads / 8) {
    const int e = first + tid / 8, slot = e / scores, at = e % scores;
    const bool valid = e < slots * scores;
    const float score = Score<kMaxRouterHidden>(s.w2[at], sums[slot], p.num_hidden, valid);
    if (valid && tid % 8 == 0) losses[slot][at] = expf(score + s.b2[at]);
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
__device__ __forceinline__ int ChooseAlone(const RouteParams& p, const RoutingBatch& batch,
                                           int token, int segment, const float* losses) {
  const int lowest = batch.min_level[token], highest = batch.max_level[token];
  if (!AllFinite(losses)) return highest;
  double cost[kNumLevels];
#pragma unroll
  for (int k = 0; k < kNumLevels; ++k) {
    cost[k] = losses[k] + static_cast<double>(batch.price[token]) * p.bytes[segment][k];
  }
  return Cheapest(cost, lowest, highest);
}

// What the other kernels and the host see of a choice.
__device__ __forceinline__ void PublishLevel(const RouteParams& p, int token, int segment,
                                             int level) {
  p.levels[segment * p.levels_stride + token] = static_cast<uint8_t>(level);
  atomicAdd(p.batch.level_tiles + token, level * p.tiles[segment]);
}

template <typename Shared>
__device__ __forceinline__ void SetLevel(const RouteParams& p, int token, int segment, int level,
                                         Shared& s) {
  PublishLevel(p, token, segment, level);
  atomicMax(s.highest + segment, level);
}

// Of the tokens that this block finishes, losses [slot][score]: those for themselves choose; the
// losses of those that share levels are given to keep(token, score, loss).
template <typename Shared, typename Keep>
__device__ __forceinline__ void ChooseOwn(const RouteParams& p, const RoutingBatch& batch,
                                          const RouteTokens& tokens, int slots,
                                          const float (*losses)[kMaxScores], Shared& s,
                                          const Keep& keep) {
  for (int e = static_cast<int>(threadIdx.x); e < slots * p.num_segments; e += Shared::kThreads) {
    const int slot = e / p.num_segments, segment = e % p.num_segments;
    const int token = tokens.Token(slot);
    const float* of_segment = &losses[slot][segment * kNumLevels];
    if (token >= batch.num_coherent) {
      SetLevel(p, token, segment, ChooseAlone(p, batch, token, segment, of_segment), s);
      continue;
    }
#pragma unroll
    for (int k = 0; k < kNumLevels; ++k) keep(token, segment * kNumLevels + k, of_segment[k]);
  }
  __syncthreads();
}

// The coherent tokens' shared level per segment, and their own after clamping. losses
// [token][score].
template <typename Shared>
__device__ __forceinline__ void ChooseTogether(const RouteParams& p, const RoutingBatch& batch,
                                               const float* losses, Shared& s) {
  constexpr int kThreads = Shared::kThreads;
  const int tid = static_cast<int>(threadIdx.x);
  int pinned = p.others_level;  // the highest that is read whatever those with a choice choose
  for (int i = tid; i < batch.num_tokens; i += kThreads) {
    if (batch.min_level[i] == batch.max_level[i]) pinned = max(pinned, batch.max_level[i]);
  }
  pinned = static_cast<int>(__reduce_max_sync(kFullWarp, static_cast<uint32_t>(pinned)));
  if (tid % 32 == 0) s.pinned[tid / 32] = pinned;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) pinned = max(pinned, s.pinned[w]);
  // Sixteen lanes to a score: each adds every sixteenth token.
  constexpr int kLanes = 16;
  const int at = tid / kLanes, part = tid % kLanes, scores = p.num_segments * kNumLevels;
  double sum = 0;
  if (at < scores) {
    const int first = at / kNumLevels * kNumLevels;
    for (int i = part; i < batch.num_coherent; i += kLanes) {
      const float* of_token = losses + i * kMaxScores;
      if (batch.min_level[i] == batch.max_level[i] || !AllFinite(of_token + first)) continue;
      sum += static_cast<double>(of_token[at]) * (1.0 / batch.price[i]);
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
  for (int e = tid; e < batch.num_coherent * p.num_segments; e += kThreads) {
    const int token = e / p.num_segments, segment = e % p.num_segments;
    double cost[kNumLevels];
#pragma unroll
    for (int k = 0; k < kNumLevels; ++k) cost[k] = s.together[segment * kNumLevels + k];
    const int lowest = batch.min_level[token], highest = batch.max_level[token];
    const bool finite = AllFinite(losses + token * kMaxScores + segment * kNumLevels);
    const int shared = Cheapest(cost, 1, kNumLevels);
    const int level = finite ? min(max(shared, lowest), highest) : highest;
    SetLevel(p, token, segment, level, s);
  }
}

__device__ __forceinline__ void AddLoadedBytes(const RouteParams& p, uint64_t bytes) {
  static_assert(sizeof(unsigned long long) == sizeof(uint64_t));
  atomicAdd(reinterpret_cast<unsigned long long*>(p.batch.loaded_bytes), bytes);  // waits for none
}

// Bytes of the step's weights: every segment up to the highest level that a token reads.
__device__ __forceinline__ void CountBytes(const RouteParams& p, const int* highest) {
  uint64_t bytes = 0;
  for (int segment = 0; segment < p.num_segments; ++segment) {
    bytes += static_cast<uint64_t>(p.bytes[segment][max(highest[segment], p.others_level) - 1]);
  }
  AddLoadedBytes(p, bytes);
}

// The choice of the coherent tokens of several groups, and the sum of bytes, by the block that
// comes here last of `blocks`. counters: blocks done, then the highest level per segment.
template <typename Shared>
__device__ __forceinline__ void FinishSeveral(const RouteParams& p, const RoutingBatch& batch,
                                              uint32_t* counters, uint32_t blocks, Shared& s) {
  const int tid = static_cast<int>(threadIdx.x);
  uint32_t* const highest = counters + 1;
  if (tid < p.num_segments) atomicMax(highest + tid, static_cast<uint32_t>(s.highest[tid]));
  if (!ArriveLast(counters, blocks, &s.flag)) return;
  uint32_t others = 0;  // arrives while the tokens choose
  if (tid < p.num_segments) others = atomicExch(highest + tid, 0);
  const int count = batch.num_coherent * kMaxScores;
  const float* losses = p.losses;
  if (count <= static_cast<int>(sizeof(s.sums) / sizeof(float))) {
    float* const here = &s.sums[0][0][0];
#pragma unroll 4
    for (int e = tid; e < count; e += Shared::kThreads) here[e] = __ldcg(p.losses + e);
    losses = here;
    __syncthreads();
  }
  if (count > 0) ChooseTogether(p, batch, losses, s);
  if (tid < p.num_segments) atomicMax(s.highest + tid, static_cast<int>(others));
  __syncthreads();
  if (tid == 0) CountBytes(p, s.highest);
}

// call(T(), input) for x's element type and what x is made from, both known to the compiler. Host
// side.
template <typename Call>
cudaError_t WithRouteInput(DType x, RouteInput input, const Call& call) {
  return WithActivation(x, [&](auto element) {
    switch (input) {
      case RouteInput::kPlain:
        return call(element, std::integral_constant<RouteInput, RouteInput::kPlain>());
      case RouteInput::kNorm:
        return call(element, std::integral_constant<RouteInput, RouteInput::kNorm>());
      case RouteInput::kSwiGlu:
        return call(element, std::integral_constant<RouteInput, RouteInput::kSwiGlu>());
    }
    return cudaErrorInvalidValue;
  });
}

// Host side.
inline InputParams StateInput(const RouteSource& source, const Tensor& x) {
  InputParams params{};
  params.input = source.input;
  params.cols = static_cast<int>(x.cols);
  params.x = x.data, params.x_stride = x.stride;
  params.source = source.source.data, params.source_stride = source.source.stride;
  params.delta = source.delta.data, params.delta_stride = source.delta.stride;
  params.norm_weight = static_cast<const float*>(source.norm_weight.data);
  params.eps = source.eps;
  return params;
}

// Host side: all of the parameters but scratch.
inline RouteParams StateRoute(const RouteSource& source, const Tensor& x,
                              const RoutedWeight& linear, const RoutingBatch& batch,
                              int others_level, uint8_t* levels, int64_t levels_stride) {
  const Router& router = linear.router;
  const SlicedWeight& weight = linear.weight;
  RouteParams params{StateInput(source, x)};
  params.w1 = router.w1.Row<half>(0), params.w1_stride = router.w1.stride;
  params.b1 = router.b1.Row<float>(0), params.u = router.u.Row<float>(0);
  params.w2 = router.w2.Row<float>(0), params.w2_stride = router.w2.stride;
  params.b2 = router.b2.Row<float>(0);
  params.num_hidden = router.num_hidden;
  params.num_segments = weight.num_segments;
  int64_t begin = 0;
  for (int s = 0; s < weight.num_segments; ++s) {
    std::copy(router.bytes[s].begin(), router.bytes[s].end(), params.bytes[s]);
    const int64_t rows = weight.segment_end[s] - begin;
    params.tiles[s] = static_cast<uint32_t>(rows / kTileRows * (weight.cols / kGroupSize));
    begin = weight.segment_end[s];
  }
  params.batch = batch, params.others_level = others_level;
  params.levels = levels, params.levels_stride = levels_stride;
  return params;
}

// Up to kFewRoutedTokens tokens of a source that CanFuseRoute: leaves all losses, which params
// names, and x in the images, for a matmul that chooses; without a router, only x. Host side.
cudaError_t LaunchRouteForMatmul(const LaunchContext& context, const RouteParams& params, DType x,
                                 const BatchImages& images);

// More than kFewRoutedTokens of such a source. params has no scratch yet. Host side.
cudaError_t LaunchRouteMany(const LaunchContext& context, const RouteParams& params, DType x);

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_ROUTE_CUH_
