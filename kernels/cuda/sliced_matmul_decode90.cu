// Launch of the decode path on compute capability 9.0: tokens per block, size of clusters, cut of
// the rows, what fits in shared memory.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/sliced_matmul_decode90.cuh"
#include "kernels/cuda/sliced_matmul_launch.h"
#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {
namespace {

// Clusters per block of tokens: all at once, so that weights are read once, unless that leaves a
// quarter of the machine idle.
int CountClusters(int resident, int token_blocks, int units) {
  const int count = std::clamp(resident / token_blocks, 1, units);
  const int waves = DivideUp(token_blocks * count, resident);
  const bool idle = 4 * token_blocks * count < 3 * waves * resident;
  return idle ? std::min(resident, units) : count;
}

// The size of clusters that leaves the busiest multiprocessor the least to do.
template <int N, int W>
bool MakePlan(const SlicedMatmulLaunch& launch, const SlicedProblem& problem, int* clusters,
              Decode90Plan& best) {
  const int units = DivideUp(problem.rows, kUnitRows);
  const int token_blocks = DivideUp(problem.num_tokens, N);
  int least = 0;
  for (int parts_log = 0; parts_log <= 2 && W % (1 << parts_log) == 0; ++parts_log) {
    const int resident = launch.clusters[kPartsLog - parts_log];
    Decode90Plan plan;
    plan.parts_log = parts_log;
    CountTokens(std::min(problem.num_tokens, N), plan);
    const int count = CountClusters(resident, token_blocks, units);
    CutRows<W>(units, count, plan);
    const int waves = DivideUp(token_blocks * count, resident);
    const int most = waves * DivideUp(units, count) << parts_log;
    if (!FitShared<N, W>(problem, 0, plan) || (least > 0 && most >= least)) continue;
    least = most;
    best = plan;
    *clusters = count;
  }
  return least > 0;
}

template <int N, int W, bool kBf16>
cudaError_t LaunchKernel(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                         int clusters, const Decode90Plan& plan) {
  auto* kernel = SlicedDecode90Kernel<N, W, kBf16>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config =
      Configure(launch, plan, clusters, DivideUp(problem.num_tokens, N), 128 * W, attributes);
  return cudaLaunchKernelEx(&config, kernel, problem, plan);
}

// The fewest tokens per block that hold them all, or the most whose x fits; false: none does.
template <int N, int W>
bool TryLaunch(const SlicedMatmulLaunch& launch, const SlicedProblem& problem, bool bf16,
               cudaError_t* error) {
  Decode90Plan plan;
  int clusters;
  if (N > kTileTokens && problem.num_tokens <= N / 2) return false;
  if (!MakePlan<N, W>(launch, problem, &clusters, plan)) return false;
  *error = bf16 ? LaunchKernel<N, W, true>(launch, problem, clusters, plan)
                : LaunchKernel<N, W, false>(launch, problem, clusters, plan);
  return true;
}

}  // namespace

cudaError_t FindClusterLimits(int compute_capability, int num_sms, int (&clusters)[4]) {
  std::fill(clusters, clusters + 4, 0);
  if (compute_capability != 90) return cudaSuccess;
  auto* kernel = SlicedDecode90Kernel<16, 5, false>;  // one block to a multiprocessor
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  clusters[0] = num_sms;
  for (int log = 1; log <= kPartsLog && error == cudaSuccess; ++log) {
    SlicedMatmulLaunch launch;
    Decode90Plan plan;
    plan.parts_log = kPartsLog - log;
    plan.shared_bytes = kSharedBytes;
    cudaLaunchAttribute attributes[2] = {};
    const cudaLaunchConfig_t config =
        Configure(launch, plan, num_sms >> log, 1, 128 * 5, attributes);
    error = cudaOccupancyMaxActiveClusters(&clusters[log], kernel, &config);
  }
  return error;
}

bool LaunchSlicedDecode90(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                          DType x_type, cudaError_t* error) {
  const bool bf16 = x_type == DType::kBF16;
  if (problem.groups < kParts || launch.clusters[kPartsLog] == 0) return false;
  if (problem.num_tokens > 16) {
    *error = LaunchSlicedBatch90(launch, problem, x_type);
    return true;
  }
  // Few tokens need but four warpgroups.
  return TryLaunch<16, 5>(launch, problem, bf16, error) ||
         TryLaunch<8, 5>(launch, problem, bf16, error) ||
         TryLaunch<4, 4>(launch, problem, bf16, error);
}

}  // namespace mobi::cuda
