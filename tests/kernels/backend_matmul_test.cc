#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "backend_suite.h"
#include "kernels/cpu/reference_ops.h"

namespace mobi {
namespace {

class BackendMatmul : public BackendTest {
 protected:
  std::vector<int64_t> RandomSegments() {
    std::vector<int64_t> rows(Uniform(1, kMaxSegments));
    for (int64_t& count : rows) count = kTileRows * Uniform(1, 9);
    return rows;
  }

  std::vector<uint8_t> RandomLevels(size_t count) {
    std::vector<uint8_t> levels(count);
    for (uint8_t& level : levels) level = static_cast<uint8_t>(Uniform(1, kNumLevels));
    return levels;
  }

  Matrix RunSliced(const Matrix& x, const SlicedWeight& weight, const std::vector<uint8_t>& levels,
                   int64_t levels_stride) {
    const Tensor out =
        OnDevice(Matrix::Poisoned(activations(), x.rows, weight.rows, weight.rows + 16));
    backend().SlicedMatmul(OnDevice(x), weight, OnDevice(levels), levels_stride, out);
    return ToHost(out);
  }

  Matrix RunDense(const Matrix& x, Tensor weight, DType out_dtype) {
    const Tensor out = OnDevice(Matrix::Poisoned(out_dtype, x.rows, weight.rows));
    backend().DenseMatmul(OnDevice(x), weight, out);
    return ToHost(out);
  }
};

TEST_P(BackendMatmul, SlicedEqualsReferenceAtMixedLevels) {
  for (const int tokens : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 130}) {
    const int64_t cols = kGroupSize * Uniform(1, 20);
    const HostWeight weight = RandomWeight(RandomSegments(), cols);
    const Matrix x = Normal(activations(), tokens, cols, 1, cols + 8 * Uniform(0, 2));
    const int64_t stride = tokens + Uniform(0, 3);
    const std::vector<uint8_t> levels = RandomLevels(stride * weight.view.num_segments);

    const Matrix expected = Matrix::Poisoned(DType::kF32, tokens, weight.view.rows);
    reference::SlicedMatmul(x.view(), weight.view, levels.data(), stride, expected.view());
    const Matrix actual = RunSliced(x, OnDevice(weight), levels, stride);
    ExpectClose(actual, expected, ToleranceOf(Op::kSlicedMatmul, activations()),
                std::to_string(tokens) + " tokens");
  }
}

TEST_P(BackendMatmul, SlicedEqualsReferenceAtEachLevel) {
  for (int level = 1; level <= kNumLevels; ++level) {
    for (const int tokens : {1, 6, 40}) {
      const int64_t cols = kGroupSize * Uniform(1, 12);
      HostWeight weight = RandomWeight(RandomSegments(), cols);
      const Matrix x = Normal(activations(), tokens, cols);
      const std::vector<uint8_t> levels(tokens * weight.view.num_segments,
                                        static_cast<uint8_t>(level));
      const Matrix expected = Matrix::Poisoned(DType::kF32, tokens, weight.view.rows);
      reference::SlicedMatmul(x.view(), weight.view, levels.data(), tokens, expected.view());
      const Matrix actual = RunSliced(x, OnDevice(weight), levels, tokens);
      ExpectClose(actual, expected, ToleranceOf(Op::kSlicedMatmul, activations()),
                  std::to_string(tokens) + " tokens at level " + std::to_string(level));
    }
  }
}

// Inputs that are whole multiples of their group's largest / 32639 are not rounded on the CPU: what
// is left are the sums over groups, which are as exact as those of a dense product.
TEST_P(BackendMatmul, SlicedSumsExactlyInsideAGroup) {
  for (const int tokens : {1, 2, 7, 40}) {
    const int64_t cols = kGroupSize * Uniform(1, 20);
    const HostWeight weight = RandomWeight(RandomSegments(), cols);
    Matrix x = Matrix::Poisoned(activations(), tokens, cols);
    constexpr int kLargest = 32639;
    for (int t = 0; t < tokens; ++t) {
      for (int64_t begin = 0; begin < cols; begin += kGroupSize) {
        const float step = std::ldexp(1.0f, Uniform(-16, -12));
        const int largest = Uniform(0, kGroupSize - 1);
        const bool zeros = Uniform(0, 9) == 0;
        for (int i = 0; i < kGroupSize; ++i) {
          const int n = i == largest ? kLargest : Uniform(-kLargest, kLargest);
          x.set(t, begin + i, zeros ? 0 : step * static_cast<float>(n));
        }
      }
    }
    const std::vector<uint8_t> levels = RandomLevels(tokens * weight.view.num_segments);
    const Matrix expected = Matrix::Poisoned(DType::kF32, tokens, weight.view.rows);
    reference::SlicedMatmul(x.view(), weight.view, levels.data(), tokens, expected.view());
    ExpectClose(RunSliced(x, OnDevice(weight), levels, tokens), expected,
                ToleranceOf(Op::kMatmul, activations()), std::to_string(tokens) + " tokens");
  }
}

// A token with an input that is not finite has no finite result, and its neighbours keep theirs.
TEST_P(BackendMatmul, SlicedShowsInputsThatAreNotFinite) {
  if (activations() != DType::kF32) GTEST_SKIP() << "inputs are floats of 16 bits all the way";
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity}) {
    for (const int tokens : {1, 6, 13, 50}) {
      const int64_t cols = kGroupSize * Uniform(3, 9);
      const SlicedWeight weight = OnDevice(RandomWeight({64}, cols));
      Matrix x = Normal(activations(), tokens, cols);
      const int bad_token = Uniform(0, tokens - 1);
      const std::vector<uint8_t> levels = RandomLevels(tokens);
      const Matrix before = RunSliced(x, weight, levels, tokens);
      x.set(bad_token, Uniform(0, static_cast<int>(cols) - 1), bad);
      const Matrix after = RunSliced(x, weight, levels, tokens);
      for (int t = 0; t < tokens; ++t) {
        for (int64_t row = 0; row < weight.rows; ++row) {
          if (t == bad_token) {
            EXPECT_FALSE(std::isfinite(after.at(t, row))) << t << " " << row << " " << bad;
          } else {
            EXPECT_EQ(after.at(t, row), before.at(t, row)) << t << " " << row << " " << bad;
          }
        }
      }
    }
  }
}

// Inputs are rounded by their group's largest: neither a few large ones nor their size may cost the
// others their part.
TEST_P(BackendMatmul, SlicedTakesInputsOfAnySize) {
  const bool wide = activations() != DType::kF16;
  const float large = activations() == DType::kF32 ? 10 : 30;
  Tolerance tolerance = ToleranceOf(Op::kSlicedMatmul, activations());
  tolerance.scaled *= 4;  // the largest of a group are not 3, but 12 times the rms
  for (const float size : {wide ? 1e-30f : 1e-5f, 1e-3f, wide ? 1e28f : 10.0f}) {
    for (const int tokens : {1, 7, 40}) {
      const int64_t cols = kGroupSize * Uniform(8, 12);
      const HostWeight weight = RandomWeight({64}, cols);
      Matrix x = Normal(activations(), tokens, cols);
      for (int t = 0; t < tokens; ++t) {
        for (int64_t c = 0; c < cols; ++c) {
          x.set(t, c, x.at(t, c) * size * (c % 97 == 5 ? large : 1));
        }
      }
      const std::vector<uint8_t> levels = RandomLevels(tokens);
      const Matrix expected = Matrix::Poisoned(DType::kF32, tokens, weight.view.rows);
      reference::SlicedMatmul(x.view(), weight.view, levels.data(), tokens, expected.view());
      const Tensor out = OnDevice(Matrix::Poisoned(DType::kF32, tokens, weight.view.rows));
      backend().SlicedMatmul(OnDevice(x), OnDevice(weight), OnDevice(levels), tokens, out);
      ExpectClose(ToHost(out), expected, tolerance,
                  std::to_string(tokens) + " tokens of size " + std::to_string(size));
    }
  }
}

// Products inside a group are whole numbers, and sums over groups have one order: the bits are the
// same on every SIMD target that fuses multiplication and addition.
TEST_P(BackendMatmul, SlicedIsTheSameOnEverySimdTarget) {
  if (backend().name() != "cpu") GTEST_SKIP() << "not of this backend";
  const bool fuses = GetParam().name != "cpu_sse4" && GetParam().name != "cpu_no_simd";
  for (const int tokens : {1, 2, 5, 40}) {
    const int64_t cols = kGroupSize * Uniform(1, 20);
    const SlicedWeight weight = OnDevice(RandomWeight(RandomSegments(), cols));
    const Tensor x = OnDevice(Normal(activations(), tokens, cols));
    const uint8_t* levels = OnDevice(RandomLevels(tokens * weight.num_segments));
    const auto run = [&](Backend& cpu) {
      const Tensor out = OnDevice(Matrix::Poisoned(activations(), tokens, weight.rows));
      cpu.SlicedMatmul(x, weight, levels, tokens, out);
      return ToHost(out);
    };
    ASSERT_TRUE(GetParam().create().ok());  // sets the process's target
    const Matrix here = run(backend());
    const auto best = AllBackends().front().create();
    ASSERT_TRUE(best.ok()) << best.status();
    const Matrix there = run(**best);
    ExpectClose(here, there, Tolerance{2e-6, 2e-6}, std::to_string(tokens) + " tokens");
    if (fuses) ExpectSame(here, there, std::to_string(tokens) + " tokens");
  }
}

// Logits: fp32 results whatever the activations are, with nothing between two rows.
TEST_P(BackendMatmul, SlicedGivesFloats) {
  for (const int tokens : {1, 3, 20}) {
    const int64_t cols = kGroupSize * Uniform(1, 12);
    const HostWeight weight = RandomWeight({int64_t{kTileRows} * Uniform(20, 60)}, cols);
    const Matrix x = Normal(activations(), tokens, cols);
    const std::vector<uint8_t> levels = RandomLevels(tokens);
    const Matrix expected = Matrix::Poisoned(DType::kF32, tokens, weight.view.rows);
    reference::SlicedMatmul(x.view(), weight.view, levels.data(), tokens, expected.view());
    const Tensor out = OnDevice(Matrix::Poisoned(DType::kF32, tokens, weight.view.rows));
    backend().SlicedMatmul(OnDevice(x), OnDevice(weight), OnDevice(levels), tokens, out);
    ExpectClose(ToHost(out), expected, ToleranceOf(Op::kSlicedMatmul, activations()),
                std::to_string(tokens) + " tokens");
  }
}

// A token's row of the product: the same bits alone and in any company, whatever the others'
// levels.
TEST_P(BackendMatmul, SlicedIsBatchInvariant) {
  const std::vector<int64_t> segments = {96, 32, 48};
  for (const int64_t cols : {kGroupSize * 5, kGroupSize * 19}) {
    const SlicedWeight weight = OnDevice(RandomWeight(segments, cols));
    const Matrix x = Normal(activations(), 200, cols);
    const std::vector<uint8_t> levels = RandomLevels(x.rows * segments.size());
    const Matrix together = RunSliced(x, weight, levels, x.rows);
    for (const int count : {1, 2, 3, 5, 8, 16, 33, 97}) {
      const int first = Uniform(0, static_cast<int>(x.rows) - count);
      Matrix some = Matrix::Poisoned(x.dtype, count, cols);
      Matrix expected = Matrix::Poisoned(x.dtype, count, weight.rows);
      std::vector<uint8_t> some_levels(count * segments.size());
      for (int i = 0; i < count; ++i) {
        for (int64_t c = 0; c < cols; ++c) some.set(i, c, x.at(first + i, c));
        for (int64_t c = 0; c < weight.rows; ++c) expected.set(i, c, together.at(first + i, c));
        for (size_t s = 0; s < segments.size(); ++s) {
          some_levels[s * count + i] = levels[s * x.rows + first + i];
        }
      }
      ExpectSame(RunSliced(some, weight, some_levels, count), expected,
                 std::to_string(count) + " tokens from " + std::to_string(first));
    }
  }
}

// Inside a step, long prompts may take another kernel: all are right, and the other tokens' bits
// are those of the op on its own. Stride 0: one level of a token for all segments.
TEST_P(BackendMatmul, SlicedInAStepWithLongPrompts) {
  for (const int num_short : {0, 1, 7, 40}) {
    const int tokens = num_short + Uniform(1, 150), stride = num_short % 2 == 0 ? tokens : 0;
    const int64_t cols = kGroupSize * Uniform(1, 20);
    const HostWeight host = RandomWeight(RandomSegments(), cols);
    const SlicedWeight weight = OnDevice(host);
    const Matrix x = Normal(activations(), tokens, cols);
    const std::vector<uint8_t> levels = RandomLevels(tokens * host.view.num_segments);
    const Tensor in = OnDevice(x);
    const uint8_t* device_levels = OnDevice(levels);
    const Tensor out = OnDevice(Matrix::Poisoned(activations(), tokens, weight.rows));
    const StepKey key{.num_tokens = tokens, .num_seqs = num_short + 1, .num_short = num_short};
    backend().RunStep(key, [&] { backend().SlicedMatmul(in, weight, device_levels, stride, out); });

    const Matrix expected = Matrix::Poisoned(DType::kF32, tokens, weight.rows);
    reference::SlicedMatmul(x.view(), host.view, levels.data(), stride, expected.view());
    ExpectClose(ToHost(out), expected, ToleranceOf(Op::kLongPrompt, activations()),
                std::to_string(num_short) + " short of " + std::to_string(tokens));
    if (num_short == 0) continue;
    const Tensor alone = OnDevice(Matrix::Poisoned(activations(), num_short, weight.rows));
    backend().SlicedMatmul(in.FirstRows(num_short), weight, device_levels, stride, alone);
    ExpectSame(ToHost(out.FirstRows(num_short)), ToHost(alone), "short");
  }
}

TEST_P(BackendMatmul, DenseEqualsReference) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int tokens : {1, 2, 3, 5, 8, 17, 33, 70}) {
      const int64_t cols = 8 * Uniform(1, 70), rows = Uniform(1, 150);
      const Matrix weight = Normal(dtype, rows, cols);
      const Matrix x = Normal(activations(), tokens, cols, 1, cols + 8 * Uniform(0, 2));
      const Matrix expected = Matrix::Poisoned(DType::kF32, tokens, rows);
      reference::DenseMatmul(x.view(), weight.view(), expected.view());
      for (const DType out : {activations(), DType::kF32}) {
        const Matrix actual = RunDense(x, OnDevice(weight), out);
        // A kernel may bring weights of another dtype to the activations' first.
        const DType rounded = dtype == activations() ? out : activations();
        ExpectClose(actual, expected, ToleranceOf(Op::kMatmul, rounded),
                    std::to_string(rows) + "x" + std::to_string(cols) + ", " +
                        std::to_string(tokens) + " tokens, " + std::string(Name(dtype)));
      }
    }
  }
}

TEST_P(BackendMatmul, DenseIsBatchInvariant) {
  const int64_t cols = 328, rows = 77;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const Tensor weight = OnDevice(Normal(dtype, rows, cols));
    const Matrix x = Normal(activations(), 100, cols);
    const Matrix together = RunDense(x, weight, DType::kF32);
    for (const int count : {1, 2, 4, 7, 16, 33}) {
      const int first = Uniform(0, static_cast<int>(x.rows) - count);
      Matrix some = Matrix::Poisoned(x.dtype, count, cols);
      Matrix expected = Matrix::Poisoned(DType::kF32, count, rows);
      for (int i = 0; i < count; ++i) {
        for (int64_t c = 0; c < cols; ++c) some.set(i, c, x.at(first + i, c));
        for (int64_t c = 0; c < rows; ++c) expected.set(i, c, together.at(first + i, c));
      }
      ExpectSame(RunDense(some, weight, DType::kF32), expected,
                 std::to_string(count) + " tokens from " + std::to_string(first));
    }
  }
}

MOBI_BACKEND_SUITE(BackendMatmul);

}  // namespace
}  // namespace mobi
