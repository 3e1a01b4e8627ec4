// A row-major fp32 matrix that owns its memory: weights, activations and Hessians while a model is
// calibrated. Not thread-safe for writers of the same element; rows may be written in parallel.
#ifndef MOBI_CALIBRATOR_MATRIX_H_
#define MOBI_CALIBRATOR_MATRIX_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace mobi {

// For std::free; throws std::bad_alloc.
void* AllocateLargePages(size_t bytes);

// What is freed stays with the process for the next matrix, but for pieces of more than 32 MiB:
// steps take the same sizes again and again, and the system would clear each page every time.
// Global to the process: call it before it has threads.
void KeepFreedMemory();

// Memory in large pages where it is large: taking it a small page at a time costs more than filling
// it.
template <typename T>
struct LargePageAllocator {
  using value_type = T;
  LargePageAllocator() = default;
  template <typename U>
  LargePageAllocator(const LargePageAllocator<U>&) {}  // NOLINT: allocators convert
  T* allocate(size_t count) { return static_cast<T*>(AllocateLargePages(count * sizeof(T))); }
  void deallocate(T* memory, size_t) { std::free(memory); }
  template <typename U>
  void construct(U* at) noexcept {
    ::new (static_cast<void*>(at)) U;  // as it is, not cleared
  }
  template <typename U, typename V>
  void construct(U* at, const V& value) noexcept {
    ::new (static_cast<void*>(at)) U(value);
  }
  bool operator==(const LargePageAllocator&) const { return true; }
};

class Matrix {
 public:
  Matrix() = default;
  Matrix(int64_t rows, int64_t cols)
      : rows_(rows), cols_(cols), data_(static_cast<size_t>(rows * cols), 0.0f) {}
  // Of any values, for what is written as a whole: threads that write it side by side also take its
  // pages from the system side by side, which one thread does no faster than 4 GB/s.
  static Matrix Unfilled(int64_t rows, int64_t cols) {
    Matrix m;
    m.rows_ = rows;
    m.cols_ = cols;
    m.data_.resize(static_cast<size_t>(rows * cols));
    return m;
  }

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t size() const { return rows_ * cols_; }
  bool empty() const { return data_.empty(); }
  float* data() { return data_.data(); }
  const float* data() const { return data_.data(); }
  float* Row(int64_t row) { return data_.data() + row * cols_; }
  const float* Row(int64_t row) const { return data_.data() + row * cols_; }
  float& operator()(int64_t row, int64_t col) { return data_[row * cols_ + col]; }
  float operator()(int64_t row, int64_t col) const { return data_[row * cols_ + col]; }
  void Fill(float value) { std::fill(data_.begin(), data_.end(), value); }

 private:
  int64_t rows_ = 0;
  int64_t cols_ = 0;
  std::vector<float, LargePageAllocator<float>> data_;
};

// Rows [begin, begin + rows) of a matrix, or any piece of one: what the linear algebra works on.
struct ConstMatrixView {
  const float* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  ConstMatrixView() = default;
  ConstMatrixView(const float* data, int64_t rows, int64_t cols, int64_t stride)
      : data(data), rows(rows), cols(cols), stride(stride) {}
  ConstMatrixView(const Matrix& m)  // NOLINT: a matrix is a view of itself
      : data(m.data()), rows(m.rows()), cols(m.cols()), stride(m.cols()) {}

  const float* Row(int64_t row) const { return data + row * stride; }
  ConstMatrixView Rows(int64_t begin, int64_t count) const {
    return {data + begin * stride, count, cols, stride};
  }
  ConstMatrixView Columns(int64_t begin, int64_t count) const {
    return {data + begin, rows, count, stride};
  }
};

struct MatrixView {
  float* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  MatrixView() = default;
  MatrixView(float* data, int64_t rows, int64_t cols, int64_t stride)
      : data(data), rows(rows), cols(cols), stride(stride) {}
  MatrixView(Matrix& m)  // NOLINT: a matrix is a view of itself
      : data(m.data()), rows(m.rows()), cols(m.cols()), stride(m.cols()) {}

  operator ConstMatrixView() const { return {data, rows, cols, stride}; }  // NOLINT
  float* Row(int64_t row) const { return data + row * stride; }
  MatrixView Rows(int64_t begin, int64_t count) const {
    return {data + begin * stride, count, cols, stride};
  }
  MatrixView Columns(int64_t begin, int64_t count) const {
    return {data + begin, rows, count, stride};
  }
};

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_MATRIX_H_
