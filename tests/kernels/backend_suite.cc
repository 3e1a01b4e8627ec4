#include "backend_suite.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "hwy/targets.h"
#include "kernels/numeric.h"

namespace mobi {

void PrintTo(const BackendParam& param, std::ostream* out) { *out << param.name; }

namespace {

// The CPU backend on some of this machine's SIMD targets; 0: the best it has. Which target runs is
// a setting of the process, so every CPU backend of the suite sets it.
absl::StatusOr<std::unique_ptr<Backend>> CreateCpu(int64_t simd_targets, int num_threads) {
  hwy::SetSupportedTargetsForTest(0);
  if (simd_targets != 0 && (hwy::SupportedTargets() & simd_targets) == 0) {
    return absl::UnavailableError("this machine has no such SIMD target");
  }
  hwy::SetSupportedTargetsForTest(simd_targets);
  return CreateCpuBackend({.num_threads = num_threads});
}

absl::StatusOr<std::unique_ptr<Backend>> CreateCuda(DType activations) {
  return CreateCudaBackend({.activation_dtype = activations});
}

}  // namespace

std::vector<BackendParam> AllBackends() {
  return {
    {"cpu_1_thread", [] { return CreateCpu(0, 1); }},
        {"cpu_2_threads", [] { return CreateCpu(0, 2); }},
        {"cpu_3_threads", [] { return CreateCpu(0, 3); }},
#if HWY_ARCH_X86
        {"cpu_avx512", [] { return CreateCpu(HWY_AVX3, 1); }},
        {"cpu_avx2", [] { return CreateCpu(HWY_AVX2, 1); }},
        {"cpu_sse4", [] { return CreateCpu(HWY_SSE4, 1); }},
#endif
        {"cpu_no_simd", [] { return CreateCpu(HWY_SCALAR | HWY_EMU128, 1); }},
        {"cuda_f16", [] { return CreateCuda(DType::kF16); }},
        {"cuda_bf16", [] { return CreateCuda(DType::kBF16); }},
  };
}

Tolerance ToleranceOf(Op op, DType activations) {
  struct Entry {
    Tolerance f32, f16, bf16;
  };
  // 16-bit results carry the rounding of the stored value (2^-11, 2^-8 relative) and, in attention
  // and after a rotation, that of intermediate values that a kernel may keep in 16 bits.
  static constexpr Entry kTable[] = {
      /* kElementwise */ {{2e-6, 2e-6}, {1e-3, 1e-3}, {8e-3, 8e-3}},
      /* kMatmul */ {{2e-6, 1e-5}, {1e-3, 1e-3}, {8e-3, 8e-3}},
      /* kSlicedMatmul: the CPU backend rounds inputs by up to 1.6e-5 of the largest of their group,
         which of normal inputs is about 3 times their rms; the worst of many outputs is 5 times as
         far off as most */
      {{2e-6, 2e-4}, {1e-3, 1e-3}, {8e-3, 8e-3}},
      /* kLongPrompt: the same, but a kernel may keep its weights in 16 bits, too */
      {{2e-6, 2e-4}, {2e-3, 2e-3}, {1.6e-2, 1.6e-2}},
      /* kAttention */ {{2e-6, 1e-5}, {2e-3, 2e-3}, {1.6e-2, 1.6e-2}},
      /* kLargeScores: of several hundred, rounded in fp32 before exp */
      {{1e-4, 1e-4}, {2e-3, 2e-3}, {1.6e-2, 1.6e-2}},
      /* kLogprob: always computed from fp32 logits */ {{5e-6, 5e-6}, {5e-6, 5e-6}, {5e-6, 5e-6}},
  };
  const Entry& entry = kTable[static_cast<int>(op)];
  if (activations == DType::kF16) return entry.f16;
  return activations == DType::kBF16 ? entry.bf16 : entry.f32;
}

Matrix Matrix::Poisoned(DType dtype, int64_t rows, int64_t cols, int64_t stride) {
  Matrix matrix;
  matrix.dtype = dtype;
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.stride = std::max(cols, stride);
  matrix.bytes.assign(rows * matrix.stride * SizeOf(dtype),
                      std::byte{0xFF});  // a NaN in each dtype
  return matrix;
}

Tensor Matrix::view() const {
  return {const_cast<std::byte*>(bytes.data()), dtype, rows, cols, stride};
}

float Matrix::at(int64_t row, int64_t col) const {
  const Tensor t = view();
  if (dtype == DType::kF16) return HalfToFloat(t.Row<uint16_t>(row)[col]);
  if (dtype == DType::kBF16) return BFloat16ToFloat(t.Row<uint16_t>(row)[col]);
  return t.Row<float>(row)[col];
}

void Matrix::set(int64_t row, int64_t col, float value) {
  const Tensor t = view();
  if (dtype == DType::kF16) {
    t.Row<uint16_t>(row)[col] = FloatToHalf(value);
  } else if (dtype == DType::kBF16) {
    t.Row<uint16_t>(row)[col] = FloatToBFloat16(value);
  } else {
    t.Row<float>(row)[col] = value;
  }
}

Matrix Matrix::As(DType other) const {
  Matrix copy = Poisoned(other, rows, cols, stride);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) copy.set(r, c, at(r, c));
  }
  return copy;
}

void BackendTest::SetUp() {
  absl::StatusOr<std::unique_ptr<Backend>> backend = GetParam().create();
  if (!backend.ok()) {
    GTEST_SKIP() << GetParam().name << " is not tested here: " << backend.status();
  }
  backend_ = *std::move(backend);
  random_.seed(std::hash<std::string>{}(
      testing::UnitTest::GetInstance()->current_test_info()->test_suite_name()));
}

void BackendTest::TearDown() { buffers_.clear(); }

Matrix BackendTest::Normal(DType dtype, int64_t rows, int64_t cols, float deviation,
                           int64_t stride) {
  Matrix matrix = Matrix::Poisoned(dtype, rows, cols, stride);
  std::normal_distribution<float> normal(0, deviation);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) matrix.set(r, c, normal(random_));
  }
  return matrix;
}

int BackendTest::Uniform(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random_);
}

HostWeight BackendTest::RandomWeight(const std::vector<int64_t>& segment_rows, int64_t cols) {
  HostWeight weight;
  SlicedWeight& view = weight.view;
  view.cols = cols;
  view.num_segments = static_cast<int>(segment_rows.size());
  for (size_t s = 0; s < segment_rows.size(); ++s) {
    view.rows += segment_rows[s];
    view.segment_end[s] = view.rows;
  }
  for (int s = 0; s < kNumSlices; ++s) {
    weight.slices[s].resize(SliceBytes(view.rows, cols));
    for (uint8_t& byte : weight.slices[s]) byte = static_cast<uint8_t>(random_());
    view.slices[s] = weight.slices[s].data();
  }
  std::uniform_real_distribution<float> range(0.5f, 2.0f), offset(-1.2f, -0.2f);
  for (int k = 0; k < kNumLevels; ++k) {
    weight.scales[k].resize(ScaleBytes(view.rows, cols) / 2);
    for (size_t i = 0; i < weight.scales[k].size(); i += 2) {
      weight.scales[k][i] = FloatToHalf(range(random_));
      weight.scales[k][i + 1] = FloatToHalf(offset(random_));
    }
    view.scales[k] = weight.scales[k].data();
  }
  return weight;
}

void* BackendTest::Copy(const void* host, size_t bytes) {
  absl::StatusOr<Buffer> buffer = backend_->Allocate(bytes, "test data");
  if (!buffer.ok()) {
    ADD_FAILURE() << buffer.status();
    return nullptr;
  }
  backend_->Upload(host, bytes, buffer->data());
  buffers_.push_back(*std::move(buffer));
  return buffers_.back().data();
}

Tensor BackendTest::OnDevice(const Matrix& matrix) {
  Tensor tensor = matrix.view();
  tensor.data = Copy(matrix.bytes.data(), matrix.bytes.size());
  return tensor;
}

SlicedWeight BackendTest::OnDevice(const HostWeight& weight) {
  SlicedWeight view = weight.view;
  for (int s = 0; s < kNumSlices; ++s) view.slices[s] = OnDevice(weight.slices[s]);
  for (int k = 0; k < kNumLevels; ++k) view.scales[k] = OnDevice(weight.scales[k]);
  return view;
}

Matrix BackendTest::ToHost(Tensor device) {
  Matrix matrix = Matrix::Poisoned(device.dtype, device.rows, device.cols, device.stride);
  matrix.bytes = ToHost(static_cast<const std::byte*>(device.data), matrix.bytes.size());
  return matrix;
}

void ExpectClose(const Matrix& actual, const Matrix& expected, Tolerance tolerance,
                 const std::string& what) {
  ASSERT_EQ(actual.rows, expected.rows) << what;
  ASSERT_EQ(actual.cols, expected.cols) << what;
  double squares = 0;
  for (int64_t r = 0; r < expected.rows; ++r) {
    for (int64_t c = 0; c < expected.cols; ++c) {
      squares += double{expected.at(r, c)} * expected.at(r, c);
    }
  }
  const double rms = std::sqrt(squares / static_cast<double>(expected.rows * expected.cols));
  double worst = 0;
  std::string where;
  for (int64_t r = 0; r < expected.rows; ++r) {
    for (int64_t c = 0; c < expected.cols; ++c) {
      const double want = expected.at(r, c), got = actual.at(r, c);
      const double allowed = tolerance.relative * std::abs(want) + tolerance.scaled * rms;
      const double error = std::abs(got - want);
      const double ratio = error <= 0 ? 0 : error / allowed;
      if (ratio <= worst) continue;  // false for NaN
      worst = std::isnan(ratio) ? std::numeric_limits<double>::infinity() : ratio;
      where = "row " + std::to_string(r) + " col " + std::to_string(c) + ": " +
              std::to_string(got) + " instead of " + std::to_string(want);
    }
  }
  EXPECT_LE(worst, 1) << what << ": " << worst << " times the tolerance at " << where;
}

void ExpectSame(const Matrix& actual, const Matrix& expected, const std::string& what) {
  ASSERT_EQ(actual.dtype, expected.dtype) << what;
  ASSERT_EQ(actual.rows, expected.rows) << what;
  ASSERT_EQ(actual.cols, expected.cols) << what;
  const size_t row_bytes = actual.cols * SizeOf(actual.dtype);
  for (int64_t r = 0; r < actual.rows; ++r) {
    const auto* got = actual.view().Row<std::byte>(0) + r * actual.stride * SizeOf(actual.dtype);
    const auto* want =
        expected.view().Row<std::byte>(0) + r * expected.stride * SizeOf(expected.dtype);
    ASSERT_EQ(std::memcmp(got, want, row_bytes), 0) << what << ": row " << r << " differs";
  }
}

}  // namespace mobi
