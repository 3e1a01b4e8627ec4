// What the sampling kernels share: the statistics of a row of logits, found by several blocks.
#ifndef MOBI_KERNELS_CUDA_SAMPLING_CUH_
#define MOBI_KERNELS_CUDA_SAMPLING_CUH_

#include "kernels/backend.h"
#include "kernels/cuda/device.cuh"

namespace mobi::cuda {

inline constexpr int kRowThreads = 256;
inline constexpr int kValuesPerThread = 16;
inline constexpr int kSplitValues = kRowThreads * kValuesPerThread;  // of a row, per block
inline constexpr int kMaxRowsAtOnce = 32768;

struct SplitStats {
  float best;   // largest value
  float least;  // smallest
  float sum;    // of exp(value - best)
  int bad;      // a value is not finite
};

// A row of logits and what a draw from it may take.
struct RowPlan {
  float best;  // of the unmodified logits
  float least;
  float log_sum;  // log of the sum of exp(logit - best)
  int bad;        // not to be sampled: kNonFiniteLogits
  // A token may be drawn if its edited logit is above `limit`, or equal and its id at most
  // last_equal.
  float limit;
  int32_t last_equal;
};

// Values [split * kSplitValues, ...) of a row, by one block; the result is thread 0's.
// values: what was read, for the caller to copy.
__device__ __forceinline__ SplitStats StatsOfSplit(const float* row, int vocab, int split,
                                                   float (&values)[kValuesPerThread],
                                                   float* shared) {
  const int first = split * kSplitValues + static_cast<int>(threadIdx.x);
  float best = -INFINITY, least = INFINITY;
  int bad = 0;
#pragma unroll
  for (int i = 0; i < kValuesPerThread; ++i) {
    const int at = first + i * kRowThreads;
    values[i] = at < vocab ? row[at] : -INFINITY;
    if (at < vocab) {
      bad |= !isfinite(values[i]);
      best = fmaxf(best, values[i]);
      least = fminf(least, values[i]);
    }
  }
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = kRowThreads / 32;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, offset));
    least = fminf(least, __shfl_xor_sync(kFullWarp, least, offset));
  }
  if (threadIdx.x % 32 == 0) shared[warp] = best, shared[warps + warp] = least;
  bad = __syncthreads_or(bad);
#pragma unroll
  for (int w = 0; w < warps; ++w) {
    best = fmaxf(best, shared[w]);
    least = fminf(least, shared[warps + w]);
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kValuesPerThread; ++i) {
    if (first + i * kRowThreads < vocab) sum += expf(values[i] - best);
  }
  return {best, least, BlockSum(sum, shared + 2 * warps), bad};
}

// Joins the statistics of a row's splits, by the first warp; every lane gets the result.
__device__ __forceinline__ RowPlan JoinSplits(const SplitStats* splits, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float best = -INFINITY, least = INFINITY, sum = 0;
  int bad = 0;
  for (int i = lane; i < count; i += 32) {
    best = fmaxf(best, __ldcg(&splits[i].best));
    least = fminf(least, __ldcg(&splits[i].least));
    bad |= __ldcg(&splits[i].bad);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, offset));
    least = fminf(least, __shfl_xor_sync(kFullWarp, least, offset));
  }
  for (int i = lane; i < count; i += 32) {
    sum += __ldcg(&splits[i].sum) * expf(__ldcg(&splits[i].best) - best);
  }
  bad = __any_sync(kFullWarp, bad);
  return {best, least, logf(WarpSum(sum)), bad, -3.402823466e+38f, INT32_MAX};
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SAMPLING_CUH_
