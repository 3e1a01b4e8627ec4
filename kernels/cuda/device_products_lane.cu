#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/device_products_lane.h"

namespace mobi {

namespace {

// Values that are copied through pinned memory at once.
constexpr int64_t kStagedValues = int64_t{1} << 20;

// Rows between two row-major pieces of memory.
void CopyRows(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
              int64_t cols) {
  if (to_stride == cols && from_stride == cols) {
    std::memcpy(to, from, static_cast<size_t>(rows * cols) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(to + i * to_stride, from + i * from_stride,
                static_cast<size_t>(cols) * sizeof(float));
  }
}

// Calls piece(half, first, count) for the pieces of `rows` rows that fit a half, halves in turns.
template <typename Piece>
void InPieces(int64_t rows, int64_t cols, Piece&& piece) {
  const int64_t at_once = std::max<int64_t>(1, kStagedValues / cols);
  for (int64_t first = 0, half = 0; first < rows; first += at_once, half ^= 1) {
    piece(static_cast<int>(half), first, std::min(at_once, rows - first));
  }
}

}  // namespace

void CheckDevice(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::abort();
}

void CheckDevice(cublasStatus_t status) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  std::fprintf(stderr, "cuBLAS: %s\n", cublasGetStatusString(status));
  std::abort();
}

void CheckDevice(cusolverStatus_t status) {
  if (status == CUSOLVER_STATUS_SUCCESS) return;
  std::fprintf(stderr, "cuSOLVER: status %d\n", static_cast<int>(status));
  std::abort();
}

DeviceLane::DeviceLane() {
  CheckDevice(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  CheckDevice(cublasCreate(&cublas_));
  CheckDevice(cublasSetStream(cublas_, stream_));
  for (int h = 0; h < 2; ++h) {
    CheckDevice(cudaHostAlloc(&staged_[h], kStagedValues * sizeof(float), cudaHostAllocDefault));
    CheckDevice(cudaEventCreateWithFlags(&copied_[h], cudaEventDisableTiming));
  }
}

DeviceLane::~DeviceLane() {
  for (int h = 0; h < 2; ++h) {
    cudaFreeHost(staged_[h]);
    cudaEventDestroy(copied_[h]);
  }
  for (const Memory& m : memory_) cudaFree(m.data);
  cublasDestroy(cublas_);
  cudaStreamDestroy(stream_);
}

float* DeviceLane::Room(int which, int64_t count) {
  Memory& m = memory_[which];
  const auto bytes = static_cast<size_t>(count) * sizeof(float);
  if (m.bytes < bytes) {
    if (m.data != nullptr) CheckDevice(cudaFree(m.data));
    m.bytes = bytes + bytes / 4;
    CheckDevice(cudaMalloc(&m.data, m.bytes));
  }
  return static_cast<float*>(m.data);
}

void DeviceLane::CopyUp(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                        int64_t rows, int64_t cols) {
  if (cols > kStagedValues) {
    Copy(to, to_stride, from, from_stride, rows, cols, cudaMemcpyHostToDevice);
    Wait();
    return;
  }
  InPieces(rows, cols, [&](int half, int64_t first, int64_t count) {
    CheckDevice(cudaEventSynchronize(copied_[half]));
    CopyRows(staged_[half], cols, from + first * from_stride, from_stride, count, cols);
    Copy(to + first * to_stride, to_stride, staged_[half], cols, count, cols,
         cudaMemcpyHostToDevice);
    CheckDevice(cudaEventRecord(copied_[half], stream_));
  });
}

void DeviceLane::CopyDown(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                          int64_t rows, int64_t cols) {
  if (cols > kStagedValues) {
    Copy(to, to_stride, from, from_stride, rows, cols, cudaMemcpyDeviceToHost);
    Wait();
    return;
  }
  int64_t arriving = 0, arriving_rows = 0;
  const auto unpack = [&](int half) {
    CheckDevice(cudaEventSynchronize(copied_[half]));
    CopyRows(to + arriving * to_stride, to_stride, staged_[half], cols, arriving_rows, cols);
  };
  int last = 0;
  InPieces(rows, cols, [&](int half, int64_t first, int64_t count) {
    Copy(staged_[half], cols, from + first * from_stride, from_stride, count, cols,
         cudaMemcpyDeviceToHost);
    CheckDevice(cudaEventRecord(copied_[half], stream_));
    if (arriving_rows > 0) unpack(half ^ 1);
    arriving = first;
    arriving_rows = count;
    last = half;
  });
  unpack(last);
}

void DeviceLane::Copy(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                      int64_t rows, int64_t cols, cudaMemcpyKind kind) {
  const size_t width = static_cast<size_t>(cols) * sizeof(float);
  if (rows == 1 || (to_stride == cols && from_stride == cols)) {
    CheckDevice(cudaMemcpyAsync(to, from, static_cast<size_t>(rows) * width, kind, stream_));
    return;
  }
  CheckDevice(cudaMemcpy2DAsync(to, static_cast<size_t>(to_stride) * sizeof(float), from,
                                static_cast<size_t>(from_stride) * sizeof(float), width,
                                static_cast<size_t>(rows), kind, stream_));
}

void DeviceLane::Wait() { CheckDevice(cudaStreamSynchronize(stream_)); }

}  // namespace mobi
