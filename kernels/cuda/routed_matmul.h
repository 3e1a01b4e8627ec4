// A linear of a decode step: the op that makes its input, its router if tokens have a choice, its
// sliced matmul, and the residual that takes its output. For up to 16 tokens one kernel, which
// saves a step three of its four kernels' launches per linear; for more, two, the first of which
// leaves the input as the second reads it. The results are bit for bit those of the ops one by one.
// Compute capability 9.0. Host code, one thread, asynchronous.
#ifndef MOBI_KERNELS_CUDA_ROUTED_MATMUL_H_
#define MOBI_KERNELS_CUDA_ROUTED_MATMUL_H_

#include <cuda_runtime.h>

#include "kernels/backend.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/sliced_matmul.h"

namespace mobi::cuda {

struct RoutedMatmul {
  RouteSource source;  // of x
  Tensor x;            // written unless source is kPlain
  RoutedWeight linear;
  RoutingBatch batch;
  int others_level = 0;       // see LaunchRoute
  uint8_t* levels = nullptr;  // written, as by Route
  int64_t levels_stride = 0;
  // Not null: of each token in all segments. They were there before the step, and nothing is
  // routed: of `linear` only the weight is looked at, of `batch` the number of tokens.
  const uint8_t* pinned_levels = nullptr;
  Tensor out;
  Tensor residual;  // no data, or what `out` is added to, in out's type: see TakesResidual
};

inline constexpr int kMostFusedTokens = 16;  // of one kernel

// True if LaunchRoutedMatmul can take it; `out` and `residual` are not looked at.
bool CanRouteInMatmul(const LaunchContext& context, const SlicedMatmulLaunch& launch,
                      const RoutedMatmul& op);
// Whether its matmul can add to a residual; a norm's delta must be in its source already where it
// can.
inline bool TakesResidual(const RoutedMatmul& op) { return op.x.rows <= kMostFusedTokens; }
cudaError_t LaunchRoutedMatmul(const LaunchContext& context, const SlicedMatmulLaunch& launch,
                               const RoutedMatmul& op);

// The one kernel.
bool CanRouteInDecode90(const SlicedMatmulLaunch& launch, const RouteSource& source,
                        const Tensor& x, const RoutedWeight& linear);
cudaError_t LaunchRoutedDecode90(const SlicedMatmulLaunch& launch, const RoutedMatmul& op);
// The one of pinned tokens.
bool CanMultiplyPinned90(const SlicedMatmulLaunch& launch, const RouteSource& source,
                         const Tensor& x, const SlicedWeight& weight);
cudaError_t LaunchPinnedDecode90(const SlicedMatmulLaunch& launch, const RoutedMatmul& op);

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_ROUTED_MATMUL_H_
