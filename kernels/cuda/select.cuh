// Selection without a sort, by one block: the value at which a running count or a running mass over
// descending values reaches a target. Weights are integers (probabilities in fixed point), so sums
// do not depend on the order of atomics. Used by top-k, top-p and the most likely tokens.
#ifndef MOBI_KERNELS_CUDA_SELECT_CUH_
#define MOBI_KERNELS_CUDA_SELECT_CUH_

#include "kernels/cuda/device.cuh"

namespace mobi::cuda {

inline constexpr int kSelectThreads = 1024;
inline constexpr int kSelectBins = 2 * kSelectThreads;
inline constexpr float kMassUnit = 0x1p40f;

using Weight = unsigned long long;

struct SelectShared {
  Weight bins[kSelectBins];
  Weight warp_sums[kSelectThreads / 32];
  Weight before;
  int bin;
  int count;
  float warp_min[kSelectThreads / 32];
  float warp_max[kSelectThreads / 32];
};

// Larger floats have larger keys; never 0 for a finite float.
__device__ __forceinline__ uint32_t KeyOf(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 counts as 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float ValueOf(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

__device__ __forceinline__ void ClearBins(SelectShared& s) {
  s.bins[2 * threadIdx.x] = s.bins[2 * threadIdx.x + 1] = 0;
  __syncthreads();
}

struct Place {
  int bin;        // the first at which the running sum reaches the target; the last bin if none
  Weight before;  // the sum of the bins before it
};

// After a barrier of the caller's own; ends with one.
__device__ __forceinline__ Place FindBin(Weight target, SelectShared& s) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const Weight low = s.bins[2 * tid], high = s.bins[2 * tid + 1];
  Weight end = low + high;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Weight before = __shfl_up_sync(kFullWarp, end, offset);
    if (lane >= offset) end += before;
  }
  if (lane == 31) s.warp_sums[warp] = end;
  if (tid == 0) s.bin = kSelectBins - 1, s.before = 0;
  __syncthreads();
  for (int w = 0; w < warp; ++w) end += s.warp_sums[w];
  const Weight begin = end - low - high;
  if (begin < target && end >= target) {
    const bool first = begin + low >= target;
    s.bin = 2 * tid + (first ? 0 : 1);
    s.before = first ? begin : begin + low;
  }
  __syncthreads();
  const Place place{s.bin, s.before};
  __syncthreads();
  return place;
}

// The sum of all bins. After a barrier of the caller's own; ends with one.
__device__ __forceinline__ Weight SumOfBins(SelectShared& s) {
  Weight sum = s.bins[2 * threadIdx.x] + s.bins[2 * threadIdx.x + 1];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
  if (threadIdx.x % 32 == 0) s.warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kSelectThreads / 32; ++w) sum += s.warp_sums[w];
  __syncthreads();
  return sum;
}

struct Boundary {
  uint32_t key;   // the largest key at which the running weight of keys >= it reaches the target
  Weight before;  // the weight of keys above it
};

// Over items 0 .. count - 1: item(i, &key, &weight) returns false for one that does not take part.
// The target is at least 1 and at most the sum of the weights.
template <typename Item>
__device__ __forceinline__ Boundary SelectKey(int count, Weight target, SelectShared& s,
                                              Item item) {
  Boundary found{0, 0};
  for (int shift = 24; shift >= 0; shift -= 8) {
    ClearBins(s);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kSelectThreads) {
      uint32_t key;
      Weight weight;
      if (!item(i, &key, &weight)) continue;
      if (shift < 24 && (key >> (shift + 8)) != (found.key >> (shift + 8))) continue;
      atomicAdd(&s.bins[255 - ((key >> shift) & 255)], weight);
    }
    __syncthreads();
    const Place place = FindBin(target - found.before, s);
    found.before += place.before;
    found.key |= static_cast<uint32_t>(255 - min(place.bin, 255)) << shift;
  }
  return found;
}

// Values of a row spread evenly over the bins, descending from `best`.
struct LinearBins {
  float best;
  float scale;

  __device__ __forceinline__ LinearBins(float best, float least)
      : best(best), scale(best > least ? (kSelectBins - 1) / (best - least) : 0.0f) {}

  __device__ __forceinline__ int operator()(float value) const {
    return min(static_cast<int>((best - value) * scale), kSelectBins - 1);
  }
};

// Lists the row's finite values that fall into bins up to `last`, in any order; returns how many.
__device__ __forceinline__ int ListCandidates(const float* values, int vocab, LinearBins bins,
                                              int last, int32_t* list, SelectShared& s) {
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < vocab; i += kSelectThreads) {
    const float value = values[i];
    if (value != -INFINITY && bins(value) <= last) list[atomicAdd(&s.count, 1)] = i;
  }
  __syncthreads();
  return s.count;
}

// The largest and the least finite value of a row.
__device__ __forceinline__ void FindRange(const float* values, int vocab, float* best, float* least,
                                          SelectShared& s) {
  float high = -INFINITY, low = INFINITY;
  for (int i = static_cast<int>(threadIdx.x); i < vocab; i += kSelectThreads) {
    const float value = values[i];
    high = fmaxf(high, value);
    if (value != -INFINITY) low = fminf(low, value);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    high = fmaxf(high, __shfl_xor_sync(kFullWarp, high, offset));
    low = fminf(low, __shfl_xor_sync(kFullWarp, low, offset));
  }
  if (threadIdx.x % 32 == 0) {
    s.warp_max[threadIdx.x / 32] = high;
    s.warp_min[threadIdx.x / 32] = low;
  }
  __syncthreads();
  for (int w = 0; w < kSelectThreads / 32; ++w) {
    high = fmaxf(high, s.warp_max[w]);
    low = fminf(low, s.warp_min[w]);
  }
  *best = high;
  *least = low;
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_SELECT_CUH_
