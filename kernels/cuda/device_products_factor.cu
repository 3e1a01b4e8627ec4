// Factorizations of DeviceProducts, in double, by cuSOLVER. Matrices go up and come back in fp32
// and are widened on the device.
#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/cuda/device_products_lane.h"
#include "kernels/device_products.h"

namespace mobi {

namespace {

// Up to this size the host's cores are done before the device has started.
constexpr int64_t kLeastFactored = 512;
constexpr int kThreads = 256, kMaxBlocks = 1024;
// Bytes in what Xtrtri_bufferSize counts in: CUDA 12.4.0 gives values.
constexpr size_t kTrtriUnit = CUSOLVER_VERSION == 11600 ? sizeof(double) : 1;

int BlocksFor(int64_t count) {
  return static_cast<int>(std::min<int64_t>(kMaxBlocks, (count + kThreads - 1) / kThreads));
}

// to[i * direction] = from[i]: -1 turns a matrix whose last value `to` is end for end.
__global__ void Widen(const float* from, int64_t count, int direction, double* to) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    to[i * direction] = from[i];
  }
}

__global__ void Narrow(const double* from, int64_t count, float* to) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    to[i] = static_cast<float>(from[i]);
  }
}

// Rows [first, first + rows) of the upper triangle of `a` [n, n] turned end for end.
__global__ void NarrowTurned(const double* a, int64_t n, int64_t first, int64_t rows, float* to) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x, last = n * n - 1 - first * n;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows * n; i += step) {
    to[i] = i % n < first + i / n ? 0.0f : static_cast<float>(a[last - i]);
  }
}

// What potrf leaves in `info`, and the first pivot that is not a positive number where it saw none.
__global__ void CheckPivots(const double* a, int n, int* info) {
  if (*info != 0) return;
  __shared__ int first;
  if (threadIdx.x == 0) first = n;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    const double pivot = a[static_cast<int64_t>(i) * (n + 1)];
    if (!(pivot > 0 && isfinite(pivot))) atomicMin(&first, i);
  }
  __syncthreads();
  if (threadIdx.x == 0 && first < n) *info = first + 1;
}

// Device memory for one factorization; null where there is no room.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    if (cudaMalloc(&data_, std::max<size_t>(bytes, 1)) == cudaSuccess) return;
    cudaGetLastError();
    data_ = nullptr;
  }
  ~Scratch() { cudaFree(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  void* data_ = nullptr;
};

// What both factorizations are made of. Column-major cuSOLVER sees the transpose of a row-major
// matrix: its upper triangle is our lower one.
class Factorization {
 public:
  Factorization(const DeviceSolver& solver, DeviceLane& lane, int64_t n)
      : solver_(solver), lane_(lane), n_(n), a_(n * n * sizeof(double)), info_(sizeof(int)) {
    CheckDevice(cusolverDnSetStream(solver.handle, lane.stream()));
    if (!a_ || !info_) return;
    size_t device[2], host[2];
    CheckDevice(cusolverDnXpotrf_bufferSize(solver.handle, solver.params, CUBLAS_FILL_MODE_UPPER, n,
                                            CUDA_R_64F, a(), n, CUDA_R_64F, &device[0], &host[0]));
    CheckDevice(cusolverDnXtrtri_bufferSize(solver.handle, CUBLAS_FILL_MODE_UPPER,
                                            CUBLAS_DIAG_NON_UNIT, n, CUDA_R_64F, a(), n, &device[1],
                                            &host[1]));
    device_bytes_ = std::max(device[0], device[1] * kTrtriUnit);
    host_work_.resize(std::max(host[0], host[1] * kTrtriUnit));
    work_.emplace(device_bytes_);
  }

  bool has_room() const { return work_.has_value() && *work_; }
  double* a() const { return a_.as<double>(); }

  // `rows` rows of `cols` values into `to`, forwards (direction 1) or from there backwards (-1).
  void Upload(DeviceProducts::Operand x, double* to, int direction) {
    const int64_t piece = std::max<int64_t>(1, DeviceLane::kRoomValues / x.cols);
    for (int64_t first = 0; first < x.rows; first += piece) {
      const int64_t rows = std::min(piece, x.rows - first), count = rows * x.cols;
      float* room = lane_.Room(0, count);
      lane_.CopyUp(room, x.cols, x.data + first * x.stride, x.stride, rows, x.cols);
      Widen<<<BlocksFor(count), kThreads, 0, lane_.stream()>>>(room, count, direction,
                                                               to + first * x.cols * direction);
      CheckDevice(cudaGetLastError());
    }
  }

  // narrow(first, rows, room) leaves `rows` rows of the result in `room`.
  template <typename NarrowRows>
  void Download(int64_t rows, int64_t cols, float* out, int64_t stride, NarrowRows&& narrow) {
    const int64_t piece = std::max<int64_t>(1, DeviceLane::kRoomValues / cols);
    for (int64_t first = 0; first < rows; first += piece) {
      const int64_t count = std::min(piece, rows - first);
      float* room = lane_.Room(0, count * cols);
      narrow(first, count, room);
      CheckDevice(cudaGetLastError());
      lane_.CopyDown(out + first * stride, stride, room, cols, count, cols);
    }
  }

  // Cholesky's factor in place of a, 0, or the first leading minor that is not positive.
  int Cholesky() {
    CheckDevice(cusolverDnXpotrf(solver_.handle, solver_.params, CUBLAS_FILL_MODE_UPPER, n_,
                                 CUDA_R_64F, a(), n_, CUDA_R_64F, work_->as<void>(), device_bytes_,
                                 host_work_.data(), host_work_.size(), info_.as<int>()));
    CheckPivots<<<1, kThreads, 0, lane_.stream()>>>(a(), static_cast<int>(n_), info_.as<int>());
    CheckDevice(cudaGetLastError());
    return Info();
  }

  int InvertTriangle() {
    CheckDevice(cusolverDnXtrtri(solver_.handle, CUBLAS_FILL_MODE_UPPER, CUBLAS_DIAG_NON_UNIT, n_,
                                 CUDA_R_64F, a(), n_, work_->as<void>(), device_bytes_,
                                 host_work_.data(), host_work_.size(), info_.as<int>()));
    return Info();
  }

  void Solve(double* rhs, int64_t count) {
    CheckDevice(cusolverDnXpotrs(solver_.handle, solver_.params, CUBLAS_FILL_MODE_UPPER, n_, count,
                                 CUDA_R_64F, a(), n_, CUDA_R_64F, rhs, n_, info_.as<int>()));
  }

 private:
  int Info() {
    int info = 0;
    CheckDevice(cudaMemcpyAsync(&info, info_.as<int>(), sizeof(int), cudaMemcpyDeviceToHost,
                                lane_.stream()));
    lane_.Wait();
    return info;
  }

  const DeviceSolver& solver_;
  DeviceLane& lane_;
  const int64_t n_;
  Scratch a_, info_;
  std::optional<Scratch> work_;
  size_t device_bytes_ = 0;
  std::vector<std::byte> host_work_;
};

// then(factorization) goes on from the factor of h, or of h turned end for end. Null where there is
// no room, 0 when all went well, else the first leading minor that is not positive.
template <typename Then>
std::optional<int> Factorize(const DeviceSolver& solver, DeviceLane& lane,
                             const DeviceProducts::Operand& h, bool turned, Then&& then) {
  const int64_t n = h.rows;
  Factorization factorization(solver, lane, n);
  if (!factorization.has_room()) return std::nullopt;
  factorization.Upload(h, factorization.a() + (turned ? n * n - 1 : 0), turned ? -1 : 1);
  const int info = factorization.Cholesky();
  if (info != 0) return info;
  return then(factorization);
}

}  // namespace

DeviceSolver::DeviceSolver() {
  CheckDevice(cusolverDnCreate(&handle));
  CheckDevice(cusolverDnCreateParams(&params));
}

DeviceSolver::~DeviceSolver() {
  cusolverDnDestroyParams(params);
  cusolverDnDestroy(handle);
}

// With J the identity turned end for end and L L^T = J h J, the upper triangular J L^-1 J is the
// factor: its square is J (L L^T)^-1 J = h^-1. No inverse of h is needed, nor a second Cholesky.
std::optional<int> DeviceProducts::InverseFactor(const Operand& h, float* factor, int64_t stride) {
  const int64_t n = h.rows;
  if (n < kLeastFactored) return std::nullopt;
  const std::lock_guard<std::mutex> lock(solver_mutex_);
  if (solver_ == nullptr) solver_ = std::make_unique<DeviceSolver>();
  std::unique_ptr<DeviceLane> lane = Take();
  const auto info = Factorize(
      *solver_, *lane, h, /*turned=*/true, [&](Factorization& cholesky) -> std::optional<int> {
        if (const int singular = cholesky.InvertTriangle(); singular != 0) return singular;
        cholesky.Download(n, n, factor, stride, [&](int64_t first, int64_t rows, float* room) {
          NarrowTurned<<<BlocksFor(rows * n), kThreads, 0, lane->stream()>>>(cholesky.a(), n, first,
                                                                             rows, room);
        });
        return 0;
      });
  GiveBack(std::move(lane));
  return info;
}

std::optional<int> DeviceProducts::SolveRows(const Operand& h, const Operand& b, float* x,
                                             int64_t stride) {
  const int64_t n = h.rows;
  if (n < kLeastFactored) return std::nullopt;
  const std::lock_guard<std::mutex> lock(solver_mutex_);
  if (solver_ == nullptr) solver_ = std::make_unique<DeviceSolver>();
  std::unique_ptr<DeviceLane> lane = Take();
  const auto info = Factorize(
      *solver_, *lane, h, /*turned=*/false, [&](Factorization& cholesky) -> std::optional<int> {
        const Scratch rhs(static_cast<size_t>(b.rows * n) * sizeof(double));
        if (!rhs) return std::nullopt;
        cholesky.Upload(b, rhs.as<double>(), 1);
        cholesky.Solve(rhs.as<double>(), b.rows);
        cholesky.Download(b.rows, n, x, stride, [&](int64_t first, int64_t rows, float* room) {
          Narrow<<<BlocksFor(rows * n), kThreads, 0, lane->stream()>>>(rhs.as<double>() + first * n,
                                                                       rows * n, room);
        });
        return 0;
      });
  GiveBack(std::move(lane));
  return info;
}

}  // namespace mobi
