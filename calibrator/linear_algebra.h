// The dense linear algebra that calibration needs, over BLAS and LAPACK: products, Gram matrices,
// factors of symmetric positive definite matrices. One place, so that other libraries can stand
// behind it: cuBLAS and cuSOLVER do for large ones (kernels/device_products.h). Thread-safe; large
// calls use the threads of SetBlasThreads.
#ifndef MOBI_CALIBRATOR_LINEAR_ALGEBRA_H_
#define MOBI_CALIBRATOR_LINEAR_ALGEBRA_H_

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "calibrator/matrix.h"

namespace mobi {

// Threads of one product. Global to the process: call it where nothing else computes.
void SetBlasThreads(int num_threads);

// The name of kernels that suit this processor better than those that BLAS chose, empty when it
// chose well: a library older than the processor falls back to its oldest ones. Takes effect as
// OPENBLAS_CORETYPE in the environment of a new process.
std::string BetterBlasKernels();

// "cpu", or "cuda": large products and factors are made there from now on, and at most `most_kept`
// bytes of matrices kept there. Global to the process as well. UNAVAILABLE says why there is no
// such device. No DeviceCopy or DeviceMatrix may live meanwhile.
inline constexpr int64_t kMostKeptOnDevice = std::numeric_limits<int64_t>::max();
absl::Status UseDevice(std::string_view device, int64_t most_kept = kMostKeptOnDevice);

// While it lives, products find this matrix, and any part of it, on the device: for operands of
// many products. The matrix must live longer, in the same memory and with the same values. Without
// a device, or without room there, it does nothing.
class DeviceCopy {
 public:
  DeviceCopy() = default;
  explicit DeviceCopy(const Matrix& m);
  // Rows of a matrix, whole; they go up from `num_threads` threads.
  DeviceCopy(ConstMatrixView rows, int num_threads);
  DeviceCopy(DeviceCopy&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceCopy& operator=(DeviceCopy&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceCopy();

 private:
  const float* data_ = nullptr;
};

// A matrix with its copy on the device; replaced as a whole, never changed.
class KeptMatrix {
 public:
  KeptMatrix() = default;
  explicit KeptMatrix(Matrix m) : matrix_(std::move(m)), copy_(matrix_) {}
  KeptMatrix(KeptMatrix&&) noexcept = default;
  KeptMatrix& operator=(KeptMatrix&& other) noexcept {
    std::swap(matrix_, other.matrix_);  // neither copy may outlive what it is of
    std::swap(copy_, other.copy_);
    return *this;
  }

  operator const Matrix&() const { return matrix_; }  // NOLINT: it is one
  const Matrix& get() const { return matrix_; }

 private:
  Matrix matrix_;
  DeviceCopy copy_;
};

// A matrix that lives on the device: products read and write any part of it without moving it. The
// host reads a part that it fetched and is not written since, and sends what it wrote. Without a
// device, or without room there, it is a matrix on the host, and fetching and sending do nothing.
class DeviceMatrix {
 public:
  DeviceMatrix() = default;
  DeviceMatrix(int64_t rows, int64_t cols);  // zeros
  static DeviceMatrix Unfilled(int64_t rows, int64_t cols);
  // A matrix sent as a whole.
  explicit DeviceMatrix(Matrix m);
  DeviceMatrix(DeviceMatrix&& other) noexcept
      : matrix_(std::move(other.matrix_)), held_(std::exchange(other.held_, nullptr)) {}
  DeviceMatrix& operator=(DeviceMatrix&& other) noexcept {
    std::swap(matrix_, other.matrix_);
    std::swap(held_, other.held_);
    return *this;
  }
  ~DeviceMatrix();

  int64_t rows() const { return matrix_.rows(); }
  int64_t cols() const { return matrix_.cols(); }
  bool empty() const { return matrix_.empty(); }
  // For products, wherever it is.
  operator MatrixView() { return matrix_; }             // NOLINT: a matrix is a view of itself
  operator ConstMatrixView() const { return matrix_; }  // NOLINT

  // On the host, with the values of now.
  const Matrix& Fetch() const;
  MatrixView FetchColumns(int64_t begin, int64_t count);
  ConstMatrixView FetchRows(int64_t begin, int64_t count) const;
  // += other, of the same size.
  void Add(const DeviceMatrix& other);

 private:
  mutable Matrix matrix_;        // while it lives on the device, the host's copies of parts
  const float* held_ = nullptr;  // matrix_'s values, if it does
};

// out = alpha a b^T + beta out;  a [m, k], b [n, k], out [m, n].
void MultiplyTransposed(ConstMatrixView a, ConstMatrixView b, MatrixView out, float alpha = 1,
                        float beta = 0);
// out = alpha a b + beta out;  a [m, k], b [k, n], out [m, n].
void Multiply(ConstMatrixView a, ConstMatrixView b, MatrixView out, float alpha = 1,
              float beta = 0);
// Multiply for as many equal parts of the rows of `a` and `out` as there are matrices in `b`, each
// with its own: where a device has them all, in one call.
void MultiplyParts(ConstMatrixView a, const std::vector<ConstMatrixView>& b, MatrixView out,
                   float alpha = 1, float beta = 0);
// out = alpha a^T b + beta out;  a [k, m], b [k, n], out [m, n].
void TransposedMultiply(ConstMatrixView a, ConstMatrixView b, MatrixView out, float alpha = 1,
                        float beta = 0);
// Of a piece of a row, in fp32.
float Dot(const float* a, const float* b, int64_t count);
float Sum(const float* a, int64_t count);
// a [m, k], b [k, k], in pieces of `width` columns and rows; out [m, p, 2, p] for the p = k / width
// pieces of a row: out[i, g, 0, h] = the sum of (a_i,g b_g,h), the product of row i's piece g with
// a block of b, out[i, g, 1, h] = that product times row i's piece h, for h <= g.
void PiecewiseProducts(ConstMatrixView a, ConstMatrixView b, int64_t width, Matrix& out);
// The lower triangle of out += alpha x^T x;  x [n, d], out [d, d].
void AddGram(ConstMatrixView x, MatrixView out, float alpha = 1);
// Steps between products that a device makes, too; false, with nothing done, where the host is to
// make them (llama_block.h has both).
// out [n, heads head_dim], on the host, = causal attention of qkv [n, (heads + 2 kv_heads)
// head_dim].
bool CausalAttentionOnDevice(ConstMatrixView qkv, int64_t heads, int64_t kv_heads, float scale,
                             MatrixView out);
// out [n, cols] = silu(gate) up of gate_up [n, 2 cols], where either is a DeviceMatrix.
bool SwiGluOnDevice(ConstMatrixView gate_up, MatrixView out);
// Copies the lower triangle to the upper one.
void MirrorLower(MatrixView m, int num_threads = 1);

// The upper triangular U with h^-1 = U^T U, computed in double: what error feedback walks along
// (row j of U over its diagonal is how an error at column j moves to the columns behind it).
// FAILED_PRECONDITION when h is not positive definite.
absl::Status InverseFactor(ConstMatrixView h, Matrix& factor);

// x with x h = b for every row of b, computed in double; h symmetric positive definite.
absl::Status SolveRows(ConstMatrixView h, ConstMatrixView b, Matrix& x);

// Solves the small dense system a x = b in place by Cholesky (a [n, n] lower triangle used and
// destroyed, b becomes x). False when a is not positive definite.
bool SolveSmall(double* a, double* b, int n);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_LINEAR_ALGEBRA_H_
