#include "calibrator/linear_algebra.h"

#include <cblas.h>
#include <lapacke.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>

#include "absl/strings/str_format.h"
#include "calibrator/parallel.h"
#include "calibrator/vector_math.h"
#include "engine/base/status_macros.h"
#include "kernels/device_products.h"

namespace mobi {
namespace {

int Int(int64_t value) { return static_cast<int>(value); }

// Where large products and factors are made, when not by BLAS and LAPACK; chosen once for the
// process, as BLAS' threads.
std::unique_ptr<DeviceProducts>& Device() {
  static std::unique_ptr<DeviceProducts> device;
  return device;
}

// True when the product was made on the device.
bool OnDevice(ConstMatrixView a, bool transpose_a, ConstMatrixView b, bool transpose_b, float alpha,
              float beta, MatrixView out) {
  DeviceProducts* device = Device().get();
  return device != nullptr && device->Multiply({a.data, a.rows, a.cols, a.stride, transpose_a},
                                               {b.data, b.rows, b.cols, b.stride, transpose_b},
                                               alpha, beta, out.data, out.stride);
}

// A column-major LAPACK routine sees the transpose of a row-major matrix; for the symmetric ones
// here that only swaps the triangles.
std::vector<double> ToDouble(ConstMatrixView m) {
  std::vector<double> out(static_cast<size_t>(m.rows * m.cols));
  for (int64_t i = 0; i < m.rows; ++i) {
    std::copy_n(m.Row(i), m.cols, out.data() + i * m.cols);
  }
  return out;
}

DeviceProducts::Operand OperandOf(ConstMatrixView m) {
  return {m.data, m.rows, m.cols, m.stride, false};
}

// `info` is LAPACK's, and cuSOLVER's.
absl::Status Factorized(int n, int info) {
  if (info == 0) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrFormat("Hessian of size %d is not positive definite (pivot %d)", n, info));
}

// Cholesky's factor L of a: the upper triangle, column-major, becomes L^T.
absl::Status Factorize(std::vector<double>& a, int n) {
  return Factorized(n, LAPACKE_dpotrf(LAPACK_COL_MAJOR, 'U', n, a.data(), n));
}

}  // namespace

void SetBlasThreads(int num_threads) { openblas_set_num_threads(num_threads); }

std::string BetterBlasKernels() {
#if defined(__x86_64__)
  if (std::string_view(openblas_get_corename()) != "Prescott") return "";
  if (__builtin_cpu_supports("avx512f")) return "SkylakeX";
  if (__builtin_cpu_supports("avx2")) return "Haswell";
#endif
  return "";
}

absl::Status UseDevice(std::string_view device, int64_t most_kept) {
  if (device == "cpu") {
    Device().reset();
    return absl::OkStatus();
  }
  if (device != "cuda") {
    return absl::InvalidArgumentError(
        absl::StrFormat("device \"%s\" is not cpu or cuda", std::string(device)));
  }
  std::string error;
  Device() = DeviceProducts::Create(most_kept, error);
  if (Device() == nullptr) return absl::UnavailableError("no device cuda: " + error);
  return absl::OkStatus();
}

DeviceCopy::DeviceCopy(const Matrix& m) {
  DeviceProducts* device = Device().get();
  if (device != nullptr && device->Keep(m.data(), m.size())) data_ = m.data();
}

DeviceCopy::DeviceCopy(ConstMatrixView rows, int num_threads) {
  DeviceProducts* device = Device().get();
  if (device == nullptr || !device->Hold(rows.data, rows.rows * rows.cols)) return;
  data_ = rows.data;
  const int64_t piece = (rows.rows + num_threads - 1) / num_threads;
  ParallelFor(num_threads, num_threads, [&](int64_t i) {
    const int64_t first = std::min(i * piece, rows.rows), last = std::min(first + piece, rows.rows);
    if (first < last) device->Send(rows.Row(first), last - first, rows.cols, rows.stride);
  });
}

DeviceCopy::~DeviceCopy() {
  if (data_ != nullptr && Device() != nullptr) Device()->Forget(data_);
}

DeviceMatrix DeviceMatrix::Unfilled(int64_t rows, int64_t cols) {
  DeviceMatrix m;
  m.matrix_ = Matrix::Unfilled(rows, cols);
  DeviceProducts* device = Device().get();
  if (device != nullptr && device->Hold(m.matrix_.data(), m.matrix_.size())) {
    m.held_ = m.matrix_.data();
  }
  return m;
}

DeviceMatrix::DeviceMatrix(int64_t rows, int64_t cols) : DeviceMatrix(Unfilled(rows, cols)) {
  if (held_ != nullptr) {
    Device()->Clear(held_, matrix_.size());
  } else {
    matrix_.Fill(0);
  }
}

DeviceMatrix::DeviceMatrix(Matrix m) : matrix_(std::move(m)) {
  DeviceProducts* device = Device().get();
  if (device == nullptr || !device->Hold(matrix_.data(), matrix_.size())) return;
  held_ = matrix_.data();
  device->Send(held_, rows(), cols(), cols());
}

DeviceMatrix::~DeviceMatrix() {
  if (held_ != nullptr && Device() != nullptr) Device()->Forget(held_);
}

const Matrix& DeviceMatrix::Fetch() const {
  if (held_ != nullptr) Device()->Fetch(matrix_.data(), rows(), cols(), cols());
  return matrix_;
}

ConstMatrixView DeviceMatrix::FetchRows(int64_t begin, int64_t count) const {
  const MatrixView part = MatrixView(matrix_).Rows(begin, count);
  if (held_ != nullptr) Device()->Fetch(part.data, part.rows, part.cols, part.stride);
  return part;
}

MatrixView DeviceMatrix::FetchColumns(int64_t begin, int64_t count) {
  const MatrixView part = MatrixView(matrix_).Columns(begin, count);
  if (held_ != nullptr) Device()->Fetch(part.data, part.rows, part.cols, part.stride);
  return part;
}

void DeviceMatrix::Add(const DeviceMatrix& other) {
  if (held_ != nullptr && other.held_ != nullptr) {
    Device()->Add(matrix_.data(), other.held_, matrix_.size());
    return;
  }
  Fetch();
  AddScaled(matrix_.data(), other.Fetch().data(), 1, matrix_.size());
  if (held_ != nullptr) Device()->Send(held_, rows(), cols(), cols());
}

void MultiplyTransposed(ConstMatrixView a, ConstMatrixView b, MatrixView out, float alpha,
                        float beta) {
  if (OnDevice(a, false, b, true, alpha, beta, out)) return;
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, Int(a.rows), Int(b.rows), Int(a.cols), alpha,
              a.data, Int(a.stride), b.data, Int(b.stride), beta, out.data, Int(out.stride));
}

void Multiply(ConstMatrixView a, ConstMatrixView b, MatrixView out, float alpha, float beta) {
  if (OnDevice(a, false, b, false, alpha, beta, out)) return;
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, Int(a.rows), Int(b.cols), Int(a.cols),
              alpha, a.data, Int(a.stride), b.data, Int(b.stride), beta, out.data, Int(out.stride));
}

void MultiplyParts(ConstMatrixView a, const std::vector<ConstMatrixView>& b, MatrixView out,
                   float alpha, float beta) {
  if (DeviceProducts* device = Device().get(); device != nullptr) {
    std::vector<DeviceProducts::Operand> operands;
    operands.reserve(b.size());
    for (const ConstMatrixView& part : b) operands.push_back(OperandOf(part));
    if (device->MultiplyParts(OperandOf(a), operands, alpha, beta, out.data, out.stride)) return;
  }
  const int64_t rows = a.rows / static_cast<int64_t>(b.size());
  for (size_t i = 0; i < b.size(); ++i) {
    const int64_t first = static_cast<int64_t>(i) * rows;
    Multiply(a.Rows(first, rows), b[i], out.Rows(first, rows), alpha, beta);
  }
}

void TransposedMultiply(ConstMatrixView a, ConstMatrixView b, MatrixView out, float alpha,
                        float beta) {
  if (OnDevice(a, true, b, false, alpha, beta, out)) return;
  cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, Int(a.cols), Int(b.cols), Int(a.rows), alpha,
              a.data, Int(a.stride), b.data, Int(b.stride), beta, out.data, Int(out.stride));
}

float Dot(const float* a, const float* b, int64_t count) {
  float sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += a[j] * b[j];
  return sum;
}

float Sum(const float* a, int64_t count) {
  float sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += a[j];
  return sum;
}

void PiecewiseProducts(ConstMatrixView a, ConstMatrixView b, int64_t width, Matrix& out) {
  const int64_t pieces = a.cols / width;
  out = Matrix::Unfilled(a.rows, 2 * pieces * pieces);
  if (DeviceProducts* device = Device().get();
      device != nullptr &&
      device->PiecewiseProducts(OperandOf(a), OperandOf(b), width, out.data())) {
    return;
  }
  Matrix products = Matrix::Unfilled(a.rows, a.cols);
  for (int64_t g = 0; g < pieces; ++g) {
    Multiply(a.Columns(g * width, width), b.Rows(g * width, width), products);
    for (int64_t i = 0; i < a.rows; ++i) {
      float* sums = out.Row(i) + g * 2 * pieces;
      for (int64_t h = 0; h < pieces; ++h) {
        const float* piece = products.Row(i) + h * width;
        sums[h] = Sum(piece, width);
        if (h <= g) sums[pieces + h] = Dot(piece, a.Row(i) + h * width, width);
      }
    }
  }
}

void AddGram(ConstMatrixView x, MatrixView out, float alpha) {
  if (DeviceProducts* device = Device().get();
      device != nullptr && device->AddGram(OperandOf(x), alpha, out.data, out.stride)) {
    return;
  }
  if (OnDevice(x, true, x, false, alpha, 1, out)) return;
  cblas_ssyrk(CblasRowMajor, CblasLower, CblasTrans, Int(x.cols), Int(x.rows), alpha, x.data,
              Int(x.stride), 1.0f, out.data, Int(out.stride));
}

bool CausalAttentionOnDevice(ConstMatrixView qkv, int64_t heads, int64_t kv_heads, float scale,
                             MatrixView out) {
  DeviceProducts* device = Device().get();
  return device != nullptr &&
         device->CausalAttention(OperandOf(qkv), heads, kv_heads, scale, out.data, out.stride);
}

bool SwiGluOnDevice(ConstMatrixView gate_up, MatrixView out) {
  DeviceProducts* device = Device().get();
  return device != nullptr && device->SwiGlu(OperandOf(gate_up), out.data, out.stride);
}

void MirrorLower(MatrixView m, int num_threads) {
  constexpr int64_t kTile = 32;  // of which both sides stay in the cache
  ParallelFor(num_threads, (m.rows + kTile - 1) / kTile, [&](int64_t tile) {
    const int64_t first = tile * kTile, last = std::min(first + kTile, m.rows);
    for (int64_t begin = 0; begin < last; begin += kTile) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t end = std::min(begin + kTile, i);
        for (int64_t j = begin; j < end; ++j) m.Row(j)[i] = m.Row(i)[j];
      }
    }
  });
}

// With J the identity turned end for end and L L^T = J h J, the upper triangular J L^-1 J is the
// factor: its square is J (L L^T)^-1 J = h^-1. Half the work of a Cholesky of h^-1, which needs
// h^-1.
absl::Status InverseFactor(ConstMatrixView h, Matrix& factor) {
  const int n = Int(h.rows);
  factor = Matrix(n, n);
  if (DeviceProducts* device = Device().get(); device != nullptr) {
    const auto info = device->InverseFactor(OperandOf(h), factor.data(), n);
    if (info.has_value()) return Factorized(n, *info);
  }
  std::vector<double> a = ToDouble(h);
  std::reverse(a.begin(), a.end());
  MOBI_RETURN_IF_ERROR(Factorize(a, n));
  MOBI_RETURN_IF_ERROR(Factorized(n, LAPACKE_dtrtri(LAPACK_COL_MAJOR, 'U', 'N', n, a.data(), n)));
  for (int64_t i = 0; i < n; ++i) {
    const double* last = a.data() + a.size() - 1 - i * n;
    for (int64_t j = i; j < n; ++j) factor(i, j) = static_cast<float>(last[-j]);
  }
  return absl::OkStatus();
}

absl::Status SolveRows(ConstMatrixView h, ConstMatrixView b, Matrix& x) {
  const int n = Int(h.rows);
  x = Matrix(b.rows, b.cols);
  if (DeviceProducts* device = Device().get(); device != nullptr) {
    const auto info = device->SolveRows(OperandOf(h), OperandOf(b), x.data(), b.cols);
    if (info.has_value()) return Factorized(n, *info);
  }
  std::vector<double> a = ToDouble(h);
  std::vector<double> rhs = ToDouble(b);
  MOBI_RETURN_IF_ERROR(Factorize(a, n));
  // Rows of a row-major b are the columns of the column-major right-hand side.
  LAPACKE_dpotrs(LAPACK_COL_MAJOR, 'U', n, Int(b.rows), a.data(), n, rhs.data(), n);
  std::copy(rhs.begin(), rhs.end(), x.data());
  return absl::OkStatus();
}

bool SolveSmall(double* a, double* b, int n) {
  for (int i = 0; i < n; ++i) {
    double* row = a + i * n;
    for (int j = 0; j <= i; ++j) {
      const double* other = a + j * n;
      double sum = row[j];
      for (int k = 0; k < j; ++k) sum -= row[k] * other[k];
      if (i == j) {
        if (!(sum > 0)) return false;
        row[i] = std::sqrt(sum);
      } else {
        row[j] = sum / other[j];
      }
    }
  }
  for (int i = 0; i < n; ++i) {
    double sum = b[i];
    for (int k = 0; k < i; ++k) sum -= a[i * n + k] * b[k];
    b[i] = sum / a[i * n + i];
  }
  for (int i = n - 1; i >= 0; --i) {
    double sum = b[i];
    for (int k = i + 1; k < n; ++k) sum -= a[k * n + i] * b[k];
    b[i] = sum / a[i * n + i];
  }
  return true;
}

}  // namespace mobi
