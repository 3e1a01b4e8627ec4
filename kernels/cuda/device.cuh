// What the op kernels share on the device: 16-bit elements as floats, loads of eight, reductions in
// a fixed order, the order of dependent launches, and blocks that count arrivals.
#ifndef MOBI_KERNELS_CUDA_DEVICE_CUH_
#define MOBI_KERNELS_CUDA_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/tensor.h"

namespace mobi::cuda {

using bfloat16 = __nv_bfloat16;

inline constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

// The next kernel may start from here on.
__device__ __forceinline__ void AllowNext() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when the kernels before this one have ended and their writes are seen.
__device__ __forceinline__ void WaitForPrevious() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(half x) { return __half2float(x); }
__device__ __forceinline__ float ToFloat(bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T FromFloat(float x) {
  if constexpr (std::is_same_v<T, half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// Two neighbours, `low` at the lower address.
template <typename T>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  if constexpr (std::is_same_v<T, half>) {
    const half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

template <typename T>
__device__ __forceinline__ float2 Unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, half>) {
    return __half22float2(*reinterpret_cast<const half2*>(&pair));
  } else {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
}

// Eight neighbours.
template <typename T>
__device__ __forceinline__ uint4 PackElements(const float (&v)[8]) {
  return make_uint4(Pack<T>(v[0], v[1]), Pack<T>(v[2], v[3]), Pack<T>(v[4], v[5]),
                    Pack<T>(v[6], v[7]));
}

template <typename T>
__device__ __forceinline__ void UnpackElements(const uint4& from, float (&v)[8]) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Unpack<T>(words[i]);
    v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
  }
}

// Eight neighbours as floats; those from `valid` on read as 0 and are not touched. `vector`: p is
// aligned to 16 bytes and valid is at least 8 or at most 0.
template <typename T>
__device__ __forceinline__ void Load8(const T* p, int64_t valid, bool vector, float (&v)[8]) {
  if (vector && valid > 0) {
    if constexpr (std::is_same_v<T, float>) {
      const float4 a = reinterpret_cast<const float4*>(p)[0];
      const float4 b = reinterpret_cast<const float4*>(p)[1];
      v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
      v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
      UnpackElements<T>(*reinterpret_cast<const uint4*>(p), v);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < valid ? ToFloat(p[i]) : 0.0f;
}

template <typename T>
__device__ __forceinline__ void Store8(T* p, int64_t valid, bool vector, const float (&v)[8]) {
  if (vector && valid > 0) {
    if constexpr (std::is_same_v<T, float>) {
      reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
      reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
      *reinterpret_cast<uint4*>(p) = PackElements<T>(v);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < valid) p[i] = FromFloat<T>(v[i]);
  }
}

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x / (1 + e^-x), by approximations whose errors are a few of fp32's units; no denormals.
__device__ __forceinline__ float Silu(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + Exp2(x * -1.4426950408889634f)));
  return x * inverse;
}

// Turns (a, b), a head's elements d and d + head_dim / 2. Rounded the same in every kernel.
__device__ __forceinline__ float2 Rotate(float a, float b, float cos, float sin) {
  return make_float2(__fmaf_rn(a, cos, -__fmul_rn(b, sin)), __fmaf_rn(b, cos, __fmul_rn(a, sin)));
}

__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// Sum over the four lanes 4 g .. 4 g + 3; every one of them gets it.
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

// Sum over the block in an order that the block's size alone decides; all threads get it.
// shared: one float per warp, free to be written.
__device__ __forceinline__ float BlockSum(float x, float* shared) {
  x = WarpSum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp) sum += shared[warp];
  return sum;
}

// Counts this block in at *counter; true in the block that arrives last of `expected`, which then
// sees what the others wrote before (read it with __ldcg). The counter is back at 0 afterwards.
// flag: one shared int. All threads of the block take part.
__device__ __forceinline__ bool ArriveLast(uint32_t* counter, uint32_t expected, int* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = atomicAdd(counter, 1) == expected - 1;
    if (last) *counter = 0;
    *flag = last;
  }
  __syncthreads();
  const bool last = *flag != 0;
  if (last) __threadfence();
  return last;
}

// ---- Clusters (compute capability 9.0 and newer; empty below it).

__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// Between arrival and wait the thread may do what the others need not see.
__device__ __forceinline__ void ClusterArrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void ClusterWait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void ClusterSync() {
  ClusterArrive();
  ClusterWait();
}

// Writes to where `shared` lies in the block of that rank.
__device__ __forceinline__ void StoreRemote(float* shared, int rank, float value) {
#if __CUDA_ARCH__ >= 900
  const auto local = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#endif
}

// Host side: calls f with a value of the element type.
template <typename F>
cudaError_t WithActivation(DType dtype, F&& f) {
  return dtype == DType::kF16 ? f(half{}) : f(bfloat16{});
}

template <typename F>
cudaError_t WithFloat(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kF16:
      return f(half{});
    case DType::kBF16:
      return f(bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

// Rows can be read eight elements at a time.
inline bool Vectorizable(const Tensor& t) {
  return t.cols % 8 == 0 && t.stride % 8 == 0 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_DEVICE_CUH_
