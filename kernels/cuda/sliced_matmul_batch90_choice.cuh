// The choice of levels in the matmul of the batch path, from the losses that the router has left:
// by a warp of each block for the block's segment, so that no block of the router waits for the
// others. The levels are those of route.cuh's ChooseTogether and ChooseAlone.
#ifndef MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_CHOICE_CUH_
#define MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_CHOICE_CUH_

#include <cstdint>

#include "kernels/cuda/route.cuh"

namespace mobi::cuda {

// All of the batch's tokens: lane + 32 i is the lane's i-th.
struct BatchChoice {
  static constexpr int kPerLane = kFewRoutedTokens / 32;

  const RouteParams& r;
  int lane;
  int limits[kPerLane];  // lowest + 16 highest; 0: no token
  double inverse_price[kPerLane];

  __device__ __forceinline__ int Token(int i) const { return lane + 32 * i; }
  __device__ __forceinline__ bool Has(int i) const { return Token(i) < r.batch.num_tokens; }
  __device__ __forceinline__ int Lowest(int i) const { return limits[i] % 16; }
  __device__ __forceinline__ int Highest(int i) const { return limits[i] / 16; }
  __device__ __forceinline__ bool IsPinned(int i) const { return Lowest(i) == Highest(i); }
  __device__ __forceinline__ bool IsCoherent(int i) const {
    return Token(i) < r.batch.num_coherent;
  }

  // Reads what was there before the step's first kernel.
  __device__ __forceinline__ BatchChoice(const RouteParams& r, int lane) : r(r), lane(lane) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      limits[i] = 0, inverse_price[i] = 0;
      if (!Has(i)) continue;
      limits[i] = r.batch.min_level[Token(i)] + 16 * r.batch.max_level[Token(i)];
      if (IsCoherent(i)) inverse_price[i] = 1.0 / r.batch.price[Token(i)];
    }
  }

  using Losses = float4[kPerLane];  // of levels 1 to 4

  static __device__ __forceinline__ float LossOf(const float4& losses, int k) {
    return k == 0 ? losses.x : k == 1 ? losses.y : k == 2 ? losses.z : losses.w;
  }
  static __device__ __forceinline__ bool AreFinite(const float4& losses) {
    return isfinite(losses.x) && isfinite(losses.y) && isfinite(losses.z) && isfinite(losses.w);
  }

  // The level that the coherent tokens share. Every sixteenth token is added, then the sums are.
  __device__ __forceinline__ int ChooseShared(int segment, const Losses& losses) const {
    auto pinned = static_cast<uint32_t>(r.others_level);
    double sums[kNumLevels] = {};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (32 * i >= r.batch.num_tokens) break;
      if (Has(i) && IsPinned(i)) pinned = max(pinned, static_cast<uint32_t>(Highest(i)));
      const bool counts = IsCoherent(i) && !IsPinned(i) && AreFinite(losses[i]);
#pragma unroll
      for (int k = 0; k < kNumLevels; ++k) {
        const double own = counts ? LossOf(losses[i], k) * inverse_price[i] : 0.0;
        sums[k] = sums[k] + own + __shfl_down_sync(kFullWarp, own, 16);
      }
    }
    pinned = __reduce_max_sync(kFullWarp, pinned);
    const double paid = pinned > 0 ? r.bytes[segment][pinned - 1] : 0.0;
#pragma unroll
    for (int k = 0; k < kNumLevels; ++k) {
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2) {
        sums[k] += __shfl_xor_sync(kFullWarp, sums[k], offset);
      }
      if (k >= static_cast<int>(pinned)) sums[k] += r.bytes[segment][k] - paid;
    }
    return __shfl_sync(kFullWarp, Cheapest(sums, 1, kNumLevels), 0);
  }

  // Levels of the lane's tokens for a segment; 0 where there is none.
  __device__ __forceinline__ void Choose(int segment, int (&levels)[kPerLane]) const {
    Losses losses;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (!Has(i)) continue;
      losses[i] =
          __ldcg(reinterpret_cast<const float4*>(r.losses + Token(i) * kMaxScores) + segment);
    }
    const int shared = r.batch.num_coherent > 0 ? ChooseShared(segment, losses) : 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      levels[i] = 0;
      if (!Has(i)) continue;
      if (!AreFinite(losses[i])) {
        levels[i] = Highest(i);
      } else if (IsCoherent(i)) {
        levels[i] = min(max(shared, Lowest(i)), Highest(i));
      } else {
        const float of_token[kNumLevels] = {losses[i].x, losses[i].y, losses[i].z, losses[i].w};
        levels[i] = ChooseAlone(r, r.batch, Token(i), segment, of_token);
      }
    }
  }

  // What others see of a segment's choice; by one block.
  __device__ __forceinline__ void Publish(int segment, const int (&levels)[kPerLane]) const {
    auto highest = static_cast<uint32_t>(r.others_level);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (Has(i)) PublishLevel(r, Token(i), segment, levels[i]);
      highest = max(highest, static_cast<uint32_t>(levels[i]));
    }
    highest = __reduce_max_sync(kFullWarp, highest);
    if (lane == 0) AddLoadedBytes(r, static_cast<uint64_t>(r.bytes[segment][highest - 1]));
  }
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SLICED_MATMUL_BATCH90_CHOICE_CUH_
