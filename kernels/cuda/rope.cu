#include "kernels/cuda/device.cuh"
#include "kernels/cuda/ops.h"

namespace mobi::cuda {
namespace {

constexpr int kThreads = 128;

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

// A thread has kPairs neighbouring pairs (d, d + head_dim / 2) of a head of q, k or v; blockIdx.x
// is the token.
template <typename T, int kPairs>
__global__ void __launch_bounds__(kThreads) RopeKernel(RopeParams p) {
  constexpr bool kVector = kPairs == 8;
  AllowNext();
  WaitForPrevious();
  const int pair = static_cast<int>(blockIdx.y * kThreads + threadIdx.x) * kPairs;
  const int head = pair / p.half_dim, d = pair % p.half_dim;
  if (head >= p.num_heads + 2 * p.num_kv_heads) return;
  T* low = static_cast<T*>(p.qkv) + blockIdx.x * p.qkv_stride + head * 2 * p.half_dim + d;
  float a[8], b[8];
  Load8(low, kPairs, kVector, a);
  Load8(low + p.half_dim, kPairs, kVector, b);
  if (head < p.num_heads + p.num_kv_heads) {
    const int64_t at = p.positions[blockIdx.x] * p.table_stride + d;
    float cos[8], sin[8];
    Load8(p.cos + at, kPairs, kVector, cos);
    Load8(p.sin + at, kPairs, kVector, sin);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 turned = Rotate(a[i], b[i], cos[i], sin[i]);
      a[i] = turned.x, b[i] = turned.y;
    }
    Store8(low, kPairs, kVector, a);
    Store8(low + p.half_dim, kPairs, kVector, b);
  }
  const int kv_head = head - p.num_heads;
  const int64_t slot = p.slots[blockIdx.x];
  if (kv_head < 0 || slot < 0) return;
  T* cached = d + (kv_head < p.num_kv_heads
                       ? static_cast<T*>(p.k) + slot * p.k_stride + kv_head * 2 * p.half_dim
                       : static_cast<T*>(p.v) + slot * p.v_stride +
                             (kv_head - p.num_kv_heads) * 2 * p.half_dim);
  Store8(cached, kPairs, kVector, a);
  Store8(cached + p.half_dim, kPairs, kVector, b);
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
  const bool vector = params.half_dim % 8 == 0 && Vectorizable(qkv) && Vectorizable(kv.k) &&
                      Vectorizable(kv.v) && Vectorizable(rope.cos) && Vectorizable(rope.sin);
  return WithActivation(qkv.dtype, [&](auto element) {
    using T = decltype(element);
    const dim3 grid(static_cast<uint32_t>(qkv.rows), CeilDiv(pairs, kThreads * (vector ? 8 : 1)));
    return Launch(context, vector ? RopeKernel<T, 8> : RopeKernel<T, 1>, grid, kThreads, 0, params);
  });
}

}  // namespace mobi::cuda
