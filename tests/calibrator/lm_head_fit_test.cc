#include "calibrator/lm_head_fit.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "calibrator/linear_algebra.h"
#include "tests/calibrator/float_model_fixture.h"
#include "tests/calibrator/random_matrix.h"

namespace mobi {
namespace {

double LogSumExp(const float* x, int64_t count) {
  const double max = *std::max_element(x, x + count);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += std::exp(x[i] - max);
  return max + std::log(sum);
}

// The definition, in double, over whole rows.
double MeanKl(const Matrix& p, const Matrix& q) {
  double kl = 0;
  for (int64_t t = 0; t < p.rows(); ++t) {
    const double log_p = LogSumExp(p.Row(t), p.cols()), log_q = LogSumExp(q.Row(t), q.cols());
    for (int64_t i = 0; i < p.cols(); ++i) {
      kl += std::exp(p(t, i) - log_p) * ((p(t, i) - log_p) - (q(t, i) - log_q));
    }
  }
  return kl / static_cast<double>(p.rows());
}

TEST(LogitDivergenceTest, PiecesOfAnyWidthGiveTheDefinition) {
  const int64_t tokens = 7, vocab = 301;
  Matrix p = RandomMatrix(tokens, vocab, 1), q = p;
  const Matrix noise = RandomMatrix(tokens, vocab, 2);
  for (int64_t i = 0; i < p.size(); ++i) {
    p.data()[i] *= 5;
    q.data()[i] = p.data()[i] + 0.3f * noise.data()[i];
  }
  p(3, 200) = 90;  // the largest comes late: sums before it are scaled down to nothing
  q(3, 200) = 89;
  LogitDivergence divergence(tokens);
  int64_t begin = 0;
  for (const int64_t width : {1, 100, 150, 50}) {
    divergence.Add(ConstMatrixView(p).Columns(begin, width),
                   ConstMatrixView(q).Columns(begin, width), 2);
    begin += width;
  }
  const double expected = MeanKl(p, q);
  EXPECT_GT(expected, 0.01);
  EXPECT_NEAR(divergence.Mean(), expected, 1e-9);
}

TEST(LogitDivergenceTest, EqualLogitsAndEqualShiftsLoseNothing) {
  Matrix p = RandomMatrix(3, 64, 1), q = p;
  for (int64_t i = 0; i < q.size(); ++i) q.data()[i] += 2;
  LogitDivergence divergence(3);
  divergence.Add(p, q, 1);
  EXPECT_NEAR(divergence.Mean(), 0, 1e-6);
  EXPECT_GE(divergence.Mean(), 0);
}

class LmHeadFitTest : public FloatModelTest {
 protected:
  void SetUp() override {
    TestModelOptions options;
    options.tie_word_embeddings = false;
    options.vocab_size = 8192 + 330;  // two pieces, the last of no whole tiles
    ASSERT_NO_FATAL_FAILURE(OpenModel(64, options));
    inputs_ = RandomMatrix(600, 128, 3);
    blocks_.num_threads = 2;
  }

  LmHeadFit FitAll(int min_level) {
    LmHeadFit fit(*model_, {.slices = true, .min_level = min_level}, blocks_, inputs_);
    for (int piece = fit.num_pieces() - 1; piece >= 0; --piece) {
      const auto weight = fit.Fit(piece);
      EXPECT_TRUE(weight.ok()) << weight.status();
      EXPECT_EQ(weight->rows, fit.PieceRows(piece));
      fit.Take(piece, *weight);
    }
    return fit;
  }

  BlockCalibrationOptions blocks_;
  Matrix inputs_;
};

TEST_F(LmHeadFitTest, LossesAreTheDivergenceOfTheWholeHeadAndFallWithTheLevel) {
  const LmHeadFit fit = FitAll(2);
  ASSERT_EQ(fit.num_pieces(), 2);
  const Matrix& head = model_->head();
  Matrix exact(inputs_.rows(), head.rows()), logits(inputs_.rows(), head.rows());
  MultiplyTransposed(inputs_, head, exact);
  const std::array<double, kNumLevels> losses = fit.Losses();
  for (int level = 1; level <= kNumLevels; ++level) {
    MultiplyTransposed(inputs_, Dequantize(fit.weight(), level), logits);
    const double expected = MeanKl(exact, logits);
    EXPECT_NEAR(losses[level - 1], expected, 1e-3 * expected + 1e-7) << level;
  }
  for (int k = 1; k < kNumLevels; ++k) EXPECT_LT(losses[k], losses[k - 1] / 4) << k;
}

TEST_F(LmHeadFitTest, LevelsThatNobodyReadsLeaveTheCodesToTheOthers) {
  const auto all = FitAll(1).Losses(), upper = FitAll(2).Losses();
  EXPECT_LT(upper[1], all[1]);
  EXPECT_GT(upper[0], all[0]);
}

}  // namespace
}  // namespace mobi
