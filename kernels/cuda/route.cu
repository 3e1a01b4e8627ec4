// Router MLP and choice of levels in one kernel, and on request the op that makes the router's
// input (a norm, SwiGLU), so that a decode step has fewer kernels in its chain. Eight blocks share
// the columns of W1, whose fragments they fetch before they wait for the input. With clusters
// (compute capability 9.0) they exchange sums through shared memory and finish the tokens between
// them; without, through scratch, and the block that arrives last finishes the group. The sums'
// order is the same either way. For a matmul of the batch path the kernel ends with the tokens'
// losses, from which that one chooses, and leaves x as whole numbers, which saves a kernel; where
// all tokens are pinned it only does that.
// Many tokens are route_many.cu's.
#include "kernels/cuda/ops.h"
#include "kernels/cuda/route.cuh"
#include "kernels/cuda/route_input.cuh"

namespace mobi::cuda {
namespace {

// The end of a group in a cluster: this block's own tokens, then rank 0 for what concerns all.
// meanwhile(): done while the sums are under way. for_matmul: it ends with the losses.
template <int kTokens, int kWidth, typename Meanwhile>
__device__ __forceinline__ void FinishInCluster(const RouteParams& p, const RouteTile& tile,
                                                const RoutingBatch& batch, bool for_matmul,
                                                RouteShared<kTokens, kWidth>& s,
                                                const Meanwhile& meanwhile) {
  const int tid = static_cast<int>(threadIdx.x), count = tile.count, rank = tile.rank;
  SendRankSums(s.sums, count, kRouteRanks, s.partials[rank], kRouteThreads);
  ClusterArrive();
  meanwhile();
  ClusterWait();
  const RouteTokens tokens{tile.first_token, rank, kRouteRanks, count};
  const int slots = max(tokens.mine(), 0);
  AddRanks(slots, s);
  auto* own_losses = reinterpret_cast<float(*)[kMaxScores]>(s.sums[1]);
  ScoreTokens(p, slots, s, own_losses);
  if (for_matmul) {
    for (int e = tid; e < slots * kMaxScores; e += kRouteThreads) {
      p.losses[tokens.Token(e / kMaxScores) * kMaxScores + e % kMaxScores] =
          own_losses[e / kMaxScores][e % kMaxScores];
    }
    return;
  }
  const bool several = gridDim.y > 1;
  ChooseOwn(p, batch, tokens, slots, own_losses, s, [&](int token, int score, float loss) {
    if (several) {
      p.losses[token * kMaxScores + score] = loss;
    } else {
      StoreRemote(&s.losses[token][score], 0, loss);
    }
  });
  if (several) return FinishSeveral(p, batch, p.counters + gridDim.y, gridDim.y * kRouteRanks, s);
  if (count == 1) {  // rank 0 has had the only token
    if (rank != 0) return;
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
    __syncthreads();
  }
  if (batch.num_coherent > 0) ChooseTogether(p, batch, s.losses[0], s);
  __syncthreads();
  if (tid == 0) CountBytes(p, s.highest);
}

// The end of a group without clusters: the block that arrives last does it all.
template <int kTokens, int kWidth>
__device__ __forceinline__ void FinishAlone(const RouteParams& p, const RouteTile& tile,
                                            const RoutingBatch& batch,
                                            RouteShared<kTokens, kWidth>& s) {
  const int count = tile.count, rank = tile.rank;
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
  const RouteTokens tokens{tile.first_token, 0, 1, count};
  ChooseOwn(p, batch, tokens, count, s.losses, s, [&](int token, int score, float loss) {
    if (several) p.losses[token * kMaxScores + score] = loss;
  });
  if (several) return FinishSeveral(p, batch, p.counters + gridDim.y, gridDim.y, s);
  if (batch.num_coherent > 0) ChooseTogether(p, batch, s.losses[0], s);
  __syncthreads();
  if (tid == 0) CountBytes(p, s.highest);
}

// kTurns: how many are in registers at a time.
template <typename T, RouteInput kInput, int kHiddenTiles, int kTokenTiles, int kTurns,
          bool kClusters>
__global__ void __launch_bounds__(kRouteThreads, kTokenTiles == 1 ? 2 : 1)
    RouteKernel(const __grid_constant__ RouteParams p, const __grid_constant__ BatchImages images) {
  constexpr int kTokens = 8 * kTokenTiles, kWidth = 16 * kHiddenTiles + 1;
  constexpr bool kNorm = kInput == RouteInput::kNorm;
  extern __shared__ __align__(16) uint8_t raw[];
  auto& s = *reinterpret_cast<RouteShared<kTokens, kWidth>*>(raw);
  const RouteTile tile(p, kTokens);
  const bool leaves_images = kTokenTiles == 1 && images.bytes != nullptr;
  const RouteColumns<kTokens> columns(raw + sizeof(s), tile.turns, kNorm, leaves_images);
  if constexpr (kClusters) ptx::ClusterArriveRelaxed();
  AllowNext();
  RouterWeights<kHiddenTiles, kTurns> weights(p, tile.first_col);
  weights.Fetch(0, tile.turns);
  weights.Prefetch(tile.turns);
  if constexpr (kNorm) {
    columns.LoadNorm(p.norm_weight + tile.block_col,
                     min(tile.turns * kColsPerTurn, p.cols - tile.block_col));
  }
  const bool routes = p.num_hidden > 0;
  if (routes) LoadRouter(p, s);
  RoutingBatch batch = p.batch;
  const FewTokens few(batch, !leaves_images);
  if (threadIdx.x < kMaxSegments) s.highest[threadIdx.x] = 0;
  WaitForPrevious();
  if constexpr (kClusters) ClusterWait();  // every block of the cluster has begun
  if (leaves_images) {
    ClearArrivals(images, blockIdx.y * kRouteRanks + tile.rank, gridDim.y * kRouteRanks);
  }
  float scale = 0;
  uint4 residual[kTurns];
  if constexpr (kNorm) {
    static_assert(kTokenTiles == 1);
    const int token = tile.first_token + static_cast<int>(threadIdx.x) % 32 / 4;
    scale = AddAndMeasure<T>(p, tile, TokenRows<T>(p, token, tile.first_col), s, residual);
  }
  RouteSums<kHiddenTiles, kTokenTiles> sums;
  MakeAndMultiply<T, kInput>(p, tile, columns, scale, residual, weights, sums);
  if constexpr (kTokenTiles == 1) {
    if (!routes) {  // all that the matmul needs are the images
      __syncthreads();
      return LeaveInputImages<T>(p, images, tile, columns);
    }
  }
  if constexpr (kNorm) __syncthreads();  // s.sums was in use
  sums.Keep(s.sums[threadIdx.x / 32]);
  few.Keep(s, batch);
  ptx::WaitCopies<0>();
  __syncthreads();
  if constexpr (kClusters) {
    FinishInCluster(p, tile, batch, leaves_images, s, [&] {
      if constexpr (kTokenTiles == 1) {
        if (leaves_images) LeaveInputImages<T>(p, images, tile, columns);
      }
    });
  } else {
    FinishAlone(p, tile, batch, s);
  }
}

template <typename T, RouteInput kInput, int kHiddenTiles, int kTokenTiles, int kTurns,
          bool kClusters>
cudaError_t LaunchTiles(const LaunchContext& context, RouteParams params,
                        const BatchImages& images) {
  constexpr int kTokens = 8 * kTokenTiles, kWidth = 16 * kHiddenTiles + 1;
  const uint32_t groups = CeilDiv(params.batch.num_tokens, kTokens);
  const size_t partial_bytes =
      kClusters ? 0 : size_t{groups} * kRouteRanks * kTokens * kWidth * sizeof(float);
  const size_t loss_bytes = size_t(params.batch.num_coherent) * kMaxScores * sizeof(float);
  if (partial_bytes + loss_bytes > context.scratch_bytes ||
      groups + 1 + kMaxSegments > static_cast<uint32_t>(context.num_counters) ||
      (kTokenTiles > 1 && images.bytes != nullptr)) {
    return cudaErrorInvalidValue;
  }
  params.partials = reinterpret_cast<float*>(context.scratch);
  if (images.bytes == nullptr) {
    params.losses = reinterpret_cast<float*>(context.scratch + partial_bytes);
  }
  params.counters = context.counters;
  const size_t shared_bytes =
      sizeof(RouteShared<kTokens, kWidth>) +
      RouteColumns<kTokens>::Bytes(TurnsOf(params.cols), kInput == RouteInput::kNorm,
                                   images.bytes != nullptr);
  return LaunchClusters(context, kClusters ? kRouteRanks : 0,
                        RouteKernel<T, kInput, kHiddenTiles, kTokenTiles, kTurns, kClusters>,
                        dim3(kRouteRanks, groups), kRouteThreads, shared_bytes, params, images);
}

template <typename T, RouteInput kInput>
cudaError_t LaunchInput(const LaunchContext& context, const RouteParams& params,
                        const BatchImages& images) {
  if constexpr (kInput == RouteInput::kPlain) {
    if (!context.clusters) return LaunchTiles<T, kInput, 4, 2, 2, false>(context, params, images);
    if (params.num_hidden > kMaxFusedRouterHidden) {
      return LaunchTiles<T, kInput, 4, 2, 2, true>(context, params, images);
    }
  }
  return TurnsOf(params.cols) <= 2 ? LaunchTiles<T, kInput, 2, 1, 2, true>(context, params, images)
                                   : LaunchTiles<T, kInput, 2, 1, 4, true>(context, params, images);
}

cudaError_t LaunchSource(const LaunchContext& context, const RouteParams& params, DType x,
                         const BatchImages& images) {
  if (context.clusters && params.num_hidden <= kMaxFusedRouterHidden &&
      params.batch.num_tokens > kFewRoutedTokens) {
    return LaunchRouteMany(context, params, x);
  }
  return WithRouteInput(x, params.input, [&](auto element, auto input) {
    return LaunchInput<decltype(element), input()>(context, params, images);
  });
}

}  // namespace

cudaError_t LaunchRoute(const LaunchContext& context, const RouteSource& source, Tensor x,
                        const RoutedWeight& linear, const RoutingBatch& batch, int others_level,
                        uint8_t* levels, int64_t levels_stride) {
  return LaunchSource(context,
                      StateRoute(source, x, linear, batch, others_level, levels, levels_stride),
                      x.dtype, BatchImages{});
}

cudaError_t LaunchRouteForMatmul(const LaunchContext& context, const RouteParams& params, DType x,
                                 const BatchImages& images) {
  if (params.batch.num_tokens > kFewRoutedTokens) return cudaErrorInvalidValue;
  return LaunchSource(context, params, x, images);
}

bool CanFuseRoute(const LaunchContext& context, const RouteSource& source, Tensor x,
                  const RoutedWeight& linear) {
  return context.clusters && linear.router.num_hidden <= kMaxFusedRouterHidden &&
         x.cols == linear.weight.cols && Vectorizable(x) && Vectorizable(source.source) &&
         (source.delta.data == nullptr || Vectorizable(source.delta)) &&
         (source.norm_weight.data == nullptr || Vectorizable(source.norm_weight));
}

}  // namespace mobi::cuda
