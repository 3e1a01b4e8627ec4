// A view of a row-major matrix: pointer, element type, shape and row stride. Every tensor that
// moves through a forward pass is a matrix of tokens x features, or a vector with one row.
// Views own nothing and are passed by value; the memory may be the host's or a device's, as the
// Backend that allocated it says.
#ifndef MOBI_KERNELS_TENSOR_H_
#define MOBI_KERNELS_TENSOR_H_

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace mobi {

enum class DType : uint8_t { kF32, kF16, kBF16, kI32, kU8 };

constexpr size_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kU8:
      return 1;
  }
  return 0;
}

std::string_view Name(DType dtype);

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // elements from one row to the next

  static Tensor Of(void* data, DType dtype, int64_t rows, int64_t cols) {
    return {data, dtype, rows, cols, cols};
  }

  template <typename T>
  T* Row(int64_t row) const {
    return static_cast<T*>(data) + row * stride;
  }

  // The first `count` rows, and the rows or columns [begin, begin + count).
  Tensor FirstRows(int64_t count) const { return {data, dtype, count, cols, stride}; }
  Tensor Rows(int64_t begin, int64_t count) const {
    return {static_cast<std::byte*>(data) + begin * stride * static_cast<int64_t>(SizeOf(dtype)),
            dtype, count, cols, stride};
  }
  Tensor Columns(int64_t begin, int64_t count) const {
    return {static_cast<std::byte*>(data) + begin * static_cast<int64_t>(SizeOf(dtype)), dtype,
            rows, count, stride};
  }
};

}  // namespace mobi

#endif  // MOBI_KERNELS_TENSOR_H_
