#include "kernels/cuda/device.cuh"
#include "kernels/cuda/ops.h"

namespace mobi::cuda {
namespace {

constexpr int kThreads = 128;

template <typename From, typename To>
__global__ void __launch_bounds__(kThreads)
    GatherKernel(const From* table, int64_t table_stride, const int32_t* ids, To* out,
                 int64_t out_stride, int64_t cols, bool vector) {
  AllowNext();
  WaitForPrevious();
  const int64_t col = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * 8;
  if (col >= cols) return;
  float v[8];
  Load8(table + ids[blockIdx.x] * table_stride + col, cols - col, vector, v);
  Store8(out + blockIdx.x * out_stride + col, cols - col, vector, v);
}

}  // namespace

cudaError_t LaunchGather(const LaunchContext& context, Tensor table, const int32_t* ids,
                         Tensor out) {
  const dim3 grid(static_cast<uint32_t>(out.rows), CeilDiv(out.cols, kThreads * 8));
  const bool vector = Vectorizable(table) && Vectorizable(out);
  return WithFloat(table.dtype, [&](auto from) {
    return WithFloat(out.dtype, [&](auto to) {
      return Launch(context, GatherKernel<decltype(from), decltype(to)>, grid, kThreads, 0,
                    static_cast<const decltype(from)*>(table.data), table.stride, ids,
                    static_cast<decltype(to)*>(out.data), out.stride, out.cols, vector);
    });
  });
}

}  // namespace mobi::cuda
