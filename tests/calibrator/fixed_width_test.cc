// The baselines: what is stored is exactly the fixed-width values, and each beats the one before it
// on the loss it minimises.
#include "calibrator/fixed_width.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "calibrator/linear_fit.h"
#include "calibrator/statistics.h"
#include "tests/calibrator/random_matrix.h"

namespace mobi {
namespace {

constexpr int64_t kRows = 32, kCols = 256;

FittingProblem MakeProblem(uint64_t seed) {
  FittingProblem problem;
  problem.weight = RandomMatrix(kRows, kCols, seed, 0.05f);
  const Matrix inputs = CorrelatedInputs(2000, kCols, seed + 10);
  StreamStatistics statistics(kCols, 0);
  statistics.Add(inputs);
  auto stream = statistics.Problem(problem.weight, 1e-2);
  EXPECT_TRUE(stream.ok()) << stream.status();
  problem.streams.push_back(*std::move(stream));
  problem.level_weights = {1, 1, 1, 1};
  for (int64_t j = 0; j < kCols; ++j) {
    problem.importance.push_back(problem.streams[0].hessian(j, j));
  }
  return problem;
}

TEST(FixedWidthTest, LevelsThatHoldTheCodeReadTheSameValues) {
  const FittingProblem problem = MakeProblem(1);
  for (int bits = 2; bits <= 8; ++bits) {
    const auto weight = FitFixedWidth(problem, {FixedMethod::kRtn, bits}, 1);
    ASSERT_TRUE(weight.ok());
    const Matrix all = Dequantize(*weight, kNumLevels);
    std::set<float> values;
    for (int64_t j = 0; j < kGroupSize; ++j) values.insert(all(0, j));
    EXPECT_LE(values.size(), 1u << bits);
    for (int level = (bits + 1) / 2; level < kNumLevels; ++level) {
      const Matrix some = Dequantize(*weight, level);
      for (int64_t i = 0; i < all.size(); ++i) {
        EXPECT_NEAR(some.data()[i], all.data()[i], 2e-3f * std::abs(all.data()[i]) + 2e-4f);
      }
    }
  }
}

TEST(FixedWidthTest, RoundToNearestIsWithinHalfAStepAndKeepsZero) {
  FittingProblem problem = MakeProblem(2);
  for (int64_t row = 0; row < kRows; ++row) problem.weight(row, 7) = 0;
  const auto weight = FitFixedWidth(problem, {FixedMethod::kRtn, 4}, 1);
  ASSERT_TRUE(weight.ok());
  const Matrix value = Dequantize(*weight, kNumLevels);
  for (int64_t row = 0; row < kRows; ++row) {
    const float* w = problem.weight.Row(row);
    const auto [min, max] = std::minmax_element(w, w + kGroupSize);
    const float step = (*max - *min) / 15;
    EXPECT_NEAR(value(row, 7), 0, 0.02f * step);
    // An integer zero point can move the ends of the range by half a step.
    for (int64_t j = 0; j < kGroupSize; ++j)
      EXPECT_LT(std::abs(value(row, j) - w[j]), 1.02f * step);
  }
}

TEST(FixedWidthTest, LearningBeatsRoundingAndFeedbackBeatsBoth) {
  const FittingProblem problem = MakeProblem(3);
  for (const int bits : {2, 3, 4}) {
    std::array<double, 3> loss{};
    int i = 0;
    for (const FixedMethod method : {FixedMethod::kRtn, FixedMethod::kLwc, FixedMethod::kGptq}) {
      const auto weight = FitFixedWidth(problem, {method, bits}, 2);
      ASSERT_TRUE(weight.ok());
      loss[i++] = LevelLosses(problem, *weight, 2)[kNumLevels - 1];
    }
    EXPECT_LT(loss[1], 0.9 * loss[0]) << bits;
    EXPECT_LT(loss[2], 0.9 * loss[1]) << bits;
  }
}

TEST(FixedWidthTest, DeadAndConstantGroupsAreKept) {
  FittingProblem problem = MakeProblem(4);
  for (int64_t j = 0; j < kCols; ++j) problem.weight(0, j) = 0, problem.weight(1, j) = 0.375f;
  for (const FixedMethod method : {FixedMethod::kRtn, FixedMethod::kLwc, FixedMethod::kGptq}) {
    const auto weight = FitFixedWidth(problem, {method, 3}, 1);
    ASSERT_TRUE(weight.ok());
    const Matrix value = Dequantize(*weight, kNumLevels);
    for (int64_t j = 0; j < kCols; ++j) {
      EXPECT_NEAR(value(0, j), 0, 1e-5);
      EXPECT_NEAR(value(1, j), 0.375f, 2e-3);
    }
  }
}

}  // namespace
}  // namespace mobi
