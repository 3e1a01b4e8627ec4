#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "kernels/device_products.h"

namespace mobi {

namespace {

void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::abort();
}

void Check(cublasStatus_t status) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  std::fprintf(stderr, "cuBLAS: %s\n", cublasGetStatusString(status));
  std::abort();
}

}  // namespace

struct DeviceProducts::Lane {
  Lane() {
    Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    Check(cublasCreate(&handle));
    Check(cublasSetStream(handle, stream));
  }
  ~Lane() {
    for (const Memory& m : memory) cudaFree(m.data);
    cublasDestroy(handle);
    cudaStreamDestroy(stream);
  }

  // Device memory for one operand, dense; grows when it must.
  float* Room(int which, int64_t count) {
    Memory& m = memory[which];
    const auto bytes = static_cast<size_t>(count) * sizeof(float);
    if (m.bytes < bytes) {
      if (m.data != nullptr) Check(cudaFree(m.data));
      m.bytes = bytes + bytes / 4;
      Check(cudaMalloc(&m.data, m.bytes));
    }
    return static_cast<float*>(m.data);
  }
  float* Upload(int which, const float* data, int64_t rows, int64_t cols, int64_t stride) {
    float* to = Room(which, rows * cols);
    Copy(to, cols, data, stride, rows, cols, cudaMemcpyHostToDevice);
    return to;
  }
  void Copy(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
            int64_t cols, cudaMemcpyKind kind) {
    constexpr size_t kSize = sizeof(float);
    Check(cudaMemcpy2DAsync(to, to_stride * kSize, from, from_stride * kSize, cols * kSize, rows,
                            kind, stream));
  }

  struct Memory {
    void* data = nullptr;
    size_t bytes = 0;
  };
  cudaStream_t stream = nullptr;
  cublasHandle_t handle = nullptr;
  std::array<Memory, 3> memory;
};

DeviceProducts::DeviceProducts() = default;
DeviceProducts::~DeviceProducts() = default;

std::unique_ptr<DeviceProducts> DeviceProducts::Create(std::string& error) {
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  if (found != cudaSuccess || devices == 0) {
    error = found != cudaSuccess ? cudaGetErrorString(found) : "no CUDA device";
    return nullptr;
  }
  return std::unique_ptr<DeviceProducts>(new DeviceProducts);
}

std::unique_ptr<DeviceProducts::Lane> DeviceProducts::Take() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      std::unique_ptr<Lane> lane = std::move(idle_.back());
      idle_.pop_back();
      return lane;
    }
  }
  return std::make_unique<Lane>();
}

void DeviceProducts::GiveBack(std::unique_ptr<Lane> lane) {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(lane));
}

// cuBLAS counts columns first: it is asked for the transpose, out^T = op(b)^T op(a)^T.
void DeviceProducts::Multiply(const Operand& a, const Operand& b, float alpha, float beta,
                              float* out, int64_t m, int64_t n, int64_t k, int64_t out_stride) {
  std::unique_ptr<Lane> lane = Take();
  const float* device_a = lane->Upload(0, a.data, a.rows, a.cols, a.stride);
  const float* device_b = lane->Upload(1, b.data, b.rows, b.cols, b.stride);
  float* device_out = beta != 0 ? lane->Upload(2, out, m, n, out_stride) : lane->Room(2, m * n);
  const auto op = [](const Operand& x) { return x.transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
  Check(cublasSgemm(lane->handle, op(b), op(a), static_cast<int>(n), static_cast<int>(m),
                    static_cast<int>(k), &alpha, device_b, static_cast<int>(b.cols), device_a,
                    static_cast<int>(a.cols), &beta, device_out, static_cast<int>(n)));
  lane->Copy(out, out_stride, device_out, n, m, n, cudaMemcpyDeviceToHost);
  Check(cudaStreamSynchronize(lane->stream));
  GiveBack(std::move(lane));
}

}  // namespace mobi
