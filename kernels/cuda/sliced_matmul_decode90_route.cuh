// A decode step's linear in one kernel: the op that makes x (a norm, SwiGLU), the router, the
// choice of levels and the sliced matmul, for the few tokens of one block. Every cluster does the
// first three for itself, so nothing waits for another kernel in between: eight blocks share the
// columns of W1 as they share the matmul's, and exchange their sums once.
//
// Order of sums: that of route.cu, whose eight blocks have the same columns, so x and levels are
// bit for bit what the ops one by one give; and so is the matmul.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_ROUTE_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_ROUTE_CUH_

#include <cstdint>

#include "kernels/cuda/route.cuh"
#include "kernels/cuda/sliced_matmul_decode90_head.cuh"

namespace mobi::cuda {

template <int N, int W>
__device__ __forceinline__ void SetLevel(const RouteParams&, int token, int segment, int level,
                                         RouteHead<N, W>& s) {
  s.levels[segment][token] = static_cast<uint8_t>(level);
  atomicOr(&s.present, 1u << (4 * segment + level - 1));
}

template <int N, int W>
struct RoutedDecode90 : Decode90Head<N, W> {
  using Base = Decode90Head<N, W>;
  using Base::Base;
  using Base::Chooses;
  using Base::kAllThreads;
  using Base::kRouters;
  using Base::kWarps;
  using Base::lane;
  using Base::num_tokens;
  using Base::r;
  using Base::s;
  using Base::SumsArrive;
  using Base::warp;
  using typename Base::Head;

  // A token's losses, by one warp: a lane has a hidden unit, then a share of a score.
  __device__ __forceinline__ void ScoreToken(int token) const {
    float sum = 0, squares = 0;
#pragma unroll
    for (int k = 0; k < kRouteRanks; ++k) {
      sum += s.partials[k][token][lane];
      squares += s.partials[k][token][Head::kSumWidth - 1];
    }
    float* const hidden = s.hidden[token];
    if (lane < r.num_hidden) hidden[lane] = HiddenUnit(sum, s.b1[lane], s.u[lane], squares, r.cols);
    __syncwarp();
#pragma unroll
    for (int first = 0; first < kMaxScores; first += 4) {
      const int at = first + lane / 8;
      const bool valid = at < r.num_segments * kNumLevels;
      const float score = Score<kMaxFusedRouterHidden>(s.w2[at], hidden, r.num_hidden, valid);
      if (valid && lane % 8 == 0) s.losses[token][at] = expf(score + s.b2[at]);
    }
    __syncwarp();
  }

  // Levels of all tokens, in shared memory.
  __device__ __forceinline__ void Choose() {
    ptx::BarrierWait(SumsArrive(), 0);
#pragma unroll 1
    for (int token = Head::Thread() / 32; token < num_tokens; token += kRouters) ScoreToken(token);
    if constexpr (kRunsAhead<N>) {
      if (num_tokens > 1) ptx::NamedBarrier(kChooseBarrier, Head::kThreads);
      if (Head::Thread() < 32) ChooseForFew();
    } else {
      ChooseForMany();
    }
  }

  __device__ __forceinline__ void ChooseForMany() {
    RoutingBatch batch = r.batch;
    batch.price = s.price, batch.min_level = s.min_level, batch.max_level = s.max_level;
#pragma unroll 1
    for (int token = warp; token < num_tokens; token += kWarps) {  // which this warp has scored
      if (token < batch.num_coherent || lane >= r.num_segments) continue;
      const float* losses = &s.losses[token][lane * kNumLevels];
      SetLevel(r, token, lane, ChooseAlone(r, batch, token, lane, losses), s);
    }
    if (batch.num_coherent > 0) {
      __syncthreads();
      ChooseTogether(r, batch, s.losses[0], s);
    }
    __syncthreads();
    this->present = s.present;
  }

  // By one warp. A lane has a score and adds it over the coherent tokens, in ChooseTogether's
  // order; then it has a token and a segment.
  __device__ __forceinline__ void ChooseForFew() const {
    static_assert(kMaxScores <= 32 && kMaxSegments * N <= 32);
    if (lane < r.num_segments * kNumLevels) s.together[lane] = CostTogether();
    __syncwarp();
    const int segment = lane / N, token = lane % N;
    uint32_t occurs = 0;
    if (segment < r.num_segments && token < num_tokens) {
      const int level = ChooseOne(token, segment);
      s.levels[segment][token] = static_cast<uint8_t>(level);
      occurs = 1u << (4 * segment + level - 1);
    }
    occurs = __reduce_or_sync(kFullWarp, occurs);
    if (lane == 0) s.present = occurs;
    ptx::BarrierArrive(this->chosen);
    __syncwarp();
  }

  // What the tokens that choose together pay for this lane's score.
  __device__ __forceinline__ double CostTogether() const {
    const int segment = lane / kNumLevels, k = lane % kNumLevels, pinned = s.pinned_level;
    double of_token[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool counts = i < r.batch.num_coherent && s.min_level[i] != s.max_level[i] &&
                          AllFinite(&s.losses[i][segment * kNumLevels]);
      of_token[i] = counts ? s.losses[i][lane] * s.inverse_price[i] : 0.0;
    }
#pragma unroll
    for (int offset = N / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < offset; ++i) of_token[i] += of_token[i + offset];
    }
    const double paid = pinned > 0 ? r.bytes[segment][pinned - 1] : 0.0;
    return of_token[0] + (k < pinned ? 0.0 : r.bytes[segment][k] - paid);
  }

  __device__ __forceinline__ int ChooseOne(int token, int segment) const {
    const float* const losses = &s.losses[token][segment * kNumLevels];
    const int lowest = s.min_level[token], highest = s.max_level[token];
    if (!AllFinite(losses)) return highest;
    const bool together = token < r.batch.num_coherent;
    double cost[kNumLevels];
#pragma unroll
    for (int k = 0; k < kNumLevels; ++k) {
      cost[k] = together ? s.together[segment * kNumLevels + k]
                         : losses[k] + static_cast<double>(s.price[token]) * r.bytes[segment][k];
    }
    if (!together) return Cheapest(cost, lowest, highest);
    return min(max(Cheapest(cost, 1, kNumLevels), lowest), highest);
  }

  // What others see of the choice; by one block.
  __device__ __forceinline__ void Publish() const {
    if (blockIdx.x != gridDim.x - 1) return;
    constexpr int kWriters = kRunsAhead<N> ? 32 : kAllThreads;
    for (int e = Head::Thread(); e < num_tokens * r.num_segments; e += kWriters) {
      const int token = e / r.num_segments, segment = e % r.num_segments;
      PublishLevel(r, token, segment, s.levels[segment][token]);
    }
    if (Head::Thread() != 0) return;
    int highest[kMaxSegments];
#pragma unroll
    for (int i = 0; i < kMaxSegments; ++i) highest[i] = 32 - __clz(s.present >> (4 * i) & 15);
    CountBytes(r, highest);
  }

  // ---- The order.

  __device__ __forceinline__ void RouteFirst() {
    this->MakeHeadBarriers();
    this->MakeBarriers();
    this->LoadW1();
    this->LoadHead();
    this->Prefetch();
    ptx::ClusterArriveRelaxed();  // this block's barriers are ready
    ptx::WaitForPrevious();
    this->MakeX();
    __syncthreads();
    this->MultiplyW1();
    __syncthreads();
    this->Share();
    this->EncodeHalves();  // while the sums are under way
    Choose();
    this->Begin();
    Publish();
    this->RunAll();
  }

  // What a short kernel costs is the length of its instructions one after another. So while one
  // warpgroup chooses levels, the others ask for weights and multiply them: at the levels that were
  // chosen the last time, until they learn what they are. Not before x is made, for which they
  // would be in the way. Only where the one has no room for W1 do all multiply it first.
  __device__ __forceinline__ void RouteAhead() {
    typename Base::Guess guess;
    if (Chooses()) {
      this->MakeHeadBarriers();
      this->LoadHead();
      if constexpr (kChoosersHaveW1<N>) this->LoadSharedW1(0);
    } else {
      this->MakeBarriers();
      guess = this->LoadGuess();  // of a step before: it is there
      if constexpr (!kChoosersHaveW1<N>) {
        this->LoadW1();
        ptx::CommitCopies();
      }
    }
    ptx::ClusterArriveRelaxed();
    ptx::WaitForPrevious();
    this->MakeX();
    __syncthreads();
    if constexpr (!kChoosersHaveW1<N>) {
      this->MultiplyW1();
      __syncthreads();
    }
    if (Chooses()) {
      if constexpr (kChoosersHaveW1<N>) this->MultiplySharedW1();
      this->Share();
      Choose();
      if (Head::Thread() < 32) Publish();
      return;
    }
    this->TakeGuess(guess);
    this->Begin();
    if constexpr (!kChoosersHaveW1<N>) {
      this->EncodeHalves();
      ptx::NamedBarrier(kMultiplyBarrier, 128 * W);
    }
    this->RunAll();
  }
};

// Grid: the blocks of the clusters of eight.
template <int N, int W>
__global__ void __launch_bounds__(RoutedDecode90<N, W>::kAllThreads, 1)
    RoutedDecode90Kernel(const __grid_constant__ SlicedProblem p,
                         const __grid_constant__ Decode90Plan plan,
                         const __grid_constant__ RouteParams route) {
#if MOBI_WGMMA
  extern __shared__ __align__(1024) uint8_t shared[];
  ptx::LaunchDependents();
  RoutedDecode90<N, W> self(p, plan, route, shared);
  if constexpr (kRunsAhead<N>) {
    self.RouteAhead();
  } else {
    self.RouteFirst();
  }
#endif
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_DECODE90_ROUTE_CUH_
