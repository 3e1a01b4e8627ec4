// Routers: training learns the error it is shown; the host's rule is the kernels' rule; prices buy
// the bits that the table says.
#include "calibrator/routing.h"

#include <gtest/gtest.h>

#include <cmath>

#include "calibrator/gate_training.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/mixed_linear.h"
#include "calibrator/price_table.h"
#include "calibrator/router_training.h"
#include "calibrator/vector_math.h"
#include "kernels/backend.h"
#include "kernels/numeric.h"
#include "tests/calibrator/random_matrix.h"

namespace mobi {
namespace {

RoutedGroup Group() { return {"router", {{"a", 32, 128}, {"b", 16, 128}}}; }

// Errors that follow the input: the square of what a random matrix leaves of it.
RoutingSamples Samples(int64_t tokens, uint64_t seed) {
  RoutingSamples samples;
  samples.inputs = RandomMatrix(tokens, 128, seed);
  std::mt19937_64 random(seed + 1);
  for (int64_t t = 0; t < tokens; ++t) {
    const float size = std::exp(0.5f * static_cast<float>(random() % 5));
    for (int64_t j = 0; j < 128; ++j) samples.inputs(t, j) *= size * (j < 4 ? 5.0f : 1.0f);
  }
  samples.errors = Matrix(tokens, 2 * kNumLevels);
  for (int64_t o = 0; o < samples.errors.cols(); ++o) {
    const Matrix gap = RandomMatrix(3, 128, 100 + o, std::pow(0.25f, static_cast<float>(o % 4)));
    Matrix error(tokens, 3);
    MultiplyTransposed(samples.inputs, gap, error);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int i = 0; i < 3; ++i) samples.errors(t, o) += error(t, i) * error(t, i);
    }
    samples.loss_factor.push_back(o < 4 ? 2.0 : 0.5);
  }
  return samples;
}

double Correlation(const Matrix& scores, const RoutingSamples& samples, int64_t o) {
  double sx = 0, sy = 0, sxx = 0, syy = 0, sxy = 0;
  const double n = static_cast<double>(scores.rows());
  for (int64_t t = 0; t < scores.rows(); ++t) {
    const double x = scores(t, o), y = std::log(samples.errors(t, o));
    sx += x, sy += y, sxx += x * x, syy += y * y, sxy += x * y;
  }
  return (n * sxy - sx * sy) / std::sqrt((n * sxx - sx * sx) * (n * syy - sy * sy));
}

TEST(RouterTrainingTest, PredictsTheErrorOfInputsItHasNotSeen) {
  const RoutingSamples train = Samples(4096, 1), test = Samples(1024, 50);
  const RouterWeights router = TrainRouter(train, {.num_hidden = 16, .epochs = 30});
  const Matrix scores = RouterScores(router, test.inputs);
  for (int64_t o = 0; o < scores.cols(); ++o) {
    EXPECT_GT(Correlation(scores, test, o), 0.6) << "output " << o;
    double predicted = 0, measured = 0;
    for (int64_t t = 0; t < scores.rows(); ++t) {
      predicted += std::exp(scores(t, o));
      measured += test.errors(t, o) * test.loss_factor[o];
    }
    EXPECT_NEAR(predicted / measured, 1, 0.3) << "output " << o;
  }
}

// As wide as down's inputs in Llama-3-8B, tokens of many sizes: what is left of an input is mostly
// in a few directions that inputs have in common.
TEST(RouterTrainingTest, LearnsFromManyInputs) {
  constexpr int64_t kInputs = 14336, kTokens = 3200, kSeen = 2560, kGaps = 24, kCommon = 8;
  const Matrix gap = RandomMatrix(kGaps, kInputs, 1);
  const Matrix along = RandomMatrix(kTokens, kCommon, 2, 0.7f);
  const Matrix size = RandomMatrix(kTokens, 1, 3, 0.3f);
  Matrix inputs = RandomMatrix(kTokens, kInputs, 4);
  Multiply(along, ConstMatrixView(gap).Rows(0, kCommon), inputs, 1, 1);
  for (int64_t t = 0; t < kTokens; ++t) Scale(inputs.Row(t), std::exp(size(t, 0)), kInputs);
  Matrix error(kTokens, kGaps);
  MultiplyTransposed(inputs, gap, error);
  const auto samples = [&](int64_t first, int64_t count) {
    RoutingSamples some{Matrix(count, kInputs), Matrix(count, 1), {1.0}};
    std::copy_n(inputs.Row(first), some.inputs.size(), some.inputs.data());
    for (int64_t t = 0; t < count; ++t) {
      some.errors(t, 0) = DotProduct(error.Row(first + t), error.Row(first + t), kGaps);
    }
    return some;
  };
  const RouterWeights router = TrainRouter(samples(0, kSeen), {.num_hidden = 32});
  const RoutingSamples others = samples(kSeen, kTokens - kSeen);
  EXPECT_GT(Correlation(RouterScores(router, others.inputs), others, 0), 0.6);
}

TEST(RouterTrainingTest, SameSeedSameRouterAndHalfExactWeights) {
  const RoutingSamples samples = Samples(512, 3);
  const RouterWeights a = TrainRouter(samples, {.num_hidden = 4, .epochs = 2, .seed = 9});
  const RouterWeights b = TrainRouter(samples, {.num_hidden = 4, .epochs = 2, .seed = 9});
  EXPECT_EQ(a.b2, b.b2);
  for (int64_t i = 0; i < a.w1.size(); ++i) {
    EXPECT_EQ(a.w1.data()[i], b.w1.data()[i]);
    EXPECT_EQ(a.w1.data()[i], HalfToFloat(FloatToHalf(a.w1.data()[i])));
  }
}

// Average bits and mean relative error of a router's choice at `price`.
std::pair<double, double> Choice(const RouterWeights& router, const RoutingSamples& samples,
                                 double price) {
  const std::vector<SegmentCost> costs = CostsOf(Group());
  const int64_t tokens = samples.inputs.rows();
  Matrix losses = RouterScores(router, samples.inputs);
  for (int64_t i = 0; i < losses.size(); ++i) losses.data()[i] = std::exp(losses.data()[i]);
  std::vector<uint8_t> levels(2 * static_cast<size_t>(tokens));
  double bits = ChooseLevels(losses, costs, price, {}, levels.data());
  bits /= static_cast<double>((costs[0].weights + costs[1].weights) * tokens);
  double error = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t s = 0; s < 2; ++s) {
      error += samples.errors(t, s * kNumLevels + levels[s * tokens + t] - 1);
    }
  }
  return {bits, error};
}

TEST(GateTrainingTest, MeetsItsBudgetSpendsItWhereItCountsAndFollowsTheThreshold) {
  const RoutingSamples train = Samples(4096, 1), test = Samples(1024, 50);
  const RouterWeights gates =
      TrainGates(train, CostsOf(Group()), {.num_hidden = 16, .epochs = 30}, {.bits = 4});
  // Segments share their gates: what one reads at a threshold, the other reads too.
  const double at_training = std::exp(-30.0);  // gates of 0
  const auto [bits, error] = Choice(gates, test, at_training);
  EXPECT_NEAR(bits, 4, 0.6);
  double uniform = 0;
  for (int64_t t = 0; t < 1024; ++t) uniform += test.errors(t, 1) + test.errors(t, 5);
  EXPECT_LT(error, uniform * std::pow(4.0, 4 - bits));
  double last = 8.1;
  for (const double log_price : {-200.0, -60.0, -40.0, -30.0, -20.0, 0.0, 200.0}) {
    const double now = Choice(gates, test, std::exp(log_price)).first;
    EXPECT_LE(now, last) << log_price;
    last = now;
  }
  EXPECT_GT(Choice(gates, test, std::exp(-80.0)).first, 7.5);
  EXPECT_LT(Choice(gates, test, std::exp(20.0)).first, 2.5);
}

TEST(RoutingTest, AgreesWithTheBackendTokenByTokenAndTogether) {
  constexpr int kTokens = 64;
  const RoutingSamples samples = Samples(kTokens, 7);
  const RouterWeights router = TrainRouter(Samples(1024, 5), {.num_hidden = 8, .epochs = 10});
  const std::vector<SegmentCost> costs = CostsOf(Group());
  Matrix losses = RouterScores(router, samples.inputs);
  for (int64_t i = 0; i < losses.size(); ++i) losses.data()[i] = std::exp(losses.data()[i]);

  std::vector<uint16_t> w1;
  for (int64_t i = 0; i < router.w1.size(); ++i) w1.push_back(FloatToHalf(router.w1.data()[i]));
  RouterWeights copy = router;
  RoutedWeight routed;
  routed.weight.rows = 48;
  routed.weight.cols = 128;
  routed.weight.num_segments = 2;
  routed.weight.segment_end = {32, 48};
  routed.router.num_hidden = router.num_hidden();
  routed.router.w1 = Tensor::Of(w1.data(), DType::kF16, router.num_hidden(), 128);
  routed.router.b1 = Tensor::Of(copy.b1.data(), DType::kF32, 1, router.num_hidden());
  routed.router.u = Tensor::Of(copy.u.data(), DType::kF32, 1, router.num_hidden());
  routed.router.w2 = Tensor::Of(copy.w2.data(), DType::kF32, 8, router.num_hidden());
  routed.router.b2 = Tensor::Of(copy.b2.data(), DType::kF32, 1, 8);
  for (int s = 0; s < 2; ++s) routed.router.bytes[s] = costs[s].bytes;

  const auto backend = CreateCpuBackend({.num_threads = 1, .reference = true});
  Matrix inputs = samples.inputs;
  const Tensor x = Tensor::Of(inputs.data(), DType::kF32, kTokens, 128);
  for (const bool coherent : {false, true}) {
    for (const float price : {1e-1f, 1e-3f, 1e-5f}) {
      std::vector<uint8_t> expected(2 * kTokens), levels(2 * kTokens);
      const std::vector<float> prices(kTokens, price);
      const std::vector<uint8_t> lowest(kTokens, 1), highest(kTokens, kNumLevels);
      std::vector<uint32_t> tiles(kTokens);
      uint64_t loaded = 0;
      RoutingBatch batch;
      batch.num_tokens = kTokens;
      batch.num_coherent = coherent ? kTokens : 0;
      batch.price = prices.data();
      batch.min_level = lowest.data();
      batch.max_level = highest.data();
      batch.level_tiles = tiles.data();
      batch.loaded_bytes = &loaded;
      backend->Route(x, routed, batch, expected.data(), kTokens);
      ASSERT_TRUE(backend->Synchronize().ok());
      // One position of 64 sequences chooses together.
      const double bits =
          ChooseLevels(losses, costs, price, {coherent, coherent ? 1 : kTokens}, levels.data());
      EXPECT_EQ(levels, expected) << "price " << price << " coherent " << coherent;
      double expected_bits = 0;
      for (const uint32_t t : tiles) expected_bits += 2.0 * t * kTileRows * kGroupSize;
      EXPECT_DOUBLE_EQ(bits, expected_bits);
    }
  }
}

TEST(MixedLinearTest, EveryTokenMeetsItsOwnLevelForwardAndBack) {
  NestedWeight weight(48, 128);
  std::mt19937_64 random(4);
  for (uint8_t& code : weight.codes) code = static_cast<uint8_t>(random());
  for (auto& scales : weight.scales) {
    for (LevelScale& scale : scales) scale = {1, -0.25f};
  }
  const MixedLinear mixed(weight, {32, 16});
  const Matrix x = RandomMatrix(20, 128, 1), d_out = RandomMatrix(20, 48, 2);
  std::vector<uint8_t> levels(40);
  for (uint8_t& level : levels) level = static_cast<uint8_t>(1 + random() % 4);
  Matrix out(20, 48), d_x(20, 128);
  mixed.Forward(x, levels.data(), out);
  mixed.Backward(d_out, levels.data(), d_x);
  for (int64_t t = 0; t < 20; ++t) {
    std::vector<double> expected(128);
    for (int64_t row = 0; row < 48; ++row) {
      const float* w = mixed.level(levels[(row < 32 ? 0 : 20) + t]).Row(row);
      double sum = 0;
      for (int64_t j = 0; j < 128; ++j) {
        sum += w[j] * x(t, j);
        expected[j] += w[j] * d_out(t, row);
      }
      EXPECT_NEAR(out(t, row), sum, 1e-3);
    }
    for (int64_t j = 0; j < 128; ++j) EXPECT_NEAR(d_x(t, j), expected[j], 1e-3);
  }
}

TEST(PriceTableTest, CoversTwoToEightAndInvertsTheMeasuredBits) {
  std::vector<RecordedLosses> recorded;
  for (int i = 0; i < 4; ++i) {
    RecordedLosses group{Matrix(512, 2 * kNumLevels), CostsOf(Group())};
    const Matrix noise = RandomMatrix(512, 2, 20 + i);
    for (int64_t t = 0; t < 512; ++t) {
      for (int64_t o = 0; o < 8; ++o) {
        group.losses(t, o) = std::exp(2 * noise(t, o / 4) - 2.5f * static_cast<float>(o % 4));
      }
    }
    recorded.push_back(std::move(group));
  }
  for (const int batch : {1, 16}) {
    // A model that always uses a tenth of a bit more than the forecast says.
    std::vector<PriceJob> jobs;
    for (const double price : ProbePrices(recorded, batch)) {
      jobs.push_back({price, {}, ForecastBits(recorded, price, batch) + 0.1});
    }
    const auto table = BuildPriceTable(recorded, batch, jobs);
    ASSERT_EQ(table.size(), 61u);
    for (size_t i = 1; i < table.size(); ++i) {
      EXPECT_GT(table[i].bits, table[i - 1].bits);
      EXPECT_LT(table[i].price, table[i - 1].price);
    }
    for (size_t i = 5; i < 50; ++i) {
      EXPECT_NEAR(ForecastBits(recorded, table[i].price, batch) + 0.1, table[i].bits, 0.05);
    }
  }
}

}  // namespace
}  // namespace mobi
