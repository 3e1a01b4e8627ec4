#include <algorithm>

#include "kernels/cuda/ops.h"
#include "kernels/cuda/sampling.cuh"
#include "kernels/cuda/select.cuh"

namespace mobi::cuda {
namespace {

struct MostLikelyParams {
  const float* logits;
  int64_t stride;
  int vocab;
  const int32_t* rows;
  int count;
  TopLogprobs* out;
  int32_t* tokens;  // [row][vocab]
};

struct Entry {
  float value;
  int32_t token;
};

// log of the sum of exp(value - best), by the block.
__device__ __forceinline__ float LogSum(const float* values, int vocab, float best, float* shared) {
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < vocab; i += kSelectThreads) {
    sum += expf(values[i] - best);
  }
  return logf(BlockSum(sum, shared));
}

// One block per row: the `count`-th largest value by selection, then the few that remain by rank.
__global__ void __launch_bounds__(kSelectThreads)
    MostLikelyKernel(const __grid_constant__ MostLikelyParams p) {
  __shared__ SelectShared s;
  __shared__ Entry entries[kMaxTopLogprobs];
  __shared__ float warp_sums[kSelectThreads / 32];
  AllowNext();
  WaitForPrevious();
  const float* values = p.logits + p.rows[blockIdx.x] * p.stride;
  int32_t* list = p.tokens + int64_t{blockIdx.x} * p.vocab;
  const int wanted = min(p.count, p.vocab);
  float best, least;
  FindRange(values, p.vocab, &best, &least, s);
  const float log_sum = LogSum(values, p.vocab, best, warp_sums);
  const LinearBins bins(best, least);
  ClearBins(s);
  for (int i = static_cast<int>(threadIdx.x); i < p.vocab; i += kSelectThreads) {
    if (values[i] != -INFINITY) atomicAdd(&s.bins[bins(values[i])], Weight{1});
  }
  __syncthreads();
  const Place place = FindBin(wanted, s);
  const int count = ListCandidates(values, p.vocab, bins, place.bin, list, s);
  const Boundary boundary = SelectKey(count, wanted, s, [&](int i, uint32_t* key, Weight* weight) {
    *key = KeyOf(values[list[i]]);
    *weight = 1;
    return true;
  });
  // Of equal values at the boundary the lower ids are in.
  const auto last_equal = static_cast<int32_t>(
      ~SelectKey(count, wanted - boundary.before, s, [&](int i, uint32_t* key, Weight* weight) {
         *key = ~static_cast<uint32_t>(list[i]);
         *weight = 1;
         return KeyOf(values[list[i]]) == boundary.key;
       }).key);
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kSelectThreads) {
    const int32_t token = list[i];
    const uint32_t key = KeyOf(values[token]);
    if (key < boundary.key || (key == boundary.key && token > last_equal)) continue;
    const int at = atomicAdd(&s.count, 1);
    if (at < kMaxTopLogprobs) entries[at] = {values[token], token};
  }
  __syncthreads();
  const int found = min(s.count, wanted);
  if (static_cast<int>(threadIdx.x) >= found) return;
  const Entry mine = entries[threadIdx.x];
  int rank = 0;
  for (int i = 0; i < found; ++i) {
    const Entry other = entries[i];
    rank += other.value > mine.value || (other.value == mine.value && other.token < mine.token);
  }
  p.out[blockIdx.x].tokens[rank] = mine.token;
  p.out[blockIdx.x].logprobs[rank] = mine.value - best - log_sum;
}

}  // namespace

cudaError_t LaunchMostLikely(const LaunchContext& context, Tensor logits, const int32_t* rows,
                             int num_rows, int count, TopLogprobs* out) {
  MostLikelyParams params{};
  params.logits = logits.Row<float>(0), params.stride = logits.stride;
  params.vocab = static_cast<int>(logits.cols);
  params.count = std::min(count, kMaxTopLogprobs);
  params.tokens = reinterpret_cast<int32_t*>(context.scratch);
  const auto at_once =
      static_cast<int>(context.scratch_bytes / (size_t(params.vocab) * sizeof(int32_t)));
  if (at_once < 1) return cudaErrorInvalidValue;
  for (int first = 0; first < num_rows; first += at_once) {
    params.rows = rows + first;
    params.out = out + first;
    const cudaError_t error = Launch(context, MostLikelyKernel, std::min(at_once, num_rows - first),
                                     kSelectThreads, 0, params);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace mobi::cuda
