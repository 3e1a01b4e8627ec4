// Launch of the kernel that makes x and multiplies at given levels
// (sliced_matmul_decode90_pinned.cuh).
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/routed_matmul.h"
#include "kernels/cuda/sliced_matmul_decode90_pinned.cuh"
#include "kernels/cuda/sliced_matmul_launch.h"
#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {
namespace {

template <int N, int W>
bool MakePlan(const SlicedMatmulLaunch& launch, const SlicedProblem& problem, int* clusters,
              Decode90Plan& plan) {
  CountTokens(problem.num_tokens, plan);
  const int units = DivideUp(problem.rows, kUnitRows);
  *clusters = std::min(launch.clusters[kPartsLog], units);
  CutRows<W>(units, *clusters, plan);
  const Decode90Plan two_buffers = plan;
  plan.round_buffers = MostRounds(plan);
  plan.one_each = true;
  if (FitShared<N, W>(problem, sizeof(NormShared<N>), plan)) return true;
  plan = two_buffers;
  return FitShared<N, W>(problem, sizeof(NormShared<N>), plan);
}

template <int N, int W>
cudaError_t Launch(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                   const InputParams& input) {
  Decode90Plan plan;
  int clusters;
  if (!MakePlan<N, W>(launch, problem, &clusters, plan)) return cudaErrorInvalidValue;
  auto* kernel = PinnedDecode90Kernel<N, W>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = Configure(launch, plan, clusters, 1, 128 * W, attributes);
  return cudaLaunchKernelEx(&config, kernel, problem, plan, input);
}

// Calls with the tokens of a block and its warpgroups as template arguments.
template <typename Call>
auto ForTokens(int num_tokens, const Call& call) {
  if (num_tokens <= 4) return call.template operator()<4, 4>();
  if (num_tokens <= 8) return call.template operator()<8, 5>();
  return call.template operator()<16, 5>();
}

}  // namespace

bool CanMultiplyPinned90(const SlicedMatmulLaunch& launch, const RouteSource& source,
                         const Tensor& x, const SlicedWeight& weight) {
  if (!CanMakeInput90(launch, source, x)) return false;
  Tensor out = x;
  out.cols = out.stride = weight.rows;
  SlicedProblem problem;
  return StateProblem(x, weight, nullptr, 0, out, &problem) &&
         ForTokens(problem.num_tokens, [&]<int N, int W>() {
           Decode90Plan plan;
           int clusters;
           return MakePlan<N, W>(launch, problem, &clusters, plan);
         });
}

cudaError_t LaunchPinnedDecode90(const SlicedMatmulLaunch& launch, const RoutedMatmul& op) {
  SlicedProblem problem;
  if (!StateProblem(op.x, op.linear.weight, op.pinned_levels, 0, op.out, &problem)) {
    return cudaErrorInvalidValue;
  }
  problem.residual = op.residual.data, problem.residual_stride = op.residual.stride;
  const InputParams input = StateInput(op.source, op.x);
  return ForTokens(problem.num_tokens,
                   [&]<int N, int W>() { return Launch<N, W>(launch, problem, input); });
}

}  // namespace mobi::cuda
