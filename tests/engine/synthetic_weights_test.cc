#include "engine/synthetic_weights.h"

#include <gtest/gtest.h>

#include "tests/engine/collecting_sink.h"
#include "tests/engine/loaded_engine.h"

namespace mobi {
namespace {

ModelConfig Small() {
  auto config = ConfigOfShape("llama-3.2-1b");
  config->vocab_size = 512;
  config->hidden_size = 256;
  config->intermediate_size = 512;
  config->num_hidden_layers = 2;
  config->num_attention_heads = 4;
  config->num_key_value_heads = 2;
  config->max_position_embeddings = 128;
  return *config;
}

TEST(SyntheticWeights, AModelOfAnyShapeRunsAtEveryLevel) {
  for (const bool quantized : {true, false}) {
    auto weights = SyntheticWeights::Create("synthetic", Small(), {.quantized = quantized});
    ASSERT_TRUE(weights.ok()) << weights.status();
    const auto backend = CreateCpuBackend({});
    auto model = Model::Load(*weights, *backend, 0);
    ASSERT_TRUE(model.ok()) << model.status();
    RealClock clock;
    auto engine = Engine::Create({}, **model, *weights, *backend, clock);
    ASSERT_TRUE(engine.ok()) << engine.status();
    for (int level = 0; level <= 4; ++level) {
      GenerationRequest request;
      request.prompt = {1, 2, 3, 4, 5};
      request.max_new_tokens = 8;
      request.precision.level = level;
      CollectingSink sink;
      ASSERT_TRUE((*engine)->Submit(request, &sink).ok());
      EXPECT_TRUE(sink.Wait().status.ok()) << sink.Wait().status;
      EXPECT_EQ(sink.completions[0].size(), 8u);
    }
  }
}

TEST(SyntheticWeights, TheSlicerKeepsTheWeightsDistribution) {
  auto weights = SyntheticWeights::Create("synthetic", Small(), {});
  ASSERT_TRUE(weights.ok());
  const int64_t rows = 256, cols = 256;
  const auto sliced = weights->SlicedViews("any", rows, cols);
  ASSERT_TRUE(sliced.ok());
  const uint8_t* slices[kNumSlices];
  for (int s = 0; s < kNumSlices; ++s) slices[s] = sliced->slices[s].data();
  std::vector<uint8_t> codes(rows * cols);
  UnpackSlices(slices, rows, cols, kNumLevels, codes.data());
  int counts[4] = {};
  for (const uint8_t code : codes) ++counts[CodeAtLevel(code, 1)];
  // Gaussian: the inner quarters of the range hold most of the weights.
  EXPECT_GT(counts[1] + counts[2], 3 * (counts[0] + counts[3]));
  EXPECT_GT(counts[0], 0);
}

TEST(SyntheticWeights, UnknownShapesAndOddSizesAreRefusedByName) {
  EXPECT_EQ(ConfigOfShape("gpt-2").status().code(), absl::StatusCode::kNotFound);
  ModelConfig odd = Small();
  odd.intermediate_size = 500;
  EXPECT_EQ(SyntheticWeights::Create("odd", odd, {}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace mobi
