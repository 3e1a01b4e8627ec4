#include "calibrator/scale_tuning.h"

#include <gtest/gtest.h>

#include <random>

#include "engine/checkpoint.h"
#include "kernels/numeric.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

constexpr int64_t kSeqLen = 32, kSequences = 8;

TEST(ScaleTuningTest, NearsTheFloatModelAndKeepsCodesAndOtherLevels) {
  TempDir dir;
  ASSERT_TRUE(WriteTestModel(dir.Sub("float")).ok());
  const auto checkpoint = Checkpoint::Open(dir.Sub("float"), {});
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto model = FloatModel::Open(*checkpoint, kSeqLen);
  ASSERT_TRUE(model.ok()) << model.status();

  std::mt19937_64 random(3);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < kSequences * kSeqLen; ++i) {
    ids.push_back(static_cast<int32_t>(random() % 256));
  }
  CalibrationStreams streams;
  streams.seq_len = kSeqLen;
  streams.float_hidden = Matrix(kSequences * kSeqLen, model->config().hidden_size);
  model->Embed(ids, streams.float_hidden);
  streams.hidden.assign(BlockCalibrationOptions().stream_levels.size(), streams.float_hidden);
  BlockCalibrationOptions options;
  options.fit.joint_codes = false;
  options.fit.rounds = 0;
  std::vector<FittedBlock> blocks;
  for (int layer = 0; layer < model->num_layers(); ++layer) {
    auto fitted =
        CalibrateBlock(model->config(), *model->LoadBlock(layer), model->rope(), options, streams,
                       [](const std::string&, double) { return absl::OkStatus(); });
    ASSERT_TRUE(fitted.ok()) << fitted.status();
    blocks.push_back(*std::move(fitted));
  }

  const std::vector<FittedBlock> before = blocks;
  ScaleTuningOptions tuning;
  tuning.steps = 60;
  tuning.batch = 4;
  tuning.learning_rate = 1e-2f;
  std::vector<double> kl;
  const absl::Status status = TuneScales(
      *model, ids, kSeqLen, tuning,
      [&](int, double value) {
        kl.push_back(value);
        return absl::OkStatus();
      },
      blocks);
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_EQ(kl.size(), 60u);
  EXPECT_GT(kl.front(), 0);
  EXPECT_LT(kl[58] + kl[59], 0.8 * (kl[0] + kl[1]));
  for (size_t layer = 0; layer < blocks.size(); ++layer) {
    for (int g = 0; g < kNumLinearGroups; ++g) {
      const NestedWeight &a = before[layer].linear[g], &b = blocks[layer].linear[g];
      EXPECT_EQ(a.codes, b.codes);
      for (size_t i = 0; i < a.scales[0].size(); ++i) {
        EXPECT_EQ(b.scales[0][i].range, HalfToFloat(FloatToHalf(b.scales[0][i].range)));
        EXPECT_EQ(a.scales[1][i].range, b.scales[1][i].range);
        EXPECT_EQ(a.scales[3][i].offset, b.scales[3][i].offset);
      }
    }
  }
}

// Llama-3-8B is beyond what a host holds; wiki-llama's size is not.
TEST(ScaleTuningTest, KnowsWhatItWouldNeed) {
  ModelConfig config;
  config.hidden_size = 4096;
  config.intermediate_size = 14336;
  config.num_hidden_layers = 32;
  config.num_attention_heads = 32;
  config.num_key_value_heads = 8;
  config.head_dim = 128;
  const ScaleTuningOptions options;
  // 6.98e9 weights of the linears, four levels of four bytes; the rest are traces.
  EXPECT_NEAR(TuningGib(config, options), 104 + 24, 8);
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
