// The calibrator's block against finite differences, and against the served model's golden loss.
#include "calibrator/llama_block.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "calibrator/float_model.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/vector_math.h"
#include "engine/checkpoint.h"
#include "engine/safetensors.h"
#include "tests/calibrator/random_matrix.h"
#include "tests/paths.h"

namespace mobi {
namespace {

ModelConfig SmallConfig() {
  ModelConfig config;
  config.hidden_size = 24;
  config.intermediate_size = 40;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.max_position_embeddings = 64;
  config.rms_norm_eps = 1e-5f;
  config.rope_theta = 1e4;
  return config;
}

BlockWeights RandomBlock(const ModelConfig& c) {
  BlockWeights block;
  const int64_t qkv = c.attention_size() + 2 * c.key_value_size();
  block.linear = {RandomMatrix(qkv, c.hidden_size, 1, 0.3f),
                  RandomMatrix(c.hidden_size, c.attention_size(), 2, 0.3f),
                  RandomMatrix(2 * c.intermediate_size, c.hidden_size, 3, 0.3f),
                  RandomMatrix(c.hidden_size, c.intermediate_size, 4, 0.3f)};
  for (int i = 0; i < c.hidden_size; ++i) {
    block.input_norm.push_back(1 + 0.1f * std::sin(static_cast<float>(i)));
    block.post_attention_norm.push_back(1 + 0.1f * std::cos(static_cast<float>(i)));
  }
  return block;
}

TEST(LlamaBlockTest, BackwardAgreesWithFiniteDifferences) {
  const ModelConfig config = SmallConfig();
  const RopeValues rope = ComputeRope(config, 64);
  const BlockContext context{config, rope, 6};
  BlockWeights block = RandomBlock(config);
  const Matrix input = RandomMatrix(12, config.hidden_size, 5);  // two sequences
  const Matrix direction = RandomMatrix(12, config.hidden_size, 6);
  // The loss is the block's output along a fixed direction.
  const auto loss = [&](const Matrix& x) {
    Matrix hidden = x;
    ForwardBlock(context, block, hidden);
    double sum = 0;
    for (int64_t i = 0; i < hidden.size(); ++i) sum += hidden.data()[i] * direction.data()[i];
    return sum;
  };
  const auto forward = [&](LinearGroup group, ConstMatrixView x, MatrixView out) {
    MultiplyTransposed(x, block.of(group), out);
  };
  const auto backward = [&](LinearGroup group, ConstMatrixView d_out, MatrixView d_x) {
    Multiply(d_out, block.of(group), d_x);
  };
  std::array<Matrix, kNumLinearGroups> d_weight;
  const auto on_gradient = [&](LinearGroup group, ConstMatrixView x, ConstMatrixView d_out) {
    Matrix& d = d_weight[static_cast<int>(group)];
    d = Matrix(d_out.cols, x.cols);
    TransposedMultiply(d_out, x, d);
  };
  Matrix hidden = input, gradient = direction;
  BlockTrace trace;
  TraceBlock(context, block, forward, hidden, trace);
  BackwardBlock(context, block, trace, backward, on_gradient, gradient);

  constexpr float kStep = 1e-2f;
  for (int64_t i = 0; i < input.size(); i += 7) {
    Matrix up = input, down = input;
    up.data()[i] += kStep;
    down.data()[i] -= kStep;
    const double expected = (loss(up) - loss(down)) / (2 * kStep);
    EXPECT_NEAR(gradient.data()[i], expected, 2e-2 + 0.01 * std::abs(expected)) << "input " << i;
  }
  for (int g = 0; g < kNumLinearGroups; ++g) {
    for (int64_t i = 0; i < block.linear[g].size(); i += 61) {
      float& w = block.linear[g].data()[i];
      const float saved = w;
      w = saved + kStep;
      const double up = loss(input);
      w = saved - kStep;
      const double down = loss(input);
      w = saved;
      const double expected = (up - down) / (2 * kStep);
      EXPECT_NEAR(d_weight[g].data()[i], expected, 2e-2 + 0.02 * std::abs(expected))
          << "group " << g << " weight " << i;
    }
  }
}

TEST(LlamaBlockTest, SequencesDoNotSeeEachOther) {
  const ModelConfig config = SmallConfig();
  const RopeValues rope = ComputeRope(config, 64);
  const BlockWeights block = RandomBlock(config);
  Matrix together = RandomMatrix(20, config.hidden_size, 9);
  Matrix alone(10, config.hidden_size);
  std::copy_n(together.Row(10), alone.size(), alone.data());
  ForwardBlock({config, rope, 10}, block, together);
  ForwardBlock({config, rope, 10}, block, alone);
  for (int64_t i = 0; i < alone.size(); ++i) {
    EXPECT_NEAR(alone.data()[i], together.Row(10)[i], 1e-4);
  }
}

TEST(FloatModelTest, LossOfAWindowOfTextAgreesWithTransformers) {
  const std::string root = MOBI_SOURCE_DIR;
  auto goldens = SafetensorsFile::Open(root + "/tests/testdata/stories-llama_logits.safetensors");
  ASSERT_TRUE(goldens.ok()) << goldens.status();
  auto checkpoint = Checkpoint::Open(root + "/deploy/demo/model", {});
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto ids = goldens->Find("wt2_w0_ids")->As<int32_t>();
  const auto expected = goldens->Find("wt2_w0_nll")->As<float>();
  const auto tokens = static_cast<int64_t>(ids.size());
  auto model = FloatModel::Open(*checkpoint, static_cast<int>(tokens));
  ASSERT_TRUE(model.ok()) << model.status();
  Matrix hidden(tokens, model->config().hidden_size);
  model->Embed(ids, hidden);
  for (int layer = 0; layer < model->num_layers(); ++layer) {
    auto block = model->LoadBlock(layer);
    ASSERT_TRUE(block.ok()) << block.status();
    ForwardBlock({model->config(), model->rope(), tokens}, *block, hidden);
  }
  Matrix logits(tokens, model->config().vocab_size);
  model->Logits(hidden, logits);
  for (int64_t t = 0; t + 1 < tokens; ++t) {
    const float logit = logits(t, ids[t + 1]);
    float max = 0;
    const float sum = ExpMinusMax(logits.Row(t), logits.cols(), &max);
    ASSERT_NEAR(std::log(sum) + max - logit, expected[t], 2e-3) << "token " << t;
  }
}

}  // namespace
}  // namespace mobi
