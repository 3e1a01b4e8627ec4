// What sliced-bench's parts share: checked calls, device memory, random contents and a machine to
// launch on.
#ifndef MOBI_TESTS_BENCH_SLICED_BENCH_DEVICE_CUH_
#define MOBI_TESTS_BENCH_SLICED_BENCH_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "kernels/cuda/sliced_matmul.h"
#include "kernels/sliced_weight.h"

namespace mobi::cuda {

inline void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAILED %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK_CUDA(call) Check(call, #call)

// ---- Device memory and random contents.

inline __device__ uint32_t Hash(uint64_t i) {
  i = (i ^ (i >> 30)) * 0xBF58476D1CE4E5B9u;
  i = (i ^ (i >> 27)) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>((i ^ (i >> 31)) >> 16);
}

inline __device__ float Uniform(uint64_t seed, uint64_t i) {
  return static_cast<float>(Hash(seed * 0x9E3779B97F4A7C15u + i + 1)) * 0x1p-32f;
}

inline __device__ float Normal(uint64_t seed, uint64_t i) {
  const float u = fmaxf(Uniform(seed, 2 * i), 1e-7f), v = Uniform(seed, 2 * i + 1);
  return sqrtf(-2 * logf(u)) * cosf(6.2831853f * v);
}

static __global__ void FillBits(uint32_t* to, size_t words, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < words;
       i += size_t{gridDim.x} * blockDim.x) {
    to[i] = Hash(seed * 0x9E3779B97F4A7C15u + i);
  }
}

static __global__ void FillPairs(half2* to, size_t count, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const float range = 0.02f + 0.1f * Uniform(seed, 2 * i);
    to[i] = __floats2half2_rn(range, -range * (0.3f + 0.4f * Uniform(seed, 2 * i + 1)));
  }
}

static __global__ void FillNormal(void* to, size_t count, uint64_t seed, bool bf16, float scale) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const float x = scale * Normal(seed, i);
    if (bf16) {
      static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(x);
    } else {
      static_cast<half*>(to)[i] = __float2half_rn(x);
    }
  }
}

template <typename T>
struct Device {
  T* data = nullptr;
  size_t count = 0;
  Device() = default;
  explicit Device(size_t n) : count(n) {
    CHECK_CUDA(cudaMalloc(&data, std::max<size_t>(n, 1) * sizeof(T)));
  }
  Device(Device&& other) noexcept { std::swap(data, other.data), std::swap(count, other.count); }
  Device& operator=(Device&& other) noexcept {
    std::swap(data, other.data), std::swap(count, other.count);
    return *this;
  }
  ~Device() { cudaFree(data); }
};

struct Weight {
  Device<uint8_t> slices, scales;
  SlicedWeight view;
};

inline Weight RandomWeight(const std::vector<int64_t>& segments, int64_t cols, uint64_t seed) {
  Weight weight;
  int64_t rows = 0;
  weight.view.num_segments = static_cast<int>(segments.size());
  for (size_t s = 0; s < segments.size(); ++s) weight.view.segment_end[s] = rows += segments[s];
  weight.view.rows = rows;
  weight.view.cols = cols;
  const size_t slice = SliceBytes(rows, cols), scale = ScaleBytes(rows, cols);
  weight.slices = Device<uint8_t>(kNumSlices * slice);
  weight.scales = Device<uint8_t>(kNumLevels * scale);
  FillBits<<<2048, 256>>>(reinterpret_cast<uint32_t*>(weight.slices.data), kNumSlices * slice / 4,
                          seed);
  FillPairs<<<2048, 256>>>(reinterpret_cast<half2*>(weight.scales.data), kNumLevels * scale / 4,
                           seed + 1);
  CHECK_CUDA(cudaGetLastError());
  for (int s = 0; s < kNumSlices; ++s) weight.view.slices[s] = weight.slices.data + s * slice;
  for (int k = 0; k < kNumLevels; ++k) {
    weight.view.scales[k] = reinterpret_cast<const uint16_t*>(weight.scales.data + k * scale);
  }
  return weight;
}
// ---- A machine: properties, workspace, launches.

struct Machine {
  cudaDeviceProp properties{};
  SlicedMatmulLaunch launch;
  Device<uint8_t> workspace;

  Machine() {
    CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
    CHECK_CUDA(cudaStreamCreateWithFlags(&launch.stream, cudaStreamNonBlocking));
    launch.num_sms = properties.multiProcessorCount;
    launch.compute_capability = 10 * properties.major + properties.minor;
    const char* pretend = std::getenv("SLICED_BENCH_CAPABILITY");
    if (pretend != nullptr) launch.compute_capability = std::atoi(pretend);
    CHECK_CUDA(FindClusterLimits(launch.compute_capability, launch.num_sms, launch.clusters));
    launch.workspace_bytes = size_t{256} << 20;  // as the backend has it
    workspace = Device<uint8_t>(launch.workspace_bytes);
    launch.workspace = workspace.data;
  }
};

inline Tensor Slice(Tensor t, int64_t first, int64_t count) {
  t.data =
      static_cast<std::byte*>(t.data) + first * t.stride * static_cast<int64_t>(SizeOf(t.dtype));
  t.rows = count;
  return t;
}

}  // namespace mobi::cuda

#endif  // MOBI_TESTS_BENCH_SLICED_BENCH_DEVICE_CUH_
