#include <algorithm>
#include <cstring>

#include "kernels/cuda/staging.h"

namespace mobi::cuda {
namespace {

constexpr size_t kAlignment = 256;

size_t Aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Staging::~Staging() {
  for (Segment& segment : segments_) {
    if (segment.done != nullptr) cudaEventDestroy(segment.done);
    cudaFreeHost(segment.data);
  }
  cudaFreeHost(download_);
}

cudaError_t Staging::Create(cudaStream_t stream) {
  stream_ = stream;
  for (Segment& segment : segments_) {
    cudaError_t error = cudaMallocHost(&segment.data, kSegmentBytes);
    if (error == cudaSuccess) {
      error = cudaEventCreateWithFlags(&segment.done, cudaEventDisableTiming);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaMallocHost(&download_, kSegmentBytes);
}

cudaError_t Staging::NextSegment() {
  Segment& full = segments_[current_];
  cudaError_t error = cudaEventRecord(full.done, stream_);
  if (error != cudaSuccess) return error;
  full.pending = true;
  current_ = (current_ + 1) % kSegments;
  Segment& next = segments_[current_];
  if (next.pending) error = cudaEventSynchronize(next.done);
  next.pending = false;
  next.used = 0;
  return error;
}

cudaError_t Staging::Upload(const void* host, size_t bytes, void* device) {
  const auto* from = static_cast<const std::byte*>(host);
  auto* to = static_cast<std::byte*>(device);
  while (bytes > 0) {
    if (segments_[current_].used >= kSegmentBytes) {
      const cudaError_t error = NextSegment();
      if (error != cudaSuccess) return error;
    }
    Segment& segment = segments_[current_];
    const size_t piece = std::min(bytes, kSegmentBytes - segment.used);
    std::byte* staged = segment.data + segment.used;
    std::memcpy(staged, from, piece);
    const cudaError_t error = cudaMemcpyAsync(to, staged, piece, cudaMemcpyHostToDevice, stream_);
    if (error != cudaSuccess) return error;
    segment.used += Aligned(piece);
    from += piece;
    to += piece;
    bytes -= piece;
  }
  return cudaSuccess;
}

cudaError_t Staging::Download(const void* device, size_t bytes, void* host) {
  const auto* from = static_cast<const std::byte*>(device);
  auto* to = static_cast<std::byte*>(host);
  while (bytes > 0) {
    if (download_used_ >= kSegmentBytes) {
      const cudaError_t error = cudaStreamSynchronize(stream_);
      if (error != cudaSuccess) return error;
      Finish();
    }
    const size_t piece = std::min(bytes, kSegmentBytes - download_used_);
    std::byte* staged = download_ + download_used_;
    const cudaError_t error = cudaMemcpyAsync(staged, from, piece, cudaMemcpyDeviceToHost, stream_);
    if (error != cudaSuccess) return error;
    landings_.push_back({staged, to, piece});
    download_used_ += Aligned(piece);
    from += piece;
    to += piece;
    bytes -= piece;
  }
  return cudaSuccess;
}

void Staging::Finish() {
  for (const Landing& landing : landings_) {
    std::memcpy(landing.host, landing.staged, landing.bytes);
  }
  landings_.clear();
  download_used_ = 0;
  for (Segment& segment : segments_) {
    segment.used = 0;
    segment.pending = false;
  }
}

}  // namespace mobi::cuda
