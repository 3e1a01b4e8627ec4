#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

// Below this many multiplications a call costs more than the product.
constexpr int64_t kLeastWork = int64_t{1} << 23;
// Multiplications that a core of the host does while one value is moved.
constexpr int64_t kWorkPerValue = 32;
// Values that are copied through pinned memory at once.
constexpr int64_t kStagedValues = int64_t{1} << 20;
// Values of one operand or result that a lane has room for, but for what cannot be cut.
constexpr int64_t kRoomValues = int64_t{1} << 26;

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

}  // namespace

// Copies go through two halves of pinned memory in turns: while one is on its way the other is
// filled or emptied. Memory that is not pinned is several times slower, and slower still from
// several threads.
struct DeviceProducts::Lane {
  Lane() {
    Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    Check(cublasCreate(&handle));
    Check(cublasSetStream(handle, stream));
    for (int h = 0; h < 2; ++h) {
      Check(cudaHostAlloc(&staged[h], kStagedValues * sizeof(float), cudaHostAllocDefault));
      Check(cudaEventCreateWithFlags(&copied[h], cudaEventDisableTiming));
    }
  }
  ~Lane() {
    for (int h = 0; h < 2; ++h) {
      cudaFreeHost(staged[h]);
      cudaEventDestroy(copied[h]);
    }
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

  // Calls piece(half, first, count) for the pieces of `rows` rows that fit a half, halves in turns.
  template <typename Piece>
  static void InPieces(int64_t rows, int64_t cols, Piece&& piece) {
    const int64_t at_once = std::max<int64_t>(1, kStagedValues / cols);
    for (int64_t first = 0, half = 0; first < rows; first += at_once, half ^= 1) {
      piece(static_cast<int>(half), first, std::min(at_once, rows - first));
    }
  }

  void CopyUp(float* to, const float* from, int64_t stride, int64_t rows, int64_t cols) {
    if (cols > kStagedValues) {
      Check(cudaMemcpy2DAsync(to, cols * sizeof(float), from, stride * sizeof(float),
                              cols * sizeof(float), rows, cudaMemcpyHostToDevice, stream));
      return;
    }
    InPieces(rows, cols, [&](int half, int64_t first, int64_t count) {
      Check(cudaEventSynchronize(copied[half]));
      CopyRows(staged[half], cols, from + first * stride, stride, count, cols);
      Check(cudaMemcpyAsync(to + first * cols, staged[half],
                            static_cast<size_t>(count * cols) * sizeof(float),
                            cudaMemcpyHostToDevice, stream));
      Check(cudaEventRecord(copied[half], stream));
    });
  }

  // Returns when all is there.
  void CopyDown(float* to, int64_t stride, const float* from, int64_t rows, int64_t cols) {
    if (cols > kStagedValues) {
      Check(cudaMemcpy2DAsync(to, stride * sizeof(float), from, cols * sizeof(float),
                              cols * sizeof(float), rows, cudaMemcpyDeviceToHost, stream));
      Check(cudaStreamSynchronize(stream));
      return;
    }
    int64_t arriving = 0, arriving_rows = 0;
    const auto unpack = [&](int half) {
      Check(cudaEventSynchronize(copied[half]));
      CopyRows(to + arriving * stride, stride, staged[half], cols, arriving_rows, cols);
    };
    int last = 0;
    InPieces(rows, cols, [&](int half, int64_t first, int64_t count) {
      Check(cudaMemcpyAsync(staged[half], from + first * cols,
                            static_cast<size_t>(count * cols) * sizeof(float),
                            cudaMemcpyDeviceToHost, stream));
      Check(cudaEventRecord(copied[half], stream));
      if (arriving_rows > 0) unpack(half ^ 1);
      arriving = first;
      arriving_rows = count;
      last = half;
    });
    unpack(last);
  }

  struct Memory {
    void* data = nullptr;
    size_t bytes = 0;
  };
  cudaStream_t stream = nullptr;
  cublasHandle_t handle = nullptr;
  std::array<float*, 2> staged{};
  std::array<cudaEvent_t, 2> copied{};
  std::array<Memory, 3> memory;
};

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

bool DeviceProducts::Keep(const float* data, int64_t count) {
  void* device = nullptr;
  if (count == 0 ||
      cudaMalloc(&device, static_cast<size_t>(count) * sizeof(float)) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  std::unique_ptr<Lane> lane = Take();
  const int64_t cols = std::min(count, kStagedValues), rows = count / cols;
  auto* to = static_cast<float*>(device);
  lane->CopyUp(to, data, cols, rows, cols);
  if (rows * cols < count) {
    lane->CopyUp(to + rows * cols, data + rows * cols, count - rows * cols, 1, count - rows * cols);
  }
  Check(cudaStreamSynchronize(lane->stream));
  GiveBack(std::move(lane));
  const std::lock_guard<std::mutex> lock(mutex_);
  kept_[data] = {to, count};
  return true;
}

void DeviceProducts::Forget(const float* data) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = kept_.find(data);
  if (found == kept_.end()) return;
  Check(cudaFree(found->second.device));
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
  std::unique_ptr<Lane> lane = Take();
  if (!at_b) {
    float* to = lane->Room(1, n * k);
    lane->CopyUp(to, b.data, b.stride, b.rows, b.cols);
    at_b = Placed{to, b.cols};
  }
  if (same) at_a = at_b;
  const int64_t piece = std::clamp<int64_t>(kRoomValues / std::max(n, k), 1, m);
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
    Check(cublasSgemm(lane->handle, op(b), op(a), static_cast<int>(n), static_cast<int>(rows),
                      static_cast<int>(k), &alpha, at_b->data, static_cast<int>(at_b->stride),
                      piece_a.data, static_cast<int>(piece_a.stride), &beta, device_out,
                      static_cast<int>(n)));
    lane->CopyDown(piece_out, out_stride, device_out, rows, n);
  }
  GiveBack(std::move(lane));
  return true;
}

}  // namespace mobi
