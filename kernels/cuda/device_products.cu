#include <algorithm>
#include <utility>

#include "kernels/cuda/device_products_lane.h"
#include "kernels/device_products.h"

namespace mobi {

namespace {

// Below this many multiplications a call costs more than the product.
constexpr int64_t kLeastWork = int64_t{1} << 23;
// Multiplications that a core of the host does while one value is moved.
constexpr int64_t kWorkPerValue = 32;
// Values of a long vector that are taken for a row.
constexpr int64_t kVectorCols = int64_t{1} << 20;

}  // namespace

DeviceProducts::DeviceProducts() = default;
DeviceProducts::~DeviceProducts() {
  for (const auto& [host, kept] : kept_) cudaFree(kept.device);
}

std::unique_ptr<DeviceProducts> DeviceProducts::Create(std::string& error) {
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  if (found != cudaSuccess || devices == 0) {
    error = found != cudaSuccess ? cudaGetErrorString(found) : "no CUDA device";
    return nullptr;
  }
  return std::unique_ptr<DeviceProducts>(new DeviceProducts);
}

std::unique_ptr<DeviceLane> DeviceProducts::Take() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      std::unique_ptr<DeviceLane> lane = std::move(idle_.back());
      idle_.pop_back();
      return lane;
    }
  }
  return std::make_unique<DeviceLane>();
}

void DeviceProducts::GiveBack(std::unique_ptr<DeviceLane> lane) {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(lane));
}

bool DeviceProducts::Keep(const float* data, int64_t count) {
  void* device = nullptr;
  if (count == 0 ||
      cudaMalloc(&device, static_cast<size_t>(count) * sizeof(float)) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  std::unique_ptr<DeviceLane> lane = Take();
  const int64_t cols = std::min(count, kVectorCols), rows = count / cols;
  auto* to = static_cast<float*>(device);
  lane->CopyUp(to, data, cols, rows, cols);
  if (rows * cols < count) {
    lane->CopyUp(to + rows * cols, data + rows * cols, count - rows * cols, 1, count - rows * cols);
  }
  lane->Wait();
  GiveBack(std::move(lane));
  const std::lock_guard<std::mutex> lock(mutex_);
  kept_[data] = {to, count};
  return true;
}

void DeviceProducts::Forget(const float* data) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = kept_.find(data);
  if (found == kept_.end()) return;
  CheckDevice(cudaFree(found->second.device));
  kept_.erase(found);
}

std::optional<DeviceProducts::Placed> DeviceProducts::Find(const Operand& x) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto found = kept_.upper_bound(x.data);
  if (found == kept_.begin()) return std::nullopt;
  --found;
  const int64_t offset = x.data - found->first;
  if (offset + (x.rows - 1) * x.stride + x.cols > found->second.count) return std::nullopt;
  return Placed{found->second.device + offset, x.stride};
}

// cuBLAS counts columns first: it is asked for the transpose, out^T = op(b)^T op(a)^T. Rows of the
// result are made in pieces, so that a lane's room is bounded.
bool DeviceProducts::Multiply(const Operand& a, const Operand& b, float alpha, float beta,
                              float* out, int64_t out_stride) {
  const int64_t m = a.transposed ? a.cols : a.rows, k = a.transposed ? a.rows : a.cols;
  const int64_t n = b.transposed ? b.rows : b.cols;
  if (m * n * k < kLeastWork) return false;
  std::optional<Placed> at_a = Find(a), at_b = Find(b);
  const bool same =
      a.data == b.data && a.rows == b.rows && a.cols == b.cols && a.stride == b.stride;
  const int64_t moved =
      (at_a || same ? 0 : m * k) + (at_b ? 0 : n * k) + m * n * (beta != 0 ? 2 : 1);
  if (m * n * k < kWorkPerValue * moved) return false;
  std::unique_ptr<DeviceLane> lane = Take();
  if (!at_b) {
    float* to = lane->Room(1, n * k);
    lane->CopyUp(to, b.data, b.stride, b.rows, b.cols);
    at_b = Placed{to, b.cols};
  }
  if (same) at_a = at_b;
  const int64_t piece = std::clamp<int64_t>(DeviceLane::kRoomValues / std::max(n, k), 1, m);
  const auto op = [](const Operand& x) { return x.transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
  for (int64_t first = 0; first < m; first += piece) {
    const int64_t rows = std::min(piece, m - first);
    const int64_t step = a.transposed ? 1 : (at_a ? at_a->stride : a.stride);
    Placed piece_a;
    if (at_a) {
      piece_a = {at_a->data + first * step, at_a->stride};
    } else {
      float* to = lane->Room(0, rows * k);
      lane->CopyUp(to, a.data + first * step, a.stride, a.transposed ? k : rows,
                   a.transposed ? rows : k);
      piece_a = {to, a.transposed ? rows : k};
    }
    float* device_out = lane->Room(2, rows * n);
    float* piece_out = out + first * out_stride;
    if (beta != 0) lane->CopyUp(device_out, piece_out, out_stride, rows, n);
    CheckDevice(cublasSgemm(
        lane->cublas(), op(b), op(a), static_cast<int>(n), static_cast<int>(rows),
        static_cast<int>(k), &alpha, at_b->data, static_cast<int>(at_b->stride), piece_a.data,
        static_cast<int>(piece_a.stride), &beta, device_out, static_cast<int>(n)));
    lane->CopyDown(piece_out, out_stride, device_out, rows, n);
  }
  GiveBack(std::move(lane));
  return true;
}

}  // namespace mobi
