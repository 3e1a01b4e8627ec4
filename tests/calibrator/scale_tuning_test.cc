#include "calibrator/scale_tuning.h"

#include <gtest/gtest.h>

#include "kernels/numeric.h"
#include "tests/calibrator/float_model_fixture.h"

namespace mobi {
namespace {

constexpr int64_t kSeqLen = 32, kSequences = 8;

class ScaleTuningTest : public FloatModelTest {
 protected:
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(OpenModel(kSeqLen));
    ids_ = RandomIds(kSequences * kSeqLen);
    CalibrationStreams streams;
    streams.seq_len = kSeqLen;
    streams.float_hidden = Matrix(kSequences * kSeqLen, model_->config().hidden_size);
    model_->Embed(ids_, streams.float_hidden);
    streams.hidden.assign(BlockCalibrationOptions().stream_levels.size(), streams.float_hidden);
    BlockCalibrationOptions options;
    options.fit.joint_codes = false;
    options.fit.rounds = 0;
    for (int layer = 0; layer < model_->num_layers(); ++layer) {
      auto fitted =
          CalibrateBlock(model_->config(), *model_->LoadBlock(layer), model_->rope(), options,
                         streams, [](const std::string&, double) { return absl::OkStatus(); });
      ASSERT_TRUE(fitted.ok()) << fitted.status();
      blocks_.push_back(*std::move(fitted));
    }
    float_hidden_ = std::move(streams.float_hidden);
  }

  // The blocks after tuning; every step's KL goes to `kl`.
  std::vector<FittedBlock> Tuned(const ScaleTuningOptions& options, absl::Span<const int32_t> ids,
                                 std::vector<double>& kl, Matrix float_hidden = {}) const {
    std::vector<FittedBlock> blocks = blocks_;
    const absl::Status status = TuneScales(
        *model_, ids, kSeqLen, options, std::move(float_hidden),
        [&](int, double value) {
          kl.push_back(value);
          return absl::OkStatus();
        },
        blocks);
    EXPECT_TRUE(status.ok()) << status;
    return blocks;
  }

  std::vector<int32_t> ids_;
  std::vector<FittedBlock> blocks_;
  Matrix float_hidden_;  // what the fit's float stream became
};

TEST_F(ScaleTuningTest, NearsTheFloatModelAndKeepsCodesAndOtherLevels) {
  ScaleTuningOptions tuning;
  tuning.steps = 60;
  tuning.batch = 4;
  tuning.learning_rate = 1e-2f;
  std::vector<double> kl;
  const std::vector<FittedBlock> after = Tuned(tuning, ids_, kl);
  ASSERT_EQ(kl.size(), 60u);
  EXPECT_GT(kl.front(), 0);
  EXPECT_LT(kl[58] + kl[59], 0.8 * (kl[0] + kl[1]));
  for (size_t layer = 0; layer < after.size(); ++layer) {
    for (int g = 0; g < kNumLinearGroups; ++g) {
      const NestedWeight &a = blocks_[layer].linear[g], &b = after[layer].linear[g];
      EXPECT_EQ(a.codes, b.codes);
      for (size_t i = 0; i < a.scales[0].size(); ++i) {
        EXPECT_EQ(b.scales[0][i].range, HalfToFloat(FloatToHalf(b.scales[0][i].range)));
        EXPECT_EQ(a.scales[1][i].range, b.scales[1][i].range);
        EXPECT_EQ(a.scales[3][i].offset, b.scales[3][i].offset);
      }
    }
  }
}

// After an interruption nothing is left of the fit's float stream, and the checkpoint is the same.
TEST_F(ScaleTuningTest, TakesTheFitsFloatStreamForWhatItWouldComputeItself) {
  ScaleTuningOptions tuning;
  tuning.steps = 2;
  tuning.batch = kSequences;
  std::vector<double> own, taken, of_wrong;
  Tuned(tuning, ids_, own);
  Tuned(tuning, ids_, taken, float_hidden_);
  EXPECT_EQ(own, taken);
  Matrix first_half(float_hidden_.rows() / 2, float_hidden_.cols());
  std::copy_n(float_hidden_.data(), first_half.size(), first_half.data());
  std::vector<double> half;
  Tuned(tuning, ids_, half, first_half);
  EXPECT_EQ(own, half);
  first_half.Fill(0);
  Tuned(tuning, ids_, of_wrong, std::move(first_half));
  EXPECT_NE(own, of_wrong);
}

// The second windows of the sequences follow the first ones.
TEST_F(ScaleTuningTest, ReadsEveryWindowOfEverySequence) {
  std::vector<int32_t> changed = ids_;
  for (int64_t i = kSeqLen / 2; i < kSeqLen; ++i) changed[i] = (changed[i] + 1) % 256;
  ScaleTuningOptions tuning;
  tuning.batch = 4;
  tuning.positions = kSeqLen / 2;
  tuning.steps = kSequences / tuning.batch + 1;
  tuning.allocated_share = 0;  // losses are measured on whole sequences
  std::vector<double> kl, kl_of_changed;
  Tuned(tuning, ids_, kl);
  Tuned(tuning, changed, kl_of_changed);
  EXPECT_EQ(kl[0], kl_of_changed[0]);
  EXPECT_EQ(kl[1], kl_of_changed[1]);
  EXPECT_NE(kl[2], kl_of_changed[2]);
}

// An allocation of 2 bits is level 1 throughout, as pure windows read it; more bits are nearer to
// the float model.
TEST_F(ScaleTuningTest, AllocatedWindowsReadTheBitsTheyAreGiven) {
  ScaleTuningOptions tuning;
  tuning.batch = 4;
  tuning.steps = 1;
  tuning.pure_every = 1;
  std::vector<double> pure, lowest, middle, highest;
  Tuned(tuning, ids_, pure);
  tuning.pure_every = 0;
  tuning.allocated_share = 1;
  tuning.allocated_bits = {2, 2};
  Tuned(tuning, ids_, lowest);
  tuning.allocated_bits = {4.5, 5.5};
  Tuned(tuning, ids_, middle);
  tuning.allocated_bits = {8, 8};
  Tuned(tuning, ids_, highest);
  EXPECT_EQ(pure, lowest);
  EXPECT_LT(middle[0], lowest[0]);
  EXPECT_LT(highest[0], middle[0]);
}

// Llama-3-8B is beyond what a host holds; wiki-llama's size is not.
TEST_F(ScaleTuningTest, KnowsWhatItWouldNeed) {
  ModelConfig config;
  config.hidden_size = 4096;
  config.intermediate_size = 14336;
  config.num_hidden_layers = 32;
  config.num_attention_heads = 32;
  config.num_key_value_heads = 8;
  config.head_dim = 128;
  const ScaleTuningOptions options;
  // 6.98e9 weights of the linears, four levels of four bytes; the rest are traces.
  EXPECT_NEAR(TuningGib(config, options), 104 + 42, 1);
  EXPECT_GT(TuningGib(config, options), options.max_memory_gib);
  config.hidden_size = 512;
  config.intermediate_size = 1408;
  config.num_hidden_layers = 8;
  config.num_attention_heads = 8;
  config.num_key_value_heads = 4;
  config.head_dim = 64;
  EXPECT_LT(TuningGib(config, options), 2);
}

}  // namespace
}  // namespace mobi
