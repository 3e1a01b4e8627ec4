// What DeviceProducts keeps for products to read, and holds for them to write.
#include <algorithm>
#include <utility>

#include "kernels/cuda/device_products_lane.h"
#include "kernels/device_products.h"

namespace mobi {

namespace {

// Values of a long vector that are taken for a row.
constexpr int64_t kVectorCols = int64_t{1} << 20;
// Values of the largest piece that is not given back to the device when it is freed.
constexpr int64_t kReusedValues = int64_t{1} << 27;
// Bytes of all such pieces that nothing uses.
constexpr int64_t kMostUnused = int64_t{8} << 30;

int64_t Bytes(int64_t count) { return count * static_cast<int64_t>(sizeof(float)); }

}  // namespace

float* DeviceProducts::Allocate(int64_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (count == 0 || kept_bytes_ + Bytes(count) > most_kept_) return nullptr;
  void* device = nullptr;
  if (const auto found = free_.find(count); found != free_.end()) {
    device = found->second;
    free_.erase(found);
    free_bytes_ -= Bytes(count);
  } else {
    if (kept_bytes_ + free_bytes_ + Bytes(count) > most_kept_) FreeUnused();
    cudaError_t error = cudaMalloc(&device, static_cast<size_t>(Bytes(count)));
    if (error != cudaSuccess && free_bytes_ > 0) {
      FreeUnused();
      error = cudaMalloc(&device, static_cast<size_t>(Bytes(count)));
    }
    if (error != cudaSuccess) {
      cudaGetLastError();
      return nullptr;
    }
  }
  kept_bytes_ += Bytes(count);
  return static_cast<float*>(device);
}

void DeviceProducts::Free(float* device, int64_t count) {
  kept_bytes_ -= Bytes(count);
  if (count > kReusedValues) {
    CheckDevice(cudaFree(device));
    return;
  }
  if (free_bytes_ + Bytes(count) > kMostUnused) FreeUnused();
  free_.emplace(count, device);
  free_bytes_ += Bytes(count);
}

void DeviceProducts::FreeUnused() {
  for (const auto& [size, data] : free_) cudaFree(data);
  free_.clear();
  free_bytes_ = 0;
}

bool DeviceProducts::Keep(const float* data, int64_t count) {
  float* device = Allocate(count);
  if (device == nullptr) return false;
  std::unique_ptr<DeviceLane> lane = Take();
  const int64_t cols = std::min(count, kVectorCols), rows = count / cols, rest = count % cols;
  lane->CopyUp(device, cols, data, cols, rows, cols);
  if (rest > 0) lane->CopyUp(device + rows * cols, rest, data + rows * cols, rest, 1, rest);
  lane->Wait();
  GiveBack(std::move(lane));
  const std::lock_guard<std::mutex> lock(mutex_);
  kept_[data] = {device, count, false};
  return true;
}

bool DeviceProducts::Hold(const float* data, int64_t count) {
  float* device = Allocate(count);
  if (device == nullptr) return false;
  const std::lock_guard<std::mutex> lock(mutex_);
  kept_[data] = {device, count, true};
  return true;
}

void DeviceProducts::Forget(const float* data) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = kept_.find(data);
  if (found == kept_.end()) return;
  Free(found->second.device, found->second.count);
  kept_.erase(found);
}

void DeviceProducts::Fetch(float* data, int64_t rows, int64_t cols, int64_t stride) {
  const auto at = FindHeld({data, rows, cols, stride, false});
  if (!at) return;
  std::unique_ptr<DeviceLane> lane = Take();
  lane->CopyDown(data, stride, at->data, at->stride, rows, cols);
  GiveBack(std::move(lane));
}

void DeviceProducts::Send(const float* data, int64_t rows, int64_t cols, int64_t stride) {
  const auto at = FindHeld({data, rows, cols, stride, false});
  if (!at) return;
  std::unique_ptr<DeviceLane> lane = Take();
  lane->CopyUp(at->data, at->stride, data, stride, rows, cols);
  lane->Wait();
  GiveBack(std::move(lane));
}

void DeviceProducts::Clear(const float* data, int64_t count) {
  const auto at = FindHeld({data, 1, count, count, false});
  if (!at) return;
  std::unique_ptr<DeviceLane> lane = Take();
  CheckDevice(cudaMemsetAsync(at->data, 0, static_cast<size_t>(Bytes(count)), lane->stream()));
  lane->Wait();
  GiveBack(std::move(lane));
}

bool DeviceProducts::Add(float* y, const float* x, int64_t count) {
  const auto at_y = FindHeld({y, 1, count, count, false});
  const auto at_x = FindHeld({x, 1, count, count, false});
  if (!at_y || !at_x) return false;
  std::unique_ptr<DeviceLane> lane = Take();
  const float one = 1;
  CheckDevice(cublasSaxpy_64(lane->cublas(), count, &one, at_x->data, 1, at_y->data, 1));
  lane->Wait();
  GiveBack(std::move(lane));
  return true;
}

}  // namespace mobi
