// Sampling in three kernels over rows of logits. Stats: maximum and log-sum, several blocks to a
// row. Plan: one block to a row applies edits and turns top-k, top-p and min-p into one limit; rows
// without them leave at once. Draw: argmax of score plus Gumbel noise, several blocks to a row.
#include <algorithm>

#include "kernels/cuda/ops.h"
#include "kernels/cuda/sampling.cuh"
#include "kernels/cuda/select.cuh"
#include "kernels/random.h"

namespace mobi::cuda {
namespace {

constexpr float kLowest = -3.402823466e+38f;
// No noise is above this: the least exponential variable is 2^-33.
constexpr float kMostNoise = 22.9f;

struct Candidate {
  float score;
  int32_t token;
};

struct SampleParams {
  const float* logits;
  int64_t stride;
  int vocab;
  int splits;
  const SamplingRow* rows;
  const LogitEdit* edits;
  Sampled* out;
  float* scores;    // [row][vocab] edited logits of rows that have edits
  int32_t* tokens;  // [row][vocab]
  SplitStats* stats;
  RowPlan* plans;
  Candidate* drawn;  // [row][split]
  uint32_t* counters;
};

__device__ __forceinline__ const float* LogitsOf(const SampleParams& p, const SamplingRow& row) {
  return p.logits + row.logits_row * p.stride;
}

// Row's logits as they are drawn from.
__device__ __forceinline__ const float* EditedLogits(const SampleParams& p,
                                                     const SamplingRow& row) {
  return row.edit_begin < row.edit_end ? p.scores + int64_t{blockIdx.y} * p.vocab
                                       : LogitsOf(p, row);
}

__global__ void __launch_bounds__(kRowThreads)
    SampleStatsKernel(const __grid_constant__ SampleParams p) {
  __shared__ float shared[3 * kRowThreads / 32];
  __shared__ int flag;
  AllowNext();
  WaitForPrevious();
  const SamplingRow row = p.rows[blockIdx.y];
  float values[kValuesPerThread];
  const int split = static_cast<int>(blockIdx.x);
  const SplitStats stats = StatsOfSplit(LogitsOf(p, row), p.vocab, split, values, shared);
  if (row.edit_begin < row.edit_end) {
    float* copy = p.scores + int64_t{blockIdx.y} * p.vocab;
#pragma unroll
    for (int i = 0; i < kValuesPerThread; ++i) {
      const int at = split * kSplitValues + i * kRowThreads + static_cast<int>(threadIdx.x);
      if (at < p.vocab) copy[at] = values[i];
    }
  }
  SplitStats* of_row = p.stats + int64_t{blockIdx.y} * p.splits;
  if (threadIdx.x == 0) of_row[split] = stats;
  if (!ArriveLast(p.counters + blockIdx.y, gridDim.x, &flag) || threadIdx.x >= 32) return;
  const RowPlan plan = JoinSplits(of_row, p.splits);
  if (threadIdx.x == 0) p.plans[blockIdx.y] = plan;
}

__device__ __forceinline__ void ApplyEdit(const LogitEdit& edit, float* scores) {
  const float score = scores[edit.token];
  scores[edit.token] = (score > 0 ? score / edit.repetition : score * edit.repetition) + edit.bias;
}

// Applies the row's edits in order; a token is seldom edited twice. `owner` is scratch.
__device__ __forceinline__ void ApplyEdits(const SampleParams& p, const SamplingRow& row,
                                           float* scores, int32_t* owner) {
  const int first = row.edit_begin + static_cast<int>(threadIdx.x);
  for (int e = first; e < row.edit_end; e += kSelectThreads) owner[p.edits[e].token] = INT32_MAX;
  __syncthreads();
  for (int e = first; e < row.edit_end; e += kSelectThreads) {
    atomicMin(owner + p.edits[e].token, e);
  }
  __syncthreads();
  int twice = 0;
  for (int e = first; e < row.edit_end; e += kSelectThreads) {
    twice |= __ldcg(owner + p.edits[e].token) != e;
  }
  if (!__syncthreads_or(twice)) {
    for (int e = first; e < row.edit_end; e += kSelectThreads) ApplyEdit(p.edits[e], scores);
  } else if (threadIdx.x == 0) {
    for (int e = row.edit_begin; e < row.edit_end; ++e) ApplyEdit(p.edits[e], scores);
  }
  __syncthreads();
}

__device__ __forceinline__ Weight MassOf(float value, float best, float temperature) {
  return __float2ull_rn(expf((value - best) / temperature) * kMassUnit);
}

// Top-k and top-p as a limit. list: scratch of one row.
__device__ void FindLimit(const float* values, int vocab, float best, float least,
                          const SamplingRow& row, int32_t* list, RowPlan& plan, SelectShared& s) {
  const bool top_k = row.top_k > 0 && row.top_k < vocab, top_p = row.top_p < 1;
  const LinearBins bins(best, least);
  ClearBins(s);
  for (int i = static_cast<int>(threadIdx.x); i < vocab; i += kSelectThreads) {
    const float value = values[i];
    if (value == -INFINITY) continue;
    const Weight weight = top_k ? 1 : MassOf(value, best, row.temperature);
    if (weight > 0) atomicAdd(&s.bins[bins(value)], weight);
  }
  __syncthreads();
  Weight mass = SumOfBins(s);  // with top-k: the number of tokens
  const auto target_mass = [&](Weight total) {
    const double target = ceil(static_cast<double>(row.top_p) * static_cast<double>(total));
    return max(static_cast<Weight>(1), min(total, static_cast<Weight>(fmax(target, 0.0))));
  };
  const Weight target = top_k ? min(static_cast<Weight>(row.top_k), mass) : target_mass(mass);
  const Place place = FindBin(target, s);
  const int count = ListCandidates(values, vocab, bins, place.bin, list, s);
  uint32_t limit = 0;
  if (top_k) {
    limit = SelectKey(count, target, s, [&](int i, uint32_t* key, Weight* weight) {
              *key = KeyOf(values[list[i]]);
              *weight = 1;
              return true;
            }).key;
    plan.limit = ValueOf(limit);
  }
  if (!top_p) return;
  if (top_k) {  // the mass of what top-k left
    ClearBins(s);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kSelectThreads) {
      const float value = values[list[i]];
      if (KeyOf(value) < limit) continue;
      const Weight weight = MassOf(value, best, row.temperature);
      if (weight > 0) atomicAdd(&s.bins[i % kSelectBins], weight);
    }
    __syncthreads();
    mass = SumOfBins(s);
  }
  const Weight needed = target_mass(mass);
  const Boundary boundary = SelectKey(count, needed, s, [&](int i, uint32_t* key, Weight* weight) {
    const float value = values[list[i]];
    *key = KeyOf(value);
    *weight = MassOf(value, best, row.temperature);
    return *key >= limit && *weight > 0;
  });
  plan.limit = ValueOf(boundary.key);
  // Of equal tokens at the boundary the lower ids come first, as many as the mass still needs.
  const Weight each = MassOf(plan.limit, best, row.temperature);
  if (each == 0) return;
  const Weight keep = (needed - boundary.before + each - 1) / each;
  int equal = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kSelectThreads) {
    equal += KeyOf(values[list[i]]) == boundary.key;
  }
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  atomicAdd(&s.count, equal);
  __syncthreads();
  if (keep >= static_cast<Weight>(s.count)) return;
  plan.last_equal =
      static_cast<int32_t>(~SelectKey(count, keep, s, [&](int i, uint32_t* key, Weight* weight) {
                              *key = ~static_cast<uint32_t>(list[i]);
                              *weight = 1;
                              return KeyOf(values[list[i]]) == boundary.key;
                            }).key);
}

__global__ void __launch_bounds__(kSelectThreads)
    SamplePlanKernel(const __grid_constant__ SampleParams p) {
  __shared__ SelectShared s;
  AllowNext();
  WaitForPrevious();
  const SamplingRow row = p.rows[blockIdx.y];
  RowPlan plan = p.plans[blockIdx.y];
  const bool edits = row.edit_begin < row.edit_end;
  const bool sets = (row.top_k > 0 && row.top_k < p.vocab) || row.top_p < 1;
  const bool filters = row.temperature > 0 && (sets || row.min_p > 0);
  if (plan.bad || (!edits && !filters)) return;
  float best = plan.best, least = plan.least;
  int32_t* tokens = p.tokens + int64_t{blockIdx.y} * p.vocab;
  if (edits) {
    float* scores = p.scores + int64_t{blockIdx.y} * p.vocab;
    ApplyEdits(p, row, scores, tokens);
    FindRange(scores, p.vocab, &best, &least, s);
    plan.bad = best == -INFINITY;
  }
  if (filters && !plan.bad) {
    if (sets) FindLimit(EditedLogits(p, row), p.vocab, best, least, row, tokens, plan, s);
    const float least_likely = row.min_p > 0 ? best + row.temperature * logf(row.min_p) : kLowest;
    if (least_likely > plan.limit) {
      plan.limit = least_likely;
      plan.last_equal = INT32_MAX;
    }
  }
  if (threadIdx.x == 0) p.plans[blockIdx.y] = plan;
}

__device__ __forceinline__ void Better(Candidate& best, const Candidate& other) {
  if (other.score > best.score || (other.score == best.score && other.token < best.token)) {
    best = other;
  }
}

__device__ __forceinline__ Candidate WarpBest(Candidate best) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    Better(best, {__shfl_xor_sync(kFullWarp, best.score, offset),
                  __shfl_xor_sync(kFullWarp, best.token, offset)});
  }
  return best;
}

__global__ void __launch_bounds__(kRowThreads)
    SampleDrawKernel(const __grid_constant__ SampleParams p) {
  __shared__ Candidate shared[kRowThreads / 32];
  __shared__ int flag;
  AllowNext();
  WaitForPrevious();
  const SamplingRow row = p.rows[blockIdx.y];
  const RowPlan plan = p.plans[blockIdx.y];
  const float* values = EditedLogits(p, row);
  const int first = static_cast<int>(blockIdx.x) * kSplitValues + static_cast<int>(threadIdx.x);
  float value[kValuesPerThread];
#pragma unroll
  for (int i = 0; i < kValuesPerThread; ++i) {
    const int token = first + i * kRowThreads;
    value[i] = token < p.vocab ? values[token] : -INFINITY;
  }
  const uint64_t key = DrawKey(row.seed, row.counter);
  Candidate best{-INFINITY, INT32_MAX};
#pragma unroll
  for (int i = 0; i < kValuesPerThread; ++i) {
    const int token = first + i * kRowThreads;
    // Not finite: the row is bad, and NaN fails this too.
    if (!(value[i] > plan.limit || (value[i] == plan.limit && token <= plan.last_equal))) continue;
    float score = value[i];
    if (row.temperature > 0) {
      score /= row.temperature;
      if (score + kMostNoise < best.score) continue;
      score -= logf(-log1pf(-DrawUniform(DrawBits(key, token))));
    }
    Better(best, {score, token});
  }
  best = WarpBest(best);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) shared[warp] = best;
  __syncthreads();
  Candidate* drawn = p.drawn + int64_t{blockIdx.y} * p.splits;
  if (threadIdx.x == 0) {
    for (int w = 1; w < kRowThreads / 32; ++w) Better(best, shared[w]);
    drawn[blockIdx.x] = best;
  }
  if (!ArriveLast(p.counters + blockIdx.y, gridDim.x, &flag) || warp > 0) return;
  best = {-INFINITY, INT32_MAX};
  for (int i = lane; i < p.splits; i += 32) {
    Better(best, {__ldcg(&drawn[i].score), __ldcg(&drawn[i].token)});
  }
  best = WarpBest(best);
  if (lane != 0) return;
  const bool bad = plan.bad || best.token == INT32_MAX;
  p.out[blockIdx.y] = {bad ? kNonFiniteLogits : best.token,
                       bad ? 0.0f : LogitsOf(p, row)[best.token] - plan.best - plan.log_sum};
}

struct LogprobParams {
  const float* logits;
  int64_t stride;
  int vocab;
  const int32_t* ids;
  float* out;
  SplitStats* stats;
  uint32_t* counters;
};

__global__ void __launch_bounds__(kRowThreads)
    TokenLogprobsKernel(const __grid_constant__ LogprobParams p) {
  __shared__ float shared[3 * kRowThreads / 32];
  __shared__ int flag;
  AllowNext();
  WaitForPrevious();
  const float* row = p.logits + blockIdx.y * p.stride;
  float values[kValuesPerThread];
  const SplitStats stats = StatsOfSplit(row, p.vocab, static_cast<int>(blockIdx.x), values, shared);
  SplitStats* of_row = p.stats + int64_t{blockIdx.y} * gridDim.x;
  if (threadIdx.x == 0) of_row[blockIdx.x] = stats;
  if (!ArriveLast(p.counters + blockIdx.y, gridDim.x, &flag) || threadIdx.x >= 32) return;
  const RowPlan plan = JoinSplits(of_row, static_cast<int>(gridDim.x));
  const int32_t id = p.ids[blockIdx.y];
  if (threadIdx.x == 0) p.out[blockIdx.y] = id < 0 ? 0.0f : row[id] - plan.best - plan.log_sum;
}

}  // namespace

cudaError_t LaunchSample(const LaunchContext& context, Tensor logits, const SamplingBatch& batch,
                         Sampled* out) {
  SampleParams params{};
  params.logits = logits.Row<float>(0), params.stride = logits.stride;
  params.vocab = static_cast<int>(logits.cols);
  params.splits = static_cast<int>(CeilDiv(logits.cols, kSplitValues));
  params.edits = batch.edits;
  params.counters = context.counters;
  const size_t row_bytes = params.vocab * (sizeof(float) + sizeof(int32_t)) + sizeof(RowPlan) +
                           params.splits * (sizeof(SplitStats) + sizeof(Candidate));
  const int at_once = static_cast<int>(
      std::min({static_cast<size_t>(kMaxRowsAtOnce), context.scratch_bytes / row_bytes,
                static_cast<size_t>(context.num_counters)}));
  if (at_once < 1) return cudaErrorInvalidValue;
  for (int first = 0; first < batch.num_rows; first += at_once) {
    const int rows = std::min(at_once, batch.num_rows - first);
    params.rows = batch.rows + first;
    params.out = out + first;
    // Every array's elements are multiples of 4 bytes, and nothing needs more alignment.
    std::byte* next = context.scratch;
    const auto take = [&](auto*& array, size_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
      next += count * sizeof(*array);
    };
    take(params.stats, size_t(rows) * params.splits);
    take(params.plans, rows);
    take(params.drawn, size_t(rows) * params.splits);
    take(params.scores, size_t(rows) * params.vocab);
    take(params.tokens, size_t(rows) * params.vocab);
    const dim3 grid(params.splits, rows);
    cudaError_t error = Launch(context, SampleStatsKernel, grid, kRowThreads, 0, params);
    if (error == cudaSuccess) {
      error = Launch(context, SamplePlanKernel, dim3(1, rows), kSelectThreads, 0, params);
    }
    if (error == cudaSuccess)
      error = Launch(context, SampleDrawKernel, grid, kRowThreads, 0, params);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchTokenLogprobs(const LaunchContext& context, Tensor logits, const int32_t* ids,
                                float* out) {
  const auto splits = static_cast<int>(CeilDiv(logits.cols, kSplitValues));
  const int64_t at_once = std::min<int64_t>(kMaxRowsAtOnce, context.num_counters);
  for (int64_t first = 0; first < logits.rows; first += at_once) {
    const auto rows = static_cast<uint32_t>(std::min(at_once, logits.rows - first));
    const LogprobParams params{logits.Row<float>(first),
                               logits.stride,
                               static_cast<int>(logits.cols),
                               ids + first,
                               out + first,
                               reinterpret_cast<SplitStats*>(context.scratch),
                               context.counters};
    const cudaError_t error =
        Launch(context, TokenLogprobsKernel, dim3(splits, rows), kRowThreads, 0, params);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace mobi::cuda
