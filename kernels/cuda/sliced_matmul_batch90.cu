// Launch of the batch path on compute capability 9.0: how rows and columns are cut, where images,
// sums and arrivals are in the workspace.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/sliced_matmul_batch90.cuh"
#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {
namespace {

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// Cuts the segments' rows into tiles of plan.tile_units units; returns how many.
int CutRows(const SlicedProblem& problem, Batch90Plan& plan) {
  int begin = 0, tiles = 0;
  for (int s = 0; s < kMaxSegments; ++s) {
    const int units = CeilDiv(problem.segment_tiles[s] - begin, kUnitTiles);
    tiles += CeilDiv(units, plan.tile_units);
    plan.segment_tiles[s] = tiles;
    begin = problem.segment_tiles[s];
  }
  return tiles;
}

// How long a launch takes, about, in cycles. Measured on an H200.
int CostOf(int groups, int blocks, int num_sms, const Batch90Plan& plan) {
  constexpr int kGroupCycles[kBatchWarpgroups] = {1700, 2000, 2400, 2800};
  constexpr int kStart = 4000, kSums = 6000;  // those of several blocks
  const int cycles =
      kStart + CeilDiv(groups, 1 << plan.splits_log) * kGroupCycles[plan.tile_units - 1];
  return CeilDiv(blocks, num_sms) * cycles + (plan.splits_log > 0 ? kSums : 0);
}

// A stretch of the workspace for each of its users, one after another.
struct Workspace {
  uint8_t* next;
  size_t left;

  template <typename T>
  bool Take(int64_t count, T** to) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    if (bytes > left) return false;
    *to = reinterpret_cast<T*>(next);
    next += bytes;
    left -= bytes;
    return true;
  }
};

template <int N>
bool TakeWorkspace(const SlicedMatmulLaunch& launch, const SlicedProblem& problem, int tiles,
                   Batch90Plan& plan) {
  Workspace space{static_cast<uint8_t*>(launch.workspace), launch.workspace_bytes};
  const int64_t token_blocks = CeilDiv(problem.num_tokens, N);
  const int64_t groups = token_blocks * problem.num_segments * problem.groups;
  if (!space.Take(groups * kImageGroupBytes<N>, &plan.images) ||
      !space.Take(groups * N, &plan.terms)) {
    return false;
  }
  plan.num_arrivals = 0;
  if (plan.splits_log == 0) return true;
  const int64_t units = token_blocks * tiles * plan.tile_units;
  plan.num_arrivals = static_cast<int>(units);
  return space.Take(units, &plan.arrivals) &&
         space.Take(units * kParts * BatchWarp90<N>::kVectors * 128, &plan.sums);
}

// The cut that takes the least time. Blocks that wait for one another must all be resident.
template <int N>
bool MakePlan(const SlicedMatmulLaunch& launch, const SlicedProblem& problem, Batch90Plan* best) {
  const int token_blocks = CeilDiv(problem.num_tokens, N);
  int least = 0;
  for (int splits_log = 0; splits_log <= kPartsLog; ++splits_log) {
    for (int units = 1; units <= kBatchWarpgroups; ++units) {
      Batch90Plan plan;
      plan.tile_units = units;
      plan.splits_log = splits_log;
      const int tiles = CutRows(problem, plan);
      const int blocks = (tiles << splits_log) * token_blocks;
      if (splits_log > 0 && blocks > launch.num_sms) continue;
      const int cost = CostOf(problem.groups, blocks, launch.num_sms, plan);
      if ((least > 0 && cost >= least) || !TakeWorkspace<N>(launch, problem, tiles, plan)) continue;
      least = cost;
      *best = plan;
    }
  }
  return least > 0;
}

template <typename Kernel>
cudaError_t Launch(const SlicedMatmulLaunch& launch, Kernel* kernel, dim3 blocks, int threads,
                   int shared_bytes, const SlicedProblem& problem, const Batch90Plan& plan) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = launch.pdl ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, problem, plan);
}

template <int N>
cudaError_t LaunchTokens(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                         DType x_type) {
  Batch90Plan plan;
  if (!MakePlan<N>(launch, problem, &plan)) return cudaErrorInvalidValue;
  const bool splits = plan.splits_log > 0;
  plan.x_stages = Batch90Shared<N>::kMostStages;
  while (Batch90Shared<N>::Bytes(plan.x_stages, splits) > kSharedBytes) --plan.x_stages;
  const unsigned token_blocks = CeilDiv(problem.num_tokens, N);
  const dim3 pack(problem.groups, problem.num_segments, token_blocks);
  const cudaError_t error =
      x_type == DType::kBF16
          ? Launch(launch, BatchPackKernel<N, true>, pack, kBatchPackThreads, 0, problem, plan)
          : Launch(launch, BatchPackKernel<N, false>, pack, kBatchPackThreads, 0, problem, plan);
  if (error != cudaSuccess) return error;
  const int tiles = plan.segment_tiles[kMaxSegments - 1];
  return Launch(launch, BatchKernel90<N>, dim3(tiles << plan.splits_log, token_blocks),
                kBatchThreads, Batch90Shared<N>::Bytes(plan.x_stages, splits), problem, plan);
}

}  // namespace

cudaError_t LaunchSlicedBatch90(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                                DType x_type) {
  return problem.num_tokens <= 32 ? LaunchTokens<32>(launch, problem, x_type)
                                  : LaunchTokens<64>(launch, problem, x_type);
}

}  // namespace mobi::cuda
