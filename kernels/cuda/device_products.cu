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

}  // namespace

DeviceProducts::DeviceProducts(int64_t most_kept) : most_kept_(most_kept) {}
DeviceProducts::~DeviceProducts() {
  for (const auto& [host, kept] : kept_) cudaFree(kept.device);
  FreeUnused();
}

std::unique_ptr<DeviceProducts> DeviceProducts::Create(int64_t most_kept, std::string& error) {
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  if (found != cudaSuccess || devices == 0) {
    error = found != cudaSuccess ? cudaGetErrorString(found) : "no CUDA device";
    return nullptr;
  }
  return std::unique_ptr<DeviceProducts>(new DeviceProducts(most_kept));
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

std::optional<DeviceProducts::Placed> DeviceProducts::Find(const Operand& x) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto found = kept_.upper_bound(x.data);
  if (found == kept_.begin()) return std::nullopt;
  --found;
  const int64_t offset = x.data - found->first;
  if (offset + (x.rows - 1) * x.stride + x.cols > found->second.count) return std::nullopt;
  return Placed{found->second.device + offset, x.stride, found->second.held};
}

std::optional<DeviceProducts::Placed> DeviceProducts::FindHeld(const Operand& x) {
  const std::optional<Placed> found = Find(x);
  return found && found->held ? found : std::nullopt;
}

DeviceProducts::Placed DeviceProducts::Place(DeviceLane& lane, int which, const Operand& x) {
  if (const auto found = Find(x)) return *found;
  float* to = lane.Room(which, x.rows * x.cols);
  lane.CopyUp(to, x.cols, x.data, x.stride, x.rows, x.cols);
  return {to, x.cols, false};
}

// cuBLAS counts columns first: it is asked for the transpose, out^T = op(b)^T op(a)^T. Rows of the
// result are made in pieces, so that a lane's room is bounded.
bool DeviceProducts::Multiply(const Operand& a, const Operand& b, float alpha, float beta,
                              float* out, int64_t out_stride) {
  const int64_t m = a.transposed ? a.cols : a.rows, k = a.transposed ? a.rows : a.cols;
  const int64_t n = b.transposed ? b.rows : b.cols;
  std::optional<Placed> at_a = Find(a), at_b = Find(b);
  const std::optional<Placed> at_out = FindHeld({out, m, n, out_stride, false});
  const bool same =
      a.data == b.data && a.rows == b.rows && a.cols == b.cols && a.stride == b.stride;
  if (!at_out && !(at_a && at_a->held) && !(at_b && at_b->held)) {
    const int64_t moved =
        (at_a || same ? 0 : m * k) + (at_b ? 0 : n * k) + m * n * (beta != 0 ? 2 : 1);
    if (m * n * k < std::max(kLeastWork, kWorkPerValue * moved)) return false;
  }
  std::unique_ptr<DeviceLane> lane = Take();
  if (!at_b) at_b = Place(*lane, 1, b);
  if (same) at_a = at_b;
  const int64_t moved_cols = std::max(at_a ? 1 : k, at_out ? 1 : n);
  const int64_t piece = std::clamp<int64_t>(DeviceLane::kRoomValues / moved_cols, 1, m);
  const auto op = [](const Operand& x) { return x.transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
  for (int64_t first = 0; first < m; first += piece) {
    const int64_t rows = std::min(piece, m - first);
    const int64_t step = a.transposed ? 1 : (at_a ? at_a->stride : a.stride);
    Placed piece_a, piece_out;
    if (at_a) {
      piece_a = {at_a->data + first * step, at_a->stride, false};
    } else {
      const int64_t cols = a.transposed ? rows : k;
      piece_a = {lane->Room(0, rows * k), cols, false};
      lane->CopyUp(piece_a.data, cols, a.data + first * step, a.stride, a.transposed ? k : rows,
                   cols);
    }
    float* host_out = out + first * out_stride;
    if (at_out) {
      piece_out = {at_out->data + first * out_stride, out_stride, false};
    } else {
      piece_out = {lane->Room(2, rows * n), n, false};
      if (beta != 0) lane->CopyUp(piece_out.data, n, host_out, out_stride, rows, n);
    }
    CheckDevice(cublasSgemm(lane->cublas(), op(b), op(a), static_cast<int>(n),
                            static_cast<int>(rows), static_cast<int>(k), &alpha, at_b->data,
                            static_cast<int>(at_b->stride), piece_a.data,
                            static_cast<int>(piece_a.stride), &beta, piece_out.data,
                            static_cast<int>(piece_out.stride)));
    if (!at_out) lane->CopyDown(host_out, out_stride, piece_out.data, n, rows, n);
  }
  if (at_out) lane->Wait();
  GiveBack(std::move(lane));
  return true;
}

bool DeviceProducts::MultiplyParts(const Operand& a, const std::vector<Operand>& b, float alpha,
                                   float beta, float* out, int64_t out_stride) {
  const auto parts = static_cast<int64_t>(b.size());
  const int64_t m = a.rows / parts, n = b[0].cols, k = a.cols;
  const auto at_out = FindHeld({out, a.rows, n, out_stride, false});
  if (!at_out) return false;
  std::vector<Placed> at_b;
  for (const Operand& part : b) {
    const auto found = Find(part);
    if (!found) return false;
    at_b.push_back(*found);
  }
  std::unique_ptr<DeviceLane> lane = Take();
  const Placed at_a = Place(*lane, 0, a);
  for (int64_t part = 0; part < parts; ++part) {
    CheckDevice(cublasSgemm(lane->cublas(), CUBLAS_OP_N, CUBLAS_OP_N, static_cast<int>(n),
                            static_cast<int>(m), static_cast<int>(k), &alpha, at_b[part].data,
                            static_cast<int>(at_b[part].stride), at_a.data + part * m * at_a.stride,
                            static_cast<int>(at_a.stride), &beta,
                            at_out->data + part * m * out_stride, static_cast<int>(out_stride)));
  }
  lane->Wait();
  GiveBack(std::move(lane));
  return true;
}

// Half the work of a product. The lower triangle of rows is the upper one of cuBLAS' columns.
bool DeviceProducts::AddGram(const Operand& x, float alpha, float* out, int64_t out_stride) {
  const auto at_out = FindHeld({out, x.cols, x.cols, out_stride, false});
  if (!at_out) return false;
  std::unique_ptr<DeviceLane> lane = Take();
  const Placed at = Place(*lane, 1, x);
  const float one = 1;
  CheckDevice(cublasSsyrk(lane->cublas(), CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N,
                          static_cast<int>(x.cols), static_cast<int>(x.rows), &alpha, at.data,
                          static_cast<int>(at.stride), &one, at_out->data,
                          static_cast<int>(out_stride)));
  lane->Wait();
  GiveBack(std::move(lane));
  return true;
}

}  // namespace mobi
