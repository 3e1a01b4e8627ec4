// One suite for every backend: the fixture of the backend_*_test.cc files. A test makes random host
// inputs, hands the same rounded values to the scalar reference and to the backend under test,
// and compares within the one tolerance table below. Outputs are poisoned (NaN) before a run.
// A further backend joins by one line in AllBackends(); one that this machine lacks is skipped with
// its reason.
#ifndef MOBI_TESTS_KERNELS_BACKEND_SUITE_H_
#define MOBI_TESTS_KERNELS_BACKEND_SUITE_H_

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "gtest/gtest.h"
#include "kernels/backend.h"
#include "kernels/bit_slice.h"
#include "kernels/sliced_weight.h"

namespace mobi {

struct BackendParam {
  std::string name;
  std::function<absl::StatusOr<std::unique_ptr<Backend>>()> create;
};
void PrintTo(const BackendParam& param, std::ostream* out);
std::vector<BackendParam> AllBackends();

// |actual - expected| <= relative * |expected| + scaled * rms(expected).
struct Tolerance {
  double relative;
  double scaled;
};

enum class Op {
  kElementwise,
  kMatmul,
  kSlicedMatmul,
  kLongPrompt,
  kAttention,
  kLargeScores,
  kLogprob
};
Tolerance ToleranceOf(Op op, DType activations);

// A host matrix in any dtype, rows `stride` elements apart; what lies between is poison.
struct Matrix {
  std::vector<std::byte> bytes;
  DType dtype = DType::kF32;
  int64_t rows = 0, cols = 0, stride = 0;

  static Matrix Poisoned(DType dtype, int64_t rows, int64_t cols, int64_t stride = 0);
  Tensor view() const;
  float at(int64_t row, int64_t col) const;
  void set(int64_t row, int64_t col, float value);
  Matrix As(DType other) const;  // the same values, rounded
};

// A sliced weight that owns its host memory.
struct HostWeight {
  std::array<std::vector<uint8_t>, kNumSlices> slices;
  std::array<std::vector<uint16_t>, kNumLevels> scales;
  SlicedWeight view;
};

class BackendTest : public testing::TestWithParam<BackendParam> {
 protected:
  void SetUp() override;
  void TearDown() override;

  Backend& backend() { return *backend_; }
  DType activations() const { return backend_->activation_dtype(); }

  // Random inputs. Normal(0, deviation), uniform integers in [low, high].
  Matrix Normal(DType dtype, int64_t rows, int64_t cols, float deviation = 1, int64_t stride = 0);
  int Uniform(int low, int high);
  // 1 to 3 segments of random sizes, or one for each of `segment_rows`.
  HostWeight RandomWeight(const std::vector<int64_t>& segment_rows, int64_t cols);

  // Copies to the backend's memory; the copy lives until the test ends.
  template <typename T>
  T* OnDevice(const std::vector<T>& values) {
    return static_cast<T*>(Copy(values.data(), values.size() * sizeof(T)));
  }
  Tensor OnDevice(const Matrix& matrix);
  SlicedWeight OnDevice(const HostWeight& weight);

  // Back to the host, after everything enqueued.
  template <typename T>
  std::vector<T> ToHost(const T* device, size_t count) {
    std::vector<T> values(count);
    backend_->Download(device, count * sizeof(T), values.data());
    const absl::Status status = backend_->Synchronize();
    EXPECT_TRUE(status.ok()) << status;
    return values;
  }
  Matrix ToHost(Tensor device);

  void* Copy(const void* host, size_t bytes);

  std::mt19937 random_;

 private:
  std::unique_ptr<Backend> backend_;
  std::vector<Buffer> buffers_;
};

// Expects every element within the tolerance; names the worst.
void ExpectClose(const Matrix& actual, const Matrix& expected, Tolerance tolerance,
                 const std::string& what);
// Expects equal bytes in every element.
void ExpectSame(const Matrix& actual, const Matrix& expected, const std::string& what);

#define MOBI_BACKEND_SUITE(suite)                                             \
  INSTANTIATE_TEST_SUITE_P(Backends, suite, testing::ValuesIn(AllBackends()), \
                           [](const auto& info) { return info.param.name; })

}  // namespace mobi

#endif  // MOBI_TESTS_KERNELS_BACKEND_SUITE_H_
