// Copies between pageable host memory and the device through pinned buffers: uploads leave their
// source free on return, downloads land when Finish is called after the stream has been waited for.
// One thread. Errors are CUDA's own.
#ifndef MOBI_KERNELS_CUDA_STAGING_H_
#define MOBI_KERNELS_CUDA_STAGING_H_

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <vector>

namespace mobi::cuda {

class Staging {
 public:
  Staging() = default;
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  cudaError_t Create(cudaStream_t stream);
  cudaError_t Upload(const void* host, size_t bytes, void* device);
  cudaError_t Download(const void* device, size_t bytes, void* host);
  // Copies what was downloaded to its place; everything on the stream must have ended.
  void Finish();

 private:
  static constexpr int kSegments = 4;
  static constexpr size_t kSegmentBytes = size_t{8} << 20;

  struct Segment {
    std::byte* data = nullptr;
    size_t used = 0;
    cudaEvent_t done = nullptr;  // of the copies out of a full segment
    bool pending = false;
  };
  struct Landing {
    const std::byte* staged;
    void* host;
    size_t bytes;
  };

  // Moves on to the next segment once its copies have ended.
  cudaError_t NextSegment();

  cudaStream_t stream_ = nullptr;
  std::array<Segment, kSegments> segments_;
  int current_ = 0;
  std::byte* download_ = nullptr;
  size_t download_used_ = 0;
  std::vector<Landing> landings_;
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_STAGING_H_
