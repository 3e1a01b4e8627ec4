// The pieces of fitting one linear: each may only lower the loss it says it lowers.
#include "calibrator/linear_fit.h"

#include <gtest/gtest.h>

#include <cmath>

#include "calibrator/code_descent.h"
#include "calibrator/code_search.h"
#include "calibrator/joint_codes.h"
#include "calibrator/level_fit.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/statistics.h"
#include "kernels/numeric.h"
#include "tests/calibrator/random_matrix.h"

namespace mobi {
namespace {

constexpr int64_t kRows = 24, kCols = 256;

FittingProblem MakeProblem(uint64_t seed) {
  FittingProblem problem;
  problem.weight = RandomMatrix(kRows, kCols, seed, 0.05f);
  const Matrix float_inputs = CorrelatedInputs(2000, kCols, seed + 10);
  for (int s = 0; s < 2; ++s) {
    Matrix inputs = float_inputs;
    const Matrix noise = RandomMatrix(2000, kCols, seed + 20 + s, s == 0 ? 0.4f : 0.05f);
    for (int64_t i = 0; i < inputs.size(); ++i) inputs.data()[i] += noise.data()[i];
    StreamStatistics statistics(kCols, 0);
    statistics.Add(inputs, float_inputs);
    auto stream = statistics.Problem(problem.weight, 1e-2);
    EXPECT_TRUE(stream.ok()) << stream.status();
    problem.streams.push_back(*std::move(stream));
  }
  problem.stream_of_level = {0, 1, 1, 1};
  problem.level_weights = {1, 4, 8, 16};
  for (int64_t j = 0; j < kCols; ++j) {
    problem.importance.push_back(problem.streams[1].hessian(j, j));
  }
  return problem;
}

double TotalLoss(const FittingProblem& problem, const NestedWeight& weight) {
  const auto losses = LevelLosses(problem, weight, 1);
  double total = 0;
  for (int k = 0; k < kNumLevels; ++k) total += problem.level_weights[k] * losses[k];
  return total;
}

NestedWeight BaseFit(const FittingProblem& problem) {
  NestedWeight weight(kRows, kCols);
  FitBase(problem, BaseFitOptions(), 0, kRows, weight);
  return weight;
}

TEST(CodeSearchTest, FindsTheBestOfAll256Codes) {
  std::mt19937_64 random(3);
  std::normal_distribution<float> normal;
  for (int trial = 0; trial < 2000; ++trial) {
    LevelGrids grids;
    float target[kNumLevels], weight[kNumLevels];
    const float range = std::exp(normal(random)), offset = normal(random);
    for (int level = 1; level <= kNumLevels; ++level) {
      const LevelScale scale{range * (1 + 0.2f * normal(random)), offset + 0.1f * normal(random)};
      grids[level - 1] = GridOf(scale, level);
      target[level - 1] = offset + range * (0.5f + 0.4f * normal(random));
      weight[level - 1] = std::exp(2 * normal(random));
    }
    const auto cost = [&](int code) {
      double sum = 0;
      for (int k = 0; k < kNumLevels; ++k) {
        sum += weight[k] * std::pow(ValueAt(grids, code, k + 1) - target[k], 2);
      }
      return sum;
    };
    double best = cost(0);
    for (int code = 1; code < 256; ++code) best = std::min(best, cost(code));
    const int found = NearestCode(grids, target, weight, static_cast<int>(random() % 256));
    EXPECT_NEAR(cost(found), best, 1e-5 * best + 1e-7);
  }
}

TEST(LevelFitTest, PairIsTheLeastSquaresOptimumAndHalfExact) {
  const Matrix target = RandomMatrix(1, kGroupSize, 5, 0.1f);
  std::mt19937_64 random(6);
  std::vector<float> importance;
  uint8_t codes[kGroupSize];
  for (int j = 0; j < kGroupSize; ++j) {
    importance.push_back(0.1f + static_cast<float>(random() % 100));
    codes[j] = static_cast<uint8_t>(EncodeWeight(target(0, j), -0.25f, 0.5f));
  }
  for (int level = 1; level <= kNumLevels; ++level) {
    const ScaleFit fit = FitScale(target.data(), importance.data(), codes, level);
    const auto error = [&](double range, double offset) {
      double sum = 0;
      for (int j = 0; j < kGroupSize; ++j) {
        const double w = offset + range * FractionAtLevel(codes[j], level);
        sum += importance[j] * std::pow(w - target(0, j), 2);
      }
      return sum;
    };
    EXPECT_EQ(fit.scale.range, HalfToFloat(FloatToHalf(fit.scale.range)));
    EXPECT_EQ(fit.scale.offset, HalfToFloat(FloatToHalf(fit.scale.offset)));
    const double here = error(fit.scale.range, fit.scale.offset);
    EXPECT_NEAR(here, fit.error, 0.02 * fit.error + 1e-4);
    for (const double step : {-1e-2, 1e-2}) {
      EXPECT_GT(error(fit.scale.range + step, fit.scale.offset), here);
      EXPECT_GT(error(fit.scale.range, fit.scale.offset + step), here);
    }
  }
}

TEST(BaseFitTest, NarrowRangesWhenLevelOneCountsAndWideOnesWhenLevelFourDoes) {
  const FittingProblem problem = MakeProblem(1);
  BaseFitOptions sharp, wide;
  sharp.level_weights = {1, 0, 0, 0};
  wide.level_weights = {0, 0, 0, 1};
  NestedWeight a(kRows, kCols), b(kRows, kCols);
  FitBase(problem, sharp, 0, kRows, a);
  FitBase(problem, wide, 0, kRows, b);
  double error_a[kNumLevels] = {}, error_b[kNumLevels] = {};
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t j = 0; j < kCols; ++j) {
      for (int level = 1; level <= kNumLevels; ++level) {
        const auto square = [&](const NestedWeight& w) {
          const float value = ValueAt(GridsOf(w, row, j / kGroupSize), w.Codes(row)[j], level);
          return problem.importance[j] * std::pow(value - problem.weight(row, j), 2);
        };
        error_a[level - 1] += square(a);
        error_b[level - 1] += square(b);
      }
    }
  }
  EXPECT_LT(error_a[0], 0.95 * error_b[0]);
  EXPECT_LT(error_b[3], 0.5 * error_a[3]);
}

TEST(BaseFitTest, ConstantAndZeroGroupsAreExact) {
  FittingProblem problem = MakeProblem(2);
  for (int64_t j = 0; j < kCols; ++j) problem.weight(0, j) = 0, problem.weight(1, j) = 0.375f;
  const NestedWeight weight = BaseFit(problem);
  for (int level = 1; level <= kNumLevels; ++level) {
    const Matrix value = Dequantize(weight, level);
    for (int64_t j = 0; j < kCols; ++j) {
      EXPECT_NEAR(value(0, j), 0, 1e-6);
      EXPECT_NEAR(value(1, j), 0.375f, 1e-3);
    }
  }
}

TEST(JointCodesTest, FeedbackLowersTheWeightedLoss) {
  const FittingProblem problem = MakeProblem(3);
  NestedWeight weight = BaseFit(problem);
  const double before = TotalLoss(problem, weight);
  const auto plan = PlanFeedback(problem);
  ASSERT_TRUE(plan.ok()) << plan.status();
  ChooseJointCodes(problem, *plan, 0, kRows, weight);
  EXPECT_LT(TotalLoss(problem, weight), 0.8 * before);
}

TEST(CodeDescentTest, EveryPassLowersTheLossAndKeepsGradientsCurrent) {
  const FittingProblem problem = MakeProblem(4);
  NestedWeight weight = BaseFit(problem);
  LevelGradients gradients = Gradients(problem, weight, 0, kRows);
  double last = TotalLoss(problem, weight);
  for (int pass = 0; pass < 4; ++pass) {
    const int64_t changed = DescendCodes(problem, 0, kRows, gradients, weight);
    const double now = TotalLoss(problem, weight);
    EXPECT_LE(now, last * (1 + 1e-5)) << "pass " << pass << ", " << changed << " changed";
    if (pass == 0) {
      EXPECT_LT(now, 0.8 * last);
    }
    last = now;
    const LevelGradients fresh = Gradients(problem, weight, 0, kRows);
    for (int k = 0; k < kNumLevels; ++k) {
      const ConstMatrixView expected = fresh.Fetch(k + 1), kept = gradients.Fetch(k + 1);
      double error = 0, norm = 0;
      for (int64_t i = 0; i < expected.rows * expected.cols; ++i) {
        error += std::pow(expected.data[i] - kept.data[i], 2);
        norm += std::pow(expected.data[i], 2);
      }
      EXPECT_LT(error, 1e-6 * norm) << "level " << k + 1;
    }
  }
}

TEST(LevelFitTest, FullHessianRefitLowersEveryLevel) {
  const FittingProblem problem = MakeProblem(5);
  NestedWeight weight = BaseFit(problem);
  const auto before = LevelLosses(problem, weight, 1);
  const LevelGradients gradients = Gradients(problem, weight, 0, kRows);
  for (int level = 1; level <= kNumLevels; ++level) {
    const Matrix& hessian = problem.stream(level).hessian;
    RefitLevel(hessian, GroupSums(hessian), level, 0, gradients.Fetch(level), 1e-4, weight);
  }
  const auto after = LevelLosses(problem, weight, 1);
  for (int k = 0; k < kNumLevels; ++k) EXPECT_LT(after[k], before[k]) << "level " << k + 1;
  EXPECT_LT(after[0], 0.9 * before[0]);
}

TEST(LinearFitTest, DoesNotDependOnTheNumberOfThreads) {
  const FittingProblem problem = MakeProblem(6);
  const auto one = FitLinear(problem, LinearFitOptions(), 1);
  const auto two = FitLinear(problem, LinearFitOptions(), 2);
  ASSERT_TRUE(one.ok() && two.ok());
  EXPECT_EQ(one->codes, two->codes);
}

TEST(LinearFitTest, LevelsImproveOnEachOther) {
  const FittingProblem problem = MakeProblem(7);
  const auto fit = FitLinear(problem, LinearFitOptions(), 2);
  ASSERT_TRUE(fit.ok()) << fit.status();
  const auto losses = LevelLosses(problem, *fit, 2);
  EXPECT_LT(losses[1], 0.3 * losses[0]);
  EXPECT_LT(losses[2], 0.5 * losses[1]);
  EXPECT_LT(losses[3], losses[2]);
}

TEST(StatisticsTest, TargetMapsTheStreamsInputsToTheFloatOutput) {
  const Matrix weight = RandomMatrix(8, 128, 1);
  const Matrix float_inputs = RandomMatrix(4000, 128, 2);
  Matrix inputs = float_inputs;
  for (int64_t i = 0; i < inputs.size(); ++i) inputs.data()[i] *= 0.5f;
  StreamStatistics statistics(128, 0);
  statistics.Add(inputs, float_inputs);
  const auto stream = statistics.Problem(weight, 1e-6);
  ASSERT_TRUE(stream.ok()) << stream.status();
  for (int64_t i = 0; i < weight.size(); ++i) {
    EXPECT_NEAR(stream->target.data()[i], 2 * weight.data()[i], 1e-2);
  }
}

TEST(StatisticsTest, ResidualTargetIsWhatTheOutputShouldBe) {
  const Matrix weight = RandomMatrix(8, 128, 1), inputs = RandomMatrix(4000, 128, 2);
  // The output wanted of these inputs is that of other weights.
  const Matrix other = RandomMatrix(8, 128, 3);
  Matrix wanted(4000, 8);
  MultiplyTransposed(inputs, other, wanted);
  StreamStatistics whole(128, 8), first(128, 8), second(128, 8);
  whole.AddWanted(inputs, wanted);
  first.AddWanted(ConstMatrixView(inputs).Rows(0, 1500), ConstMatrixView(wanted).Rows(0, 1500));
  second.AddWanted(ConstMatrixView(inputs).Rows(1500, 2500),
                   ConstMatrixView(wanted).Rows(1500, 2500));
  first.Add(second);
  EXPECT_EQ(first.num_tokens(), 4000);
  const auto stream = whole.Problem(weight, 1e-6), parts = first.Problem(weight, 1e-6);
  ASSERT_TRUE(stream.ok() && parts.ok());
  for (int64_t i = 0; i < weight.size(); ++i) {
    EXPECT_NEAR(stream->target.data()[i], other.data()[i], 1e-3);
    EXPECT_NEAR(parts->target.data()[i], stream->target.data()[i], 1e-4);
  }
}

TEST(StatisticsTest, FloatInputsAskForTheFloatWeights) {
  const Matrix weight = RandomMatrix(8, 128, 1);
  StreamStatistics statistics(128, 0);
  statistics.Add(RandomMatrix(300, 128, 2));
  const auto stream = statistics.Problem(weight, 1e-2);
  ASSERT_TRUE(stream.ok());
  for (int64_t i = 0; i < weight.size(); ++i) {
    EXPECT_EQ(stream->target.data()[i], weight.data()[i]);
  }
}

TEST(StatisticsTest, DeadChannelsKeepTheFloatWeights) {
  const Matrix weight = RandomMatrix(4, 128, 3);
  Matrix inputs = RandomMatrix(500, 128, 4);
  for (int64_t t = 0; t < 500; ++t) inputs(t, 17) = 0;
  StreamStatistics statistics(128, 0);
  statistics.Add(inputs, inputs);
  const auto stream = statistics.Problem(weight, 1e-3);
  ASSERT_TRUE(stream.ok()) << stream.status();
  EXPECT_GT(stream->hessian(17, 17), 0);
  for (int64_t row = 0; row < 4; ++row) {
    EXPECT_NEAR(stream->target(row, 17), weight(row, 17), 1e-5);
  }
}

TEST(StatisticsTest, RefusesActivationsThatAreNotFinite) {
  Matrix inputs = RandomMatrix(100, 128, 5);
  inputs(3, 3) = std::nanf("");
  StreamStatistics statistics(128, 0);
  statistics.Add(inputs, inputs);
  EXPECT_EQ(statistics.Problem(RandomMatrix(4, 128, 6), 1e-3).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace mobi
