// Router MLP and choice of levels in one kernel, and on request the op that makes the router's
// input (a norm, SwiGLU), so that a decode step has fewer kernels in its chain. Eight blocks share
// the columns of W1, whose fragments they fetch before they wait for the input. With clusters
// (compute capability 9.0) they exchange sums through shared memory and finish the tokens between
// them; without, through scratch, and the block that arrives last finishes the group. The sums'
// order is the same either way.
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/route.cuh"

namespace mobi::cuda {
namespace {

constexpr int kColsPerTurn = kRouteWarps * 32;

__device__ __forceinline__ void PrefetchL2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// This lane's part of W1: columns first_col + turn * kColsPerTurn .. + 7 of rows g, g + 8, ...
// The first kHeldTurns turns stay in registers, the others come to L2 ahead of time.
template <int kHiddenTiles>
struct RouterWeights {
  static constexpr int kHeldTurns = kHiddenTiles <= 2 ? 4 : 2;
  uint4 held[kHeldTurns][kHiddenTiles][2];

  __device__ __forceinline__ static const half* At(const RouteParams& p, int row, int col) {
    return row < p.num_hidden && col < p.cols ? p.w1 + row * p.w1_stride + col : nullptr;
  }

  __device__ __forceinline__ static uint4 Load(const half* at) {
    return at != nullptr ? *reinterpret_cast<const uint4*>(at) : make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void Fetch(const RouteParams& p, int first_col, int turns) {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4;
#pragma unroll
    for (int turn = 0; turn < kHeldTurns; ++turn) {
      const int col = turn < turns ? first_col + turn * kColsPerTurn : p.cols;
#pragma unroll
      for (int r = 0; r < 2 * kHiddenTiles; ++r) {
        held[turn][r / 2][r % 2] = Load(At(p, 8 * r + g, col));
      }
    }
    for (int turn = kHeldTurns; turn < turns; ++turn) {
#pragma unroll
      for (int r = 0; r < 2 * kHiddenTiles; ++r) {
        const half* at = At(p, 8 * r + g, first_col + turn * kColsPerTurn);
        if (at != nullptr) PrefetchL2(at);
      }
    }
  }
};

// sums[hidden tile][token tile] += W1 x for one turn; x as packed halves.
template <int kHiddenTiles, int kTokenTiles>
__device__ __forceinline__ void MultiplyTurn(const uint4 (&w)[kHiddenTiles][2],
                                             const uint4 (&x)[kTokenTiles],
                                             float (&sums)[kHiddenTiles][kTokenTiles][4]) {
#pragma unroll
  for (int r = 0; r < kHiddenTiles; ++r) {
    const uint32_t first[4] = {w[r][0].x, w[r][1].x, w[r][0].y, w[r][1].y};
    const uint32_t second[4] = {w[r][0].z, w[r][1].z, w[r][0].w, w[r][1].w};
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      Mma<half>(sums[r][n], first, x[n].x, x[n].y);
      Mma<half>(sums[r][n], second, x[n].z, x[n].w);
    }
  }
}

// Eight elements as halves for the mma; their squares are added.
template <typename T>
__device__ __forceinline__ uint4 AsHalves(const float (&v)[8], float* squares) {
#pragma unroll
  for (int i = 0; i < 8; ++i) *squares = fmaf(v[i], v[i], *squares);
  return make_uint4(Pack<half>(v[0], v[1]), Pack<half>(v[2], v[3]), Pack<half>(v[4], v[5]),
                    Pack<half>(v[6], v[7]));
}

// Elements col .. col + 7 of a token's x: read, or made and written.
template <typename T, RouteInput kInput>
__device__ __forceinline__ void MakeInput(const RouteParams& p, int64_t token, int col, float scale,
                                          float (&v)[8]) {
  T* x = static_cast<T*>(p.x) + token * p.x_stride + col;
  if constexpr (kInput == RouteInput::kPlain) {
    Load8(x, 8, true, v);
    return;
  }
  Load8(static_cast<const T*>(p.source) + token * p.source_stride + col, 8, true, v);
  float other[8];
  if constexpr (kInput == RouteInput::kNorm) {
    Load8(p.norm_weight + col, 8, true, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= scale * other[i];
  } else {
    Load8(static_cast<const T*>(p.source) + token * p.source_stride + p.cols + col, 8, true, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = Silu(v[i]) * other[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = ToFloat(FromFloat<T>(v[i]));
  Store8(x, 8, true, v);
}

// residual += delta for this lane's elements, then the cluster's sums of squares: scales[n] is
// 1 / rms of token 8 n + g.
template <typename T, int kTokenTiles, typename Shared>
__device__ __forceinline__ void AddAndMeasure(const RouteParams& p, int first_token, int count,
                                              int first_col, int turns, int rank, Shared& s,
                                              float (&scales)[kTokenTiles]) {
  constexpr int kTokens = 8 * kTokenTiles;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32;
  const int g = tid % 32 / 4, t = tid % 4;
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
    const int64_t token = first_token + 8 * n + g;
    float squares = 0;
#pragma unroll 2
    for (int turn = 0; turn < turns; ++turn) {
      const int col = first_col + turn * kColsPerTurn;
      if (8 * n + g >= count || col >= p.cols) break;
      T* residual = static_cast<T*>(p.source) + token * p.source_stride + col;
      float v[8];
      Load8(residual, 8, true, v);
      if (p.delta != nullptr) {
        float add[8];
        Load8(static_cast<const T*>(p.delta) + token * p.delta_stride + col, 8, true, add);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = ToFloat(FromFloat<T>(v[i] + add[i]));
        Store8(residual, 8, true, v);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) squares = fmaf(v[i], v[i], squares);
    }
    squares = QuadSum(squares);
    if (t == 0) s.sums[warp][8 * n + g][0] = squares;
  }
  __syncthreads();
  for (int e = tid; e < kRouteRanks * kTokens; e += kRouteThreads) {
    const int token = e % kTokens;
    if (token >= count) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) sum += s.sums[w][token][0];
    StoreRemote(&s.squares[rank][token], e / kTokens, sum);
  }
  ClusterSync();
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kRouteRanks; ++r) sum += s.squares[r][8 * n + g];
    scales[n] = rsqrtf(sum / static_cast<float>(p.cols) + p.eps);
  }
}

// The end of a group in a cluster: this block's own tokens, then rank 0 for what concerns all.
template <int kTokens, int kWidth>
__device__ __forceinline__ void FinishInCluster(const RouteParams& p, int first_token, int count,
                                                int rank, RouteShared<kTokens, kWidth>& s) {
  const int tid = static_cast<int>(threadIdx.x);
  for (int e = tid; e < count * kWidth; e += kRouteThreads) {
    const int token = e / kWidth, at = e % kWidth;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) sum += s.sums[w][token][at];
    StoreRemote(&s.partials[rank][token / kRouteRanks][at], token % kRouteRanks, sum);
  }
  ClusterSync();
  const RouteTokens tokens{first_token, rank, kRouteRanks, count};
  const int slots = max(tokens.mine(), 0);
  for (int e = tid; e < slots * kWidth; e += kRouteThreads) {
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kRouteRanks; ++r) sum += s.partials[r][e / kWidth][e % kWidth];
    s.sums[0][e / kWidth][e % kWidth] = sum;
  }
  __syncthreads();
  auto* own_losses = reinterpret_cast<float(*)[kMaxScores]>(s.sums[1]);
  ScoreTokens(p, slots, s, own_losses);
  const bool several = gridDim.y > 1;
  for (int e = tid; e < slots * p.num_segments; e += kRouteThreads) {
    const int slot = e / p.num_segments, segment = e % p.num_segments;
    const int token = tokens.Token(slot);
    const float* losses = &own_losses[slot][segment * kNumLevels];
    if (token >= p.batch.num_coherent) {
      SetLevel(p, token, segment, ChooseAlone(p, p.batch, token, segment, losses), s);
      continue;
    }
#pragma unroll
    for (int k = 0; k < kNumLevels; ++k) {
      const int at = segment * kNumLevels + k;
      if (several) {
        p.losses[token * kMaxScores + at] = losses[k];
      } else {
        StoreRemote(&s.losses[token][at], 0, losses[k]);
      }
    }
  }
  __syncthreads();
  if (count == 1 && !several) {  // rank 0 has had the only token
    if (rank != 0) return;
    if (p.batch.num_coherent > 0) ChooseTogether(p, p.batch, s.losses[0], s);
    __syncthreads();
    if (tid == 0) CountBytes(p, s.highest);
    return;
  }
  uint32_t* highest = p.counters + gridDim.y + 1;
  if (several) {
    if (tid < p.num_segments) atomicMax(highest + tid, static_cast<uint32_t>(s.highest[tid]));
    if (!ArriveLast(p.counters + gridDim.y, gridDim.y * kRouteRanks, &s.flag)) return;
    if (tid < p.num_segments) s.highest[tid] = static_cast<int>(atomicExch(highest + tid, 0));
  } else {
    if (tid < p.num_segments) {
      StoreRemote(&s.rank_highest[rank][tid], 0, static_cast<float>(s.highest[tid]));
    }
    ClusterSync();
    if (rank != 0) return;
    if (tid < p.num_segments) {
      for (int r = 0; r < kRouteRanks; ++r) {
        s.highest[tid] = max(s.highest[tid], static_cast<int>(s.rank_highest[r][tid]));
      }
    }
  }
  __syncthreads();
  if (p.batch.num_coherent > 0) ChooseTogether(p, p.batch, several ? p.losses : s.losses[0], s);
  __syncthreads();
  if (tid == 0) CountBytes(p, s.highest);
}

// The end of a group without clusters: the block that arrives last does it all.
template <int kTokens, int kWidth>
__device__ __forceinline__ void FinishAlone(const RouteParams& p, int first_token, int count,
                                            int rank, RouteShared<kTokens, kWidth>& s) {
  const int tid = static_cast<int>(threadIdx.x);
  float* partials = p.partials + int64_t{blockIdx.y} * kRouteRanks * kTokens * kWidth;
  for (int e = tid; e < count * kWidth; e += kRouteThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) sum += s.sums[w][e / kWidth][e % kWidth];
    partials[rank * kTokens * kWidth + e] = sum;
  }
  if (!ArriveLast(p.counters + blockIdx.y, kRouteRanks, &s.flag)) return;
  for (int e = tid; e < count * kWidth; e += kRouteThreads) {
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kRouteRanks; ++r) sum += __ldcg(partials + r * kTokens * kWidth + e);
    s.sums[0][e / kWidth][e % kWidth] = sum;
  }
  __syncthreads();
  ScoreTokens(p, count, s, s.losses);
  const bool several = gridDim.y > 1;
  for (int e = tid; e < count * p.num_segments; e += kRouteThreads) {
    const int slot = e / p.num_segments, segment = e % p.num_segments, token = first_token + slot;
    const float* losses = &s.losses[slot][segment * kNumLevels];
    if (token >= p.batch.num_coherent) {
      SetLevel(p, token, segment, ChooseAlone(p, p.batch, token, segment, losses), s);
    } else if (several) {
#pragma unroll
      for (int k = 0; k < kNumLevels; ++k) {
        p.losses[token * kMaxScores + segment * kNumLevels + k] = losses[k];
      }
    }
  }
  __syncthreads();
  if (several) {
    uint32_t* highest = p.counters + gridDim.y + 1;
    if (tid < p.num_segments) atomicMax(highest + tid, static_cast<uint32_t>(s.highest[tid]));
    if (!ArriveLast(p.counters + gridDim.y, gridDim.y, &s.flag)) return;
    if (tid < p.num_segments) s.highest[tid] = static_cast<int>(atomicExch(highest + tid, 0));
    __syncthreads();
  }
  if (p.batch.num_coherent > 0) ChooseTogether(p, p.batch, several ? p.losses : s.losses[0], s);
  __syncthreads();
  if (tid == 0) CountBytes(p, s.highest);
}

template <typename T, RouteInput kInput, int kHiddenTiles, int kTokenTiles, bool kClusters>
__global__ void __launch_bounds__(kRouteThreads)
    RouteKernel(const __grid_constant__ RouteParams p) {
  constexpr int kTokens = 8 * kTokenTiles, kWidth = 16 * kHiddenTiles + 1;
  using Weights = RouterWeights<kHiddenTiles>;
  extern __shared__ __align__(16) uint8_t raw[];
  auto& s = *reinterpret_cast<RouteShared<kTokens, kWidth>*>(raw);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int g = lane / 4, t = lane % 4, rank = static_cast<int>(blockIdx.x);
  const int first_token = static_cast<int>(blockIdx.y) * kTokens;
  const int count = min(kTokens, p.batch.num_tokens - first_token);
  const int turns = (p.cols + kRouteRanks * kColsPerTurn - 1) / (kRouteRanks * kColsPerTurn);
  const int first_col = rank * turns * kColsPerTurn + warp * 32 + 8 * t;
  if constexpr (kClusters) ClusterArrive();
  AllowNext();
  Weights weights;
  weights.Fetch(p, first_col, turns);
  LoadRouter(p, s);
  if (tid < kMaxSegments) s.highest[tid] = 0;
  WaitForPrevious();
  if constexpr (kClusters) ClusterWait();  // every block of the cluster has begun

  float scales[kTokenTiles] = {};
  if constexpr (kInput == RouteInput::kNorm) {
    AddAndMeasure<T, kTokenTiles>(p, first_token, count, first_col, turns, rank, s, scales);
  }
  float sums[kHiddenTiles][kTokenTiles][4] = {};
  float squares[kTokenTiles] = {};
  const auto input = [&](int turn, uint4(&x)[kTokenTiles]) {
    const int col = first_col + turn * kColsPerTurn;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      x[n] = make_uint4(0, 0, 0, 0);
      if (8 * n + g >= count || col >= p.cols) continue;
      float v[8];
      MakeInput<T, kInput>(p, first_token + 8 * n + g, col, scales[n], v);
      x[n] = AsHalves<T>(v, &squares[n]);
    }
  };
#pragma unroll
  for (int turn = 0; turn < Weights::kHeldTurns; ++turn) {
    if (turn >= turns) break;
    uint4 x[kTokenTiles];
    input(turn, x);
    MultiplyTurn<kHiddenTiles, kTokenTiles>(weights.held[turn], x, sums);
  }
  for (int turn = Weights::kHeldTurns; turn < turns; ++turn) {
    uint4 w[kHiddenTiles][2], x[kTokenTiles];
#pragma unroll
    for (int r = 0; r < 2 * kHiddenTiles; ++r) {
      w[r / 2][r % 2] = Weights::Load(Weights::At(p, 8 * r + g, first_col + turn * kColsPerTurn));
    }
    input(turn, x);
    MultiplyTurn<kHiddenTiles, kTokenTiles>(w, x, sums);
  }
  if constexpr (kInput == RouteInput::kNorm) __syncthreads();  // s.sums was in use
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
    for (int r = 0; r < kHiddenTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s.sums[warp][8 * n + 2 * t + i % 2][16 * r + g + 8 * (i / 2)] = sums[r][n][i];
      }
    }
    const float of_token = QuadSum(squares[n]);
    if (t == 0) s.sums[warp][8 * n + g][kWidth - 1] = of_token;
  }
  ptx::WaitCopies<0>();
  __syncthreads();
  if constexpr (kClusters) {
    FinishInCluster(p, first_token, count, rank, s);
  } else {
    FinishAlone(p, first_token, count, rank, s);
  }
}

template <typename T, RouteInput kInput, int kHiddenTiles, int kTokenTiles, bool kClusters>
cudaError_t LaunchTiles(const LaunchContext& context, RouteParams params) {
  constexpr int kTokens = 8 * kTokenTiles, kWidth = 16 * kHiddenTiles + 1;
  const uint32_t groups = CeilDiv(params.batch.num_tokens, kTokens);
  const size_t partial_bytes =
      kClusters ? 0 : size_t{groups} * kRouteRanks * kTokens * kWidth * sizeof(float);
  const size_t loss_bytes = size_t(params.batch.num_coherent) * kMaxScores * sizeof(float);
  if (partial_bytes + loss_bytes > context.scratch_bytes ||
      groups + 1 + kMaxSegments > static_cast<uint32_t>(context.num_counters)) {
    return cudaErrorInvalidValue;
  }
  params.partials = reinterpret_cast<float*>(context.scratch);
  params.losses = reinterpret_cast<float*>(context.scratch + partial_bytes);
  params.counters = context.counters;
  return LaunchClusters(context, kClusters ? kRouteRanks : 0,
                        RouteKernel<T, kInput, kHiddenTiles, kTokenTiles, kClusters>,
                        dim3(kRouteRanks, groups), kRouteThreads,
                        sizeof(RouteShared<kTokens, kWidth>), params);
}

template <typename T, RouteInput kInput>
cudaError_t LaunchInput(const LaunchContext& context, const RouteParams& params) {
  if constexpr (kInput == RouteInput::kPlain) {
    if (!context.clusters) return LaunchTiles<T, kInput, 4, 2, false>(context, params);
    if (params.num_hidden > kMaxFusedRouterHidden) {
      return LaunchTiles<T, kInput, 4, 2, true>(context, params);
    }
  }
  if (params.batch.num_tokens <= 8) return LaunchTiles<T, kInput, 2, 1, true>(context, params);
  if (params.batch.num_tokens <= 16) return LaunchTiles<T, kInput, 2, 2, true>(context, params);
  return LaunchTiles<T, kInput, 2, 4, true>(context, params);
}

}  // namespace

cudaError_t LaunchRoute(const LaunchContext& context, const RouteSource& source, Tensor x,
                        const RoutedWeight& linear, const RoutingBatch& batch, uint8_t* levels,
                        int64_t levels_stride) {
  const RouteParams params = StateRoute(source, x, linear, batch, levels, levels_stride);
  return WithActivation(x.dtype, [&](auto element) {
    using T = decltype(element);
    switch (source.input) {
      case RouteInput::kPlain:
        return LaunchInput<T, RouteInput::kPlain>(context, params);
      case RouteInput::kNorm:
        return LaunchInput<T, RouteInput::kNorm>(context, params);
      case RouteInput::kSwiGlu:
        return LaunchInput<T, RouteInput::kSwiGlu>(context, params);
    }
    return cudaErrorInvalidValue;
  });
}

bool CanFuseRoute(const LaunchContext& context, const RouteSource& source, Tensor x,
                  const RoutedWeight& linear) {
  return context.clusters && linear.router.num_hidden <= kMaxFusedRouterHidden &&
         x.cols == linear.weight.cols && Vectorizable(x) && Vectorizable(source.source) &&
         (source.delta.data == nullptr || Vectorizable(source.delta)) &&
         (source.norm_weight.data == nullptr || Vectorizable(source.norm_weight));
}

}  // namespace mobi::cuda
