#include "kernels/cuda/device.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/prefill_image.cuh"

namespace mobi::cuda {
namespace {

constexpr int kThreads = 256;

// A block has 16 bytes a thread of a row.
__global__ void __launch_bounds__(kThreads)
    LeaveRowsKernel(const uint4* x, int64_t stride, int chunks, PrefillImages images) {
  AllowNext();
  const int chunk = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  WaitForPrevious();
  if (chunk >= chunks) return;
  ImageRow(images, blockIdx.x).Leave(chunk, x[blockIdx.x * stride + chunk]);
}

}  // namespace

cudaError_t LaunchLeaveRows(const LaunchContext& context, Tensor x, const PrefillImages& images) {
  const dim3 grid(static_cast<uint32_t>(x.rows), CeilDiv(x.cols, 8 * kThreads));
  return Launch(context, LeaveRowsKernel, grid, kThreads, 0, static_cast<const uint4*>(x.data),
                x.stride / 8, static_cast<int>(x.cols / 8), images);
}

}  // namespace mobi::cuda
