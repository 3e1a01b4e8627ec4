#include "kernels/cuda/device.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/prefill_image.cuh"

namespace mobi::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    SwiGluKernel(const T* gate_up, int64_t gate_up_stride, T* out, int64_t out_stride, int64_t cols,
                 bool vector, PrefillImages images) {
  AllowNext();
  WaitForPrevious();
  const int64_t col = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * 8;
  const int64_t valid = cols - col;
  if (valid <= 0) return;
  const T* row = gate_up + blockIdx.x * gate_up_stride + col;
  float gate[8], up[8];
  Load8(row, valid, vector, gate);
  Load8(row + cols, valid, vector, up);
#pragma unroll
  for (int i = 0; i < 8; ++i) gate[i] = Silu(gate[i]) * up[i];
  if (IsInImage(images, blockIdx.x)) {
    ImageRow(images, blockIdx.x).Leave(static_cast<int>(col / 8), PackElements<T>(gate));
  } else {
    Store8(out + blockIdx.x * out_stride + col, valid, vector, gate);
  }
}

}  // namespace

cudaError_t LaunchSwiGlu(const LaunchContext& context, Tensor gate_up, Tensor out,
                         const PrefillImages& images) {
  const dim3 grid(static_cast<uint32_t>(out.rows), CeilDiv(out.cols, kThreads * 8));
  const bool vector = Vectorizable(gate_up) && Vectorizable(out);
  return WithActivation(out.dtype, [&](auto element) {
    using T = decltype(element);
    return Launch(context, SwiGluKernel<T>, grid, kThreads, 0, static_cast<const T*>(gate_up.data),
                  gate_up.stride, static_cast<T*>(out.data), out.stride, out.cols, vector, images);
  });
}

}  // namespace mobi::cuda
