// The norm by itself, with the bits that the router's kernels give it: squares are added in their
// order, by eight warps for their eight ranks of columns.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/prefill_image.cuh"
#include "kernels/cuda/route_input.cuh"

namespace mobi::cuda {
namespace {

constexpr int kThreads = 32 * kRouteRanks;
constexpr int kMaxTurns = kMaxNormColumns / (kRouteRanks * kColsPerTurn);
static_assert(kMaxTurns == 8 && kColsPerTurn == 32 * 8 && kRouteWarps == 8);

struct RmsNormParams {
  void* residual;
  int64_t residual_stride;
  const void* delta;  // null: the residual is only read
  int64_t delta_stride;
  const float* weight;
  void* out;
  int64_t out_stride;
  int cols, turns;
  float eps;
  bool vector;
  PrefillImages images;
};

// One block per token, its row in registers between the sum and the scaling, kTurns times eight
// elements a thread: the fewer, the more blocks run at once. The residual is rounded to T before it
// is squared, as the next layer will read it.
template <typename T, int kTurns>
__global__ void __launch_bounds__(kThreads) RmsNormKernel(RmsNormParams p) {
  constexpr bool kHoldsWeight = kTurns <= 2;  // asked for before the row is there
  __shared__ __align__(16) float sums[kRouteRanks][kRouteWarps];
  AllowNext();
  const int rank = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_col = rank * p.turns * kColsPerTurn + lane * 8;
  const int turns = first_col < p.cols ? min(p.turns, kTurns) : 0;
  T* residual = static_cast<T*>(p.residual) + blockIdx.x * p.residual_stride;
  const T* delta = static_cast<const T*>(p.delta) + blockIdx.x * p.delta_stride;
  T* out = static_cast<T*>(p.out) + blockIdx.x * p.out_stride;
  float x[kTurns][8], weight[kHoldsWeight ? kTurns : 1][8];
  // call(turn, column, columns that there are from it on)
  const auto for_turns = [&](const auto& call) {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int col = first_col + i * kColsPerTurn;
      if (i >= turns || col >= p.cols) break;
      call(i, col, p.cols - col);
    }
  };
  if constexpr (kHoldsWeight) {
    for_turns(
        [&](int i, int col, int valid) { Load8(p.weight + col, valid, p.vector, weight[i]); });
  }
  WaitForPrevious();
  float squares = 0;
  for_turns([&](int i, int col, int valid) {
    Load8(residual + col, valid, p.vector, x[i]);
    if (p.delta != nullptr) {
      float add[8];
      Load8(delta + col, valid, p.vector, add);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[i][j] = ToFloat(FromFloat<T>(x[i][j] + add[j]));
      Store8(residual + col, valid, p.vector, x[i]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) squares = fmaf(x[i][j], x[i][j], squares);
  });
  squares = QuadSum(squares);
  if (lane % 4 == 0) sums[rank][lane / 4] = squares;
  __syncthreads();
  float of_rank = 0, total = 0;  // of rank lane % 8
#pragma unroll
  for (int w = 0; w < kRouteWarps; ++w) of_rank += sums[lane % kRouteRanks][w];
#pragma unroll
  for (int r = 0; r < kRouteRanks; ++r) total += __shfl_sync(kFullWarp, of_rank, r);
  const float scale = rsqrtf(total / static_cast<float>(p.cols) + p.eps);
  for_turns([&](int i, int col, int valid) {
    float(&factors)[8] = weight[kHoldsWeight ? i : 0];
    if constexpr (!kHoldsWeight) Load8(p.weight + col, valid, p.vector, factors);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[i][j] *= scale * factors[j];
    if (IsInImage(p.images, blockIdx.x)) {
      ImageRow(p.images, blockIdx.x).Leave(col / 8, PackElements<T>(x[i]));
    } else {
      Store8(out + col, valid, p.vector, x[i]);
    }
  });
}

}  // namespace

cudaError_t LaunchRmsNorm(const LaunchContext& context, Tensor residual, Tensor delta,
                          Tensor weight, float eps, Tensor out, const PrefillImages& images) {
  const bool vector = Vectorizable(residual) && Vectorizable(weight) && Vectorizable(out) &&
                      (delta.data == nullptr || Vectorizable(delta));
  const int cols = static_cast<int>(out.cols), turns = TurnsOf(cols);
  const RmsNormParams params{
      residual.data, residual.stride, delta.data, delta.stride, weight.Row<float>(0),
      out.data,      out.stride,      cols,       turns,        eps,
      vector,        images};
  return WithActivation(out.dtype, [&](auto element) {
    using T = decltype(element);
    auto* kernel = turns == 1   ? RmsNormKernel<T, 1>
                   : turns == 2 ? RmsNormKernel<T, 2>
                   : turns <= 4 ? RmsNormKernel<T, 4>
                                : RmsNormKernel<T, kMaxTurns>;
    return Launch(context, kernel, static_cast<uint32_t>(out.rows), kThreads, 0, params);
  });
}

}  // namespace mobi::cuda
