#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/prefill_image.cuh"

namespace mobi::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxChunks = kMaxNormColumns / (kMaxThreads * 8);
static_assert(kMaxChunks == 4);

struct RmsNormParams {
  void* residual;
  int64_t residual_stride;
  const void* delta;  // null: the residual is only read
  int64_t delta_stride;
  const float* weight;
  void* out;
  int64_t out_stride;
  int64_t cols;
  float eps;
  bool vector;
  PrefillImages images;
};

// One block per token, its row in registers between the sum and the scaling, kChunks times eight
// elements a thread: the fewer, the more blocks run at once. The residual is rounded to T before it
// is squared, as the next layer will read it.
template <typename T, int kChunks>
__global__ void __launch_bounds__(kMaxThreads) RmsNormKernel(RmsNormParams p) {
  constexpr bool kHoldsWeight = kChunks == 1;  // asked for before the row is there
  __shared__ float warp_sums[kMaxThreads / 32];
  AllowNext();
  T* residual = static_cast<T*>(p.residual) + blockIdx.x * p.residual_stride;
  const T* delta = static_cast<const T*>(p.delta) + blockIdx.x * p.delta_stride;
  T* out = static_cast<T*>(p.out) + blockIdx.x * p.out_stride;
  float x[kChunks][8], weight[8];
  if constexpr (kHoldsWeight) {
    const int64_t col = int64_t{threadIdx.x} * 8;
    if (col < p.cols) Load8(p.weight + col, p.cols - col, p.vector, weight);
  }
  WaitForPrevious();
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int64_t col = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * 8;
    const int64_t valid = p.cols - col;
    if (valid <= 0) break;
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
  }
  const float mean = BlockSum(squares, warp_sums) / static_cast<float>(p.cols);
  const float scale = rsqrtf(mean + p.eps);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int64_t col = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * 8;
    const int64_t valid = p.cols - col;
    if (valid <= 0) break;
    if constexpr (!kHoldsWeight) Load8(p.weight + col, valid, p.vector, weight);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[i][j] *= scale * weight[j];
    if (IsInImage(p.images, blockIdx.x)) {
      ImageRow(p.images, blockIdx.x).Leave(static_cast<int>(col / 8), PackElements<T>(x[i]));
    } else {
      Store8(out + col, valid, p.vector, x[i]);
    }
  }
}

}  // namespace

cudaError_t LaunchRmsNorm(const LaunchContext& context, Tensor residual, Tensor delta,
                          Tensor weight, float eps, Tensor out, const PrefillImages& images) {
  const bool vector = Vectorizable(residual) && Vectorizable(weight) && Vectorizable(out) &&
                      (delta.data == nullptr || Vectorizable(delta));
  const RmsNormParams params{
      residual.data, residual.stride, delta.data, delta.stride, weight.Row<float>(0),
      out.data,      out.stride,      out.cols,   eps,          vector,
      images};
  const uint32_t threads = std::min<uint32_t>(kMaxThreads, CeilDiv(out.cols, 8 * 32) * 32);
  const uint32_t chunks = CeilDiv(out.cols, int64_t{threads} * 8);
  return WithActivation(out.dtype, [&](auto element) {
    using T = decltype(element);
    auto* kernel = chunks == 1   ? RmsNormKernel<T, 1>
                   : chunks == 2 ? RmsNormKernel<T, 2>
                                 : RmsNormKernel<T, kMaxChunks>;
    return Launch(context, kernel, static_cast<uint32_t>(out.rows), threads, 0, params);
  });
}

}  // namespace mobi::cuda
