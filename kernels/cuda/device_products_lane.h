// What DeviceProducts works with at once: a stream, its cuBLAS handle, device memory for operands
// and two halves of pinned memory to copy through, in turns: while one is on its way the other is
// filled or emptied. Memory that is not pinned is several times slower, and slower still from
// several threads. For one thread at a time. A device error aborts.
#ifndef MOBI_KERNELS_CUDA_DEVICE_PRODUCTS_LANE_H_
#define MOBI_KERNELS_CUDA_DEVICE_PRODUCTS_LANE_H_

#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <cusolverDn.h>

#include <array>
#include <cstdint>

namespace mobi {

// Abort, saying why, on what is not success.
void CheckDevice(cudaError_t error);
void CheckDevice(cublasStatus_t status);
void CheckDevice(cusolverStatus_t status);

class DeviceLane {
 public:
  // Values of one operand or result that there is room for, but for what cannot be cut.
  static constexpr int64_t kRoomValues = int64_t{1} << 26;

  DeviceLane();
  ~DeviceLane();
  DeviceLane(const DeviceLane&) = delete;
  DeviceLane& operator=(const DeviceLane&) = delete;

  cudaStream_t stream() const { return stream_; }
  cublasHandle_t cublas() const { return cublas_; }

  // Device memory for `count` values of operand `which` (0 to 3); what was there is lost when it
  // grows.
  float* Room(int which, int64_t count);

  // `rows` rows of `cols` values. CopyUp returns when the host's may change, CopyDown when all is
  // there.
  void CopyUp(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
              int64_t cols);
  void CopyDown(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
                int64_t cols);
  void Wait();  // for all that the stream was given

 private:
  void Copy(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
            int64_t cols, cudaMemcpyKind kind);

  struct Memory {
    void* data = nullptr;
    size_t bytes = 0;
  };
  cudaStream_t stream_ = nullptr;
  cublasHandle_t cublas_ = nullptr;
  std::array<float*, 2> staged_{};
  std::array<cudaEvent_t, 2> copied_{};
  std::array<Memory, 4> memory_;
};

// cuSOLVER's handle, for one call at a time.
struct DeviceSolver {
  DeviceSolver();
  ~DeviceSolver();
  cusolverDnHandle_t handle = nullptr;
  cusolverDnParams_t params = nullptr;
};

}  // namespace mobi

#endif  // MOBI_KERNELS_CUDA_DEVICE_PRODUCTS_LANE_H_
