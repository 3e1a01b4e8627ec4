#include "kernels/cuda/device.cuh"
#include "kernels/cuda/ops.h"

namespace mobi::cuda {
namespace {

constexpr int kThreads = 256;

struct RopeParams {
  void* qkv;
  int64_t qkv_stride;
  const float* cos;
  const float* sin;
  int64_t table_stride;
  const int32_t* positions;
  const int32_t* slots;
  void* k;
  void* v;
  int64_t k_stride;
  int64_t v_stride;
  int num_heads;
  int num_kv_heads;
  int half_dim;
};

// One thread per pair (d, d + head_dim / 2) of a head of q, k or v; blockIdx.x is the token.
template <typename T>
__global__ void __launch_bounds__(kThreads) RopeKernel(RopeParams p) {
  AllowNext();
  WaitForPrevious();
  const int pair = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  const int head = pair / p.half_dim, d = pair % p.half_dim;
  if (head >= p.num_heads + 2 * p.num_kv_heads) return;
  T* low = static_cast<T*>(p.qkv) + blockIdx.x * p.qkv_stride + head * 2 * p.half_dim + d;
  T* high = low + p.half_dim;
  T a = *low, b = *high;
  if (head < p.num_heads + p.num_kv_heads) {
    const int64_t at = p.positions[blockIdx.x] * p.table_stride + d;
    const float cos = p.cos[at], sin = p.sin[at];
    const float2 turned = Rotate(ToFloat(a), ToFloat(b), cos, sin);
    a = FromFloat<T>(turned.x);
    b = FromFloat<T>(turned.y);
    *low = a;
    *high = b;
  }
  const int kv_head = head - p.num_heads;
  const int64_t slot = p.slots[blockIdx.x];
  if (kv_head < 0 || slot < 0) return;
  T* cached =
      kv_head < p.num_kv_heads
          ? static_cast<T*>(p.k) + slot * p.k_stride + kv_head * 2 * p.half_dim
          : static_cast<T*>(p.v) + slot * p.v_stride + (kv_head - p.num_kv_heads) * 2 * p.half_dim;
  cached[d] = a;
  cached[d + p.half_dim] = b;
}

}  // namespace

cudaError_t LaunchRope(const LaunchContext& context, Tensor qkv, const RopeTable& rope,
                       const int32_t* positions, const int32_t* slots, const AttentionShape& shape,
                       KvLayer kv) {
  const RopeParams params{qkv.data,
                          qkv.stride,
                          rope.cos.Row<float>(0),
                          rope.sin.Row<float>(0),
                          rope.cos.stride,
                          positions,
                          slots,
                          kv.k.data,
                          kv.v.data,
                          kv.k.stride,
                          kv.v.stride,
                          shape.num_heads,
                          shape.num_kv_heads,
                          shape.head_dim / 2};
  const int pairs = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim / 2;
  const dim3 grid(static_cast<uint32_t>(qkv.rows), CeilDiv(pairs, kThreads));
  return WithActivation(qkv.dtype, [&](auto element) {
    return Launch(context, RopeKernel<decltype(element)>, grid, kThreads, 0, params);
  });
}

}  // namespace mobi::cuda
