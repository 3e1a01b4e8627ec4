// The paper's ranges: training them lowers the block's error, and the base slice is served first.
#include "calibrator/learned_clipping.h"

#include <gtest/gtest.h>

#include "calibrator/linear_algebra.h"
#include "tests/calibrator/float_model_fixture.h"

namespace mobi {
namespace {

constexpr int64_t kSeqLen = 32, kSequences = 4;

class LearnedClippingTest : public FloatModelTest {
 protected:
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(OpenModel(kSeqLen));
    weights_ = *model_->LoadBlock(0);
    const std::vector<int32_t> ids = RandomIds(kSequences * kSeqLen);
    input_ = Matrix(kSequences * kSeqLen, model_->config().hidden_size);
    model_->Embed(ids, input_);
    target_ = input_;
    ForwardBlock(context(), weights_, target_);
  }

  BlockContext context() const { return {model_->config(), model_->rope(), kSeqLen}; }

  FittedBlock Learn(const ClippingOptions& options) {
    auto block = LearnClipping(context(), weights_, {input_, input_, target_}, options,
                               [&](const std::string& epoch, double error) {
                                 epochs_.push_back(epoch);
                                 errors_.push_back(error);
                                 return absl::OkStatus();
                               });
    EXPECT_TRUE(block.ok()) << block.status();
    return *std::move(block);
  }

  // Squared error of the block's output when all of it reads `level`.
  double ErrorAt(const FittedBlock& block, int level) const {
    BlockWeights weights = weights_;
    for (int g = 0; g < kNumLinearGroups; ++g) {
      weights.linear[g] = Dequantize(block.linear[g], level);
    }
    Matrix hidden = input_;
    ForwardBlock(context(), weights, hidden);
    double error = 0;
    for (int64_t i = 0; i < hidden.size(); ++i) {
      const double d = hidden.data()[i] - target_.data()[i];
      error += d * d;
    }
    return error;
  }

  static ClippingOptions Options(int base_epochs, int joint_epochs) {
    ClippingOptions options;
    options.base_epochs = base_epochs;
    options.joint_epochs = joint_epochs;
    options.learning_rate = 0.1f;
    options.gate_training.epochs = 5;
    return options;
  }

  BlockWeights weights_;
  Matrix input_, target_;
  std::vector<std::string> epochs_;
  std::vector<double> errors_;
};

TEST_F(LearnedClippingTest, TrainingLowersTheErrorOfTheBaseSlice) {
  const FittedBlock untrained = Learn(Options(0, 0));
  const FittedBlock trained = Learn(Options(10, 0));
  EXPECT_EQ(epochs_.size(), 10u);
  EXPECT_LT(errors_.back(), 0.8 * errors_.front());
  EXPECT_LT(ErrorAt(trained, 1), 0.8 * ErrorAt(untrained, 1));
}

TEST_F(LearnedClippingTest, JointEpochsLowerTheErrorAtTheLevelsThatGatesChoose) {
  const FittedBlock block = Learn(Options(4, 8));
  ASSERT_EQ(epochs_.size(), 12u);
  EXPECT_EQ(epochs_[3], "base epoch 4/4");
  EXPECT_EQ(epochs_.back(), "joint epoch 8/8");
  // Gates open slices at once, then the ranges learn, gates are trained again and ranges go on.
  EXPECT_LT(errors_[4], errors_[3]);
  EXPECT_LT(errors_[7], errors_[4]);
  EXPECT_LT(errors_[11], errors_[8]);
  for (int level = 2; level <= kNumLevels; ++level) {
    EXPECT_LT(ErrorAt(block, level), ErrorAt(block, level - 1)) << level;
  }
}

TEST_F(LearnedClippingTest, EveryLevelReadsTheOneRangeAndDeadGroupsStayDead) {
  for (int64_t j = 0; j < kGroupSize; ++j) weights_.linear[1].Row(0)[j] = 0;
  const FittedBlock block = Learn(Options(1, 1));
  for (const NestedWeight& weight : block.linear) {
    for (size_t i = 0; i < weight.scales[0].size(); ++i) {
      EXPECT_EQ(weight.scales[0][i].range, weight.scales[3][i].range);
      EXPECT_EQ(weight.scales[0][i].offset, weight.scales[3][i].offset);
    }
  }
  for (int level = 1; level <= kNumLevels; ++level) {
    const Matrix read = Dequantize(block.linear[1], level);
    for (int64_t j = 0; j < kGroupSize; ++j) EXPECT_NEAR(read(0, j), 0, 1e-6);
  }
}

TEST_F(LearnedClippingTest, SameSeedSameRanges) {
  const FittedBlock a = Learn(Options(1, 1)), b = Learn(Options(1, 1));
  for (int g = 0; g < kNumLinearGroups; ++g) EXPECT_EQ(a.linear[g].codes, b.linear[g].codes);
}

}  // namespace
}  // namespace mobi
