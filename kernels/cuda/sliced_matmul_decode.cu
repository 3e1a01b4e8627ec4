// Launch of the decode path: how rows and columns are cut, what fits in shared memory.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/sliced_matmul_decode.cuh"
#include "kernels/cuda/sliced_matmul_launch.h"
#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {
namespace {

struct SharedLimits {
  int alone;   // one block on a multiprocessor
  int shared;  // two, so that the next kernel's blocks can start beside this one's
};

SharedLimits LimitsOf(int compute_capability) {
  if (compute_capability >= 90) return {227 * 1024, 113 * 1024};
  if (compute_capability == 80) return {163 * 1024, 81 * 1024};
  return {99 * 1024, 49 * 1024};
}

// Lays out shared memory for the sizes in the plan.
template <int NT>
void LayOut(int rounds, DecodePlan& plan) {
  const int groups = plan.chunk_groups * (kParts >> plan.cluster_log);
  int at = kDecodeWarps * kStages<NT> * kStageBytes;
  const auto take = [&at](int bytes) {
    const int begin = at;
    at += (bytes + 127) / 128 * 128;
    return begin;
  };
  plan.x = take(groups * NT * (1 << plan.token_log) * kGroupSize * 2);
  plan.sums = take(groups * 8 * NT * 4);
  plan.bias = take(groups * 8 * NT * 8);
  plan.unit = take(groups * 8 * NT * 4);
  plan.buffers = take((rounds > 1 ? 2 : 1) * kDecodeWarps * plan.round_panels * plan.buffer_tokens *
                      Exchange<NT>::kRow * 4);
  plan.levels = take(kDecodeWarps * kMaxSegments * 8 * NT);
  plan.shared_bytes = at;
}

// The widest rounds for which all of x fits; else x in chunks, if one round does.
template <int NT>
bool FitShared(const SlicedProblem& problem, int limit, bool may_cut_x, DecodePlan& plan) {
  const int groups = DivideUp(problem.groups, kParts);
  const int tiles = plan.run_tiles + (plan.long_runs > 0 ? 1 : 0);
  const int panels = DivideUp(DivideUp(tiles, kPanelTiles), 1 << plan.cluster_log);
  for (plan.chunks = 1; plan.chunks <= (may_cut_x ? groups : 1); ++plan.chunks) {
    plan.chunk_groups = DivideUp(groups, plan.chunks);
    if (DivideUp(groups, plan.chunk_groups) != plan.chunks) continue;
    for (int rounds = 1; rounds <= (plan.chunks == 1 ? panels : 1); ++rounds) {
      plan.round_panels = DivideUp(panels, rounds);
      LayOut<NT>(rounds, plan);
      if (plan.shared_bytes <= limit) return true;
    }
  }
  return false;
}

template <int NT>
bool MakePlan(const SlicedMatmulLaunch& launch, const SlicedProblem& problem, DecodePlan& plan) {
  plan.buffer_tokens = std::min(problem.num_tokens, 8 * NT);
  plan.token_log = 3;
  if (NT == 1) {
    plan.token_log = 0;
    while (1 << plan.token_log < problem.num_tokens) ++plan.token_log;
  }
  const SharedLimits limits = LimitsOf(launch.compute_capability);
  const int largest = launch.compute_capability >= 90 ? 2 : 0;
  const int tiles = problem.rows / kTileRows;
  for (const bool alone : {false, true}) {
    if (NT > 1 && !alone) continue;  // its registers leave no room beside it anyway
    for (plan.cluster_log = 0; plan.cluster_log <= largest; ++plan.cluster_log) {
      const int clusters = std::clamp(launch.num_sms >> plan.cluster_log, 1, tiles);
      plan.run_tiles = tiles / clusters;
      plan.long_runs = tiles % clusters;
      const bool last = alone && plan.cluster_log == largest;
      if (FitShared<NT>(problem, alone ? limits.alone : limits.shared, last, plan)) return true;
    }
  }
  return false;
}

template <int NT, bool kBf16>
cudaError_t LaunchKernel(const SlicedMatmulLaunch& launch, const SlicedProblem& problem) {
  DecodePlan plan;
  if (!MakePlan<NT>(launch, problem, plan)) return cudaErrorInvalidValue;
  auto* kernel = SlicedDecodeKernel<NT, kBf16>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  const int clusters = plan.run_tiles == 0
                           ? plan.long_runs
                           : (problem.rows / kTileRows - plan.long_runs) / plan.run_tiles;
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters << plan.cluster_log, DivideUp(problem.num_tokens, 8 * NT));
  config.blockDim = dim3(kDecodeThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = launch.stream;
  config.attrs = attributes;
  if (launch.compute_capability >= 90) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {1u << plan.cluster_log, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = launch.pdl ? 2 : 1;
  }
  return cudaLaunchKernelEx(&config, kernel, problem, plan);
}

template <bool kBf16>
cudaError_t LaunchTokens(const SlicedMatmulLaunch& launch, const SlicedProblem& problem) {
  return problem.num_tokens <= 8 ? LaunchKernel<1, kBf16>(launch, problem)
                                 : LaunchKernel<2, kBf16>(launch, problem);
}

}  // namespace

cudaError_t LaunchSlicedDecode(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                               DType x_type) {
  cudaError_t launched;
  if (LaunchSlicedDecode90(launch, problem, x_type, &launched)) return launched;
  // Small shared memories hold few tokens' x.
  const int step = launch.compute_capability >= 90   ? problem.num_tokens
                   : launch.compute_capability == 80 ? 8
                                                     : 4;
  for (int first = 0; first < problem.num_tokens; first += step) {
    const SlicedProblem some = TokensOf(problem, first, std::min(step, problem.num_tokens - first));
    const cudaError_t error = x_type == DType::kF16 ? LaunchTokens<false>(launch, some)
                                                    : LaunchTokens<true>(launch, some);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace mobi::cuda
