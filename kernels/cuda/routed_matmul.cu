// Which kernels do a decode step's linear, and how the two for many tokens share the scratch: the
// losses of all tokens, then the matmul's workspace.
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/route.cuh"
#include "kernels/cuda/routed_matmul.h"
#include "kernels/cuda/sliced_matmul_problem.h"

namespace mobi::cuda {
namespace {

constexpr size_t kLossBytes = size_t{kFewRoutedTokens} * 64;
static_assert(kLossBytes >= kFewRoutedTokens * kMaxScores * sizeof(float));

// The workspace behind what the router needs of it.
SlicedMatmulLaunch BehindRouter(SlicedMatmulLaunch launch) {
  launch.workspace = static_cast<std::byte*>(launch.workspace) + kLossBytes;
  launch.workspace_bytes -= kLossBytes;
  return launch;
}

bool CanRouteInBatch90(const LaunchContext& context, const SlicedMatmulLaunch& launch,
                       const RouteSource& source, const Tensor& x, const RoutedWeight& linear) {
  if (launch.compute_capability != 90 || x.rows > kFewRoutedTokens ||
      launch.workspace_bytes <= kLossBytes || !CanFuseRoute(context, source, x, linear)) {
    return false;
  }
  Tensor out = x;
  out.cols = out.stride = linear.weight.rows;
  SlicedProblem problem;
  return StateProblem(x, linear.weight, nullptr, 0, out, &problem) &&
         CanBeOneRoundOfBatch90(BehindRouter(launch), problem);
}

cudaError_t LaunchRoutedBatch90(const LaunchContext& context, const SlicedMatmulLaunch& launch,
                                const RoutedMatmul& op) {
  const bool pinned = op.pinned_levels != nullptr;
  SlicedProblem problem;
  if (!StateProblem(op.x, op.linear.weight, pinned ? op.pinned_levels : op.levels,
                    pinned ? 0 : op.levels_stride, op.out, &problem)) {
    return cudaErrorInvalidValue;
  }
  RouteParams route = StateRoute(op.source, op.x, op.linear, op.batch, op.others_level, op.levels,
                                 op.levels_stride);
  if (!pinned) route.losses = reinterpret_cast<float*>(context.scratch);
  return LaunchSlicedBatch90(BehindRouter(launch), problem, route,
                             [&](const SlicedProblem&, const BatchImages& images) {
                               return LaunchRouteForMatmul(context, route, op.x.dtype, images);
                             });
}

}  // namespace

bool CanRouteInMatmul(const LaunchContext& context, const SlicedMatmulLaunch& launch,
                      const RoutedMatmul& op) {
  if (op.x.rows > kMostFusedTokens) {
    return CanRouteInBatch90(context, launch, op.source, op.x, op.linear);
  }
  return op.pinned_levels != nullptr
             ? CanMultiplyPinned90(launch, op.source, op.x, op.linear.weight)
             : CanRouteInDecode90(launch, op.source, op.x, op.linear);
}

cudaError_t LaunchRoutedMatmul(const LaunchContext& context, const SlicedMatmulLaunch& launch,
                               const RoutedMatmul& op) {
  if (op.x.rows > kMostFusedTokens) return LaunchRoutedBatch90(context, launch, op);
  return op.pinned_levels != nullptr ? LaunchPinnedDecode90(launch, op)
                                     : LaunchRoutedDecode90(launch, op);
}

}  // namespace mobi::cuda
