// Launch of the kernel that makes x, routes and multiplies (sliced_matmul_decode90_route.cuh).
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/routed_matmul.h"
#include "kernels/cuda/sliced_matmul_decode90_route.cuh"
#include "kernels/cuda/sliced_matmul_launch.h"
#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {
namespace {

// Room for x as halves, and for as many turns of W1 as there is.
template <int N>
void AddW1(int groups, Decode90Plan& plan) {
  const int turns = groups * kGroupSize / kAllTurnCols;
  plan.halves = plan.shared_bytes;
  plan.w1 = plan.halves + DivideUp(groups, kParts) * N / kTileTokens * kTileXBytes;
  plan.w1_turns = std::min(turns, (kSharedBytes - plan.w1) / kW1TurnBytes);
  plan.shared_bytes = plan.w1 + plan.w1_turns * kW1TurnBytes;
}

template <int N, int W>
bool MakePlan(const SlicedMatmulLaunch& launch, const SlicedProblem& problem, int* clusters,
              Decode90Plan& plan) {
  using Head = RouteHead<N, W>;
  constexpr int kHeadBytes = sizeof(Head);
  CountTokens(problem.num_tokens, plan);
  const int units = (problem.rows + kUnitRows - 1) / kUnitRows;
  *clusters = std::min(launch.clusters[kPartsLog], units);
  CutRows<W>(units, *clusters, plan);
  const Decode90Plan two_buffers = plan;
  plan.round_buffers = MostRounds(plan);
  plan.one_each = true;
  bool fits = FitShared<N, W>(problem, kHeadBytes, plan);
  if (!fits && !kRunsAhead<N>) {
    plan = two_buffers;
    fits = FitShared<N, W>(problem, kHeadBytes, plan);
  }
  if constexpr (kChoosersHaveW1<N>) {
    AddW1<N>(problem.groups, plan);
    fits = fits && plan.w1_turns > 0;
  } else {
    // Of W1 before the ring is used: RoutedDecode90::Later.
    static_assert(kStages * 4 * W * kWarpStageBytes >=
                  (kMaxTurns - kHeldTurns) * 2 * 2 * kRouteWarps * 32 * 16);
  }
  plan.levels = plan.head + static_cast<int>(offsetof(Head, levels));
  return fits;
}

template <int N, int W>
cudaError_t Launch(const SlicedMatmulLaunch& launch, const SlicedProblem& problem,
                   const RouteParams& route) {
  Decode90Plan plan;
  int clusters;
  if (!MakePlan<N, W>(launch, problem, &clusters, plan)) return cudaErrorInvalidValue;
  auto* kernel = RoutedDecode90Kernel<N, W>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config =
      Configure(launch, plan, clusters, 1, RoutedDecode90<N, W>::kAllThreads, attributes);
  return cudaLaunchKernelEx(&config, kernel, problem, plan, route);
}

// Calls with the tokens of a block and its warpgroups that multiply as template arguments.
template <typename Call>
auto ForTokens(int num_tokens, const Call& call) {
  if (num_tokens <= 4) return call.template operator()<4, 4>();
  if (num_tokens <= 8) return call.template operator()<8, 4>();
  return call.template operator()<16, 5>();
}

bool Fits(const SlicedMatmulLaunch& launch, const SlicedProblem& problem) {
  return ForTokens(problem.num_tokens, [&]<int N, int W>() {
    Decode90Plan plan;
    int clusters;
    return MakePlan<N, W>(launch, problem, &clusters, plan);
  });
}

}  // namespace

bool CanRouteInDecode90(const SlicedMatmulLaunch& launch, const RouteSource& source,
                        const Tensor& x, const RoutedWeight& linear) {
  if (!CanMakeInput90(launch, source, x) || x.cols > int64_t{kMaxTurns} * kAllTurnCols ||
      linear.router.num_hidden > kMaxFusedRouterHidden || linear.router.w1.stride % 8 != 0) {
    return false;
  }
  Tensor out = x;
  out.cols = out.stride = linear.weight.rows;
  SlicedProblem problem;
  return StateProblem(x, linear.weight, nullptr, 0, out, &problem) && Fits(launch, problem);
}

cudaError_t LaunchRoutedDecode90(const SlicedMatmulLaunch& launch, const RoutedMatmul& op) {
  SlicedProblem problem;
  if (!StateProblem(op.x, op.linear.weight, op.levels, op.levels_stride, op.out, &problem)) {
    return cudaErrorInvalidValue;
  }
  problem.residual = op.residual.data, problem.residual_stride = op.residual.stride;
  const RouteParams route = StateRoute(op.source, op.x, op.linear, op.batch, op.others_level,
                                       op.levels, op.levels_stride);
  return ForTokens(problem.num_tokens,
                   [&]<int N, int W>() { return Launch<N, W>(launch, problem, route); });
}

}  // namespace mobi::cuda
