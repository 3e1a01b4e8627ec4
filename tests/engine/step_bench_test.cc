#include "engine/step_bench.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "engine/synthetic_weights.h"
#include "tests/engine/tiny_shape.h"

namespace mobi {
namespace {

class StepBenchTest : public testing::Test {
 protected:
  void SetUp() override {
    auto weights = SyntheticWeights::Create("synthetic", TinyShape(6), {});
    ASSERT_TRUE(weights.ok()) << weights.status();
    weights_ = std::make_unique<SyntheticWeights>(*std::move(weights));
    backend_ = CreateCpuBackend({.num_threads = 1});
    auto model = Model::Load(*weights_, *backend_, kContext);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
  }

  std::unique_ptr<StepBench> Create(bool coherent, bool whole_level_decodes = false) {
    auto bench = StepBench::Create({.max_seqs = 4,
                                    .context = kContext,
                                    .coherent = coherent,
                                    .whole_level_decodes = whole_level_decodes},
                                   *model_, *weights_);
    EXPECT_TRUE(bench.ok()) << bench.status();
    return *std::move(bench);
  }

  static constexpr int kContext = 33;  // the last block holds one token
  std::unique_ptr<SyntheticWeights> weights_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Model> model_;
};

TEST_F(StepBenchTest, WholeLevelsAreReadExactly) {
  const auto bench = Create(/*coherent=*/true, /*whole_level_decodes=*/true);
  for (const int sequences : {1, 4}) {
    double bytes = 0;
    for (const float bits : {2.0f, 4.0f, 6.0f, 8.0f}) {
      for (const float asked : {bits, bits - 0.7f}) {
        ASSERT_TRUE(bench->Set(sequences, std::max(asked, 2.0f)).ok());
        EXPECT_FALSE(bench->Chooses(asked));
        ASSERT_TRUE(bench->Run().ok());
        EXPECT_FLOAT_EQ(bench->effective_bits(), bits);
        // A range and an offset in 16 bits for every 128 weights come on top.
        EXPECT_FLOAT_EQ(bench->loaded_bits(), bits + 32.0 / 128);
      }
      EXPECT_GT(bench->StepBytes(), bytes);
      bytes = bench->StepBytes();
    }
  }
}

TEST_F(StepBenchTest, TheEndsAreReadExactly) {
  const auto bench = Create(/*coherent=*/true);
  for (const float bits : {2.0f, 8.0f}) {
    ASSERT_TRUE(bench->Set(4, bits).ok());
    EXPECT_FLOAT_EQ(bench->effective_bits(), bits);
    EXPECT_FLOAT_EQ(bench->loaded_bits(), bits + 32.0 / 128);
    EXPECT_FALSE(bench->Chooses(bits));
  }
  EXPECT_TRUE(bench->Chooses(4));
}

TEST_F(StepBenchTest, BitsBetweenLevelsComeNear) {
  for (const bool coherent : {false, true}) {
    const auto bench = Create(coherent);
    for (const int sequences : {1, 4, 1}) {
      for (const float bits : {2.5f, 3.0f, 4.0f, 5.0f, 7.0f}) {
        ASSERT_TRUE(bench->Set(sequences, bits).ok());
        EXPECT_NEAR(bench->effective_bits(), bits, 0.4) << sequences << " sequences";
        const double found = bench->effective_bits();
        ASSERT_TRUE(bench->Run().ok());
        EXPECT_EQ(bench->effective_bits(), found);
      }
    }
  }
}

TEST_F(StepBenchTest, StepsOfPromptsReadTheirBitsToo) {
  const auto bench =
      StepBench::Create({.max_seqs = 2, .context = kContext, .chunk = 8}, *model_, *weights_);
  ASSERT_TRUE(bench.ok()) << bench.status();
  for (const float bits : {2.0f, 8.0f}) {
    ASSERT_TRUE((*bench)->Set(2, bits).ok());
    EXPECT_FLOAT_EQ((*bench)->effective_bits(), bits);
    EXPECT_FLOAT_EQ((*bench)->loaded_bits(), bits + 32.0 / 128);
  }
}

TEST_F(StepBenchTest, DecodesBesideAPromptAtAWholeLevel) {
  const auto bench = StepBench::Create({.max_seqs = 1,
                                        .context = kContext,
                                        .chunk = 8,
                                        .decodes = 3,
                                        .coherent = true,
                                        .whole_level_prompts = true},
                                       *model_, *weights_);
  ASSERT_TRUE(bench.ok()) << bench.status();
  ASSERT_TRUE((*bench)->Set(1, 3.0f).ok());
  EXPECT_LT((*bench)->effective_bits(), 8);
  EXPECT_GE((*bench)->loaded_bits(), 4 + 32.0 / 128);  // the prompt reads 4 bits
  ASSERT_TRUE((*bench)->Set(1, 8.0f).ok());
  EXPECT_FLOAT_EQ((*bench)->effective_bits(), 8);
}

TEST_F(StepBenchTest, AChunkBeyondTheContextIsRefused) {
  for (const int chunk : {0, kContext + 1}) {
    const auto bench = StepBench::Create({.context = kContext, .chunk = chunk}, *model_, *weights_);
    EXPECT_EQ(bench.status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(StepBenchTest, AContextBeyondTheModelsIsRefused) {
  const auto bench = StepBench::Create({.context = kContext + 1}, *model_, *weights_);
  EXPECT_EQ(bench.status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace mobi
