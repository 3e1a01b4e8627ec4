// Folders whose lm_head is in slices: what is written reads back, and lies are refused.
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "engine/checkpoint.h"
#include "engine/checkpoint_writer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/bad_folder.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

class BadLmHeadTest : public ::testing::TestWithParam<BadFolder> {};

TEST_P(BadLmHeadTest, IsRefused) {
  TempDir dir;
  ASSERT_EQ(WriteTestModels(dir, {}, {.sliced_lm_head = true}), absl::OkStatus());
  GetParam().damage(dir.Sub("mobiquant"));
  ExpectRefused(dir.Sub("mobiquant"), GetParam());
}

std::function<void(const std::string&)> EditLmHead(std::function<void(json&)> edit) {
  return EditConfig(
      [edit = std::move(edit)](json& config) { edit(config["quantization_config"]["lm_head"]); });
}

INSTANTIATE_TEST_SUITE_P(
    Config, BadLmHeadTest,
    ::testing::Values(
        BadFolder{"not told of",
                  EditConfig([](json& config) { config["quantization_config"].erase("lm_head"); }),
                  {"lm_head.slice_0: but config.json's quantization_config has no lm_head"}},
        BadFolder{"a number",
                  EditLmHead([](json& head) { head = 2; }),
                  {"quantization_config.lm_head: 2 is not an object"}},
        BadFolder{"no level",
                  EditLmHead([](json& head) { head.erase("min_level"); }),
                  {"quantization_config.lm_head.min_level: missing"}},
        BadFolder{"level 0",
                  EditLmHead([](json& head) { head["min_level"] = 0; }),
                  {"quantization_config.lm_head.min_level: 0 is not in 1..4"}},
        BadFolder{"no loss",
                  EditLmHead([](json& head) { head.erase("loss"); }),
                  {"quantization_config.lm_head.loss: missing"}},
        BadFolder{"three losses",
                  EditLmHead([](json& head) {
                    head["loss"] = {1, 1, 1};
                  }),
                  {"quantization_config.lm_head.loss: 3 values, not one for each of 4 levels"}},
        BadFolder{"a loss below 0",
                  EditLmHead([](json& head) { head["loss"][2] = -0.5; }),
                  {"quantization_config.lm_head.loss: level 3: not a finite number from 0"}},
        BadFolder{"a loss beyond float",
                  EditLmHead([](json& head) { head["loss"][0] = 1e300; }),
                  {"quantization_config.lm_head.loss: level 1: not a finite number from 0"}},
        BadFolder{"a loss in words",
                  EditLmHead([](json& head) { head["loss"][3] = "none"; }),
                  {"quantization_config.lm_head.loss: level 4: not a finite number from 0"}},
        BadFolder{"another vocabulary",
                  EditConfig([](json& config) { config["vocab_size"] = 300; }),
                  {"model.embed_tokens.weight: shape [320, 128], expected [300, 128]"}}));

// Without the slices that config.json tells of, and with those of a shorter vocabulary.
TEST(LmHeadCheckpointTest, AnLmHeadInSlicesMustBeThereWhole) {
  TempDir dir;
  ASSERT_EQ(WriteTestModels(dir), absl::OkStatus());
  const std::string config = dir.Sub("mobiquant/config.json");
  EditJson(config, [](json& c) {
    c["quantization_config"]["lm_head"] = {{"min_level", 2}, {"loss", {1, 1, 1, 1}}};
  });
  EXPECT_THAT(Checkpoint::Open(dir.Sub("mobiquant"), {}).status().message(),
              HasSubstr("lm_head.slice_0: missing"));

  const auto source = Checkpoint::Open(dir.Sub("float"), {});
  const auto writer = CheckpointWriter::Create(*source, {.output_dir = dir.Sub("short")});
  ASSERT_EQ(writer.status(), absl::OkStatus());
  ASSERT_EQ((*writer)->AddUnquantized(), absl::OkStatus());
  const std::vector<float> rows(304 * 128, 0.5f);
  ASSERT_EQ((*writer)->AddSliced(kLmHead, QuantizeMinMax(rows, 304, 128).views), absl::OkStatus());
  const absl::Status committed =
      (*writer)->Commit({{"price_table", {{"token", {{2, 1.0}}}}},
                         {"lm_head", {{"min_level", 2}, {"loss", {1, 1, 1, 1}}}}});
  EXPECT_THAT(committed.message(),
              HasSubstr("lm_head.slice_0: shape [19, 1, 512], expected [20, 1, 512]"));
}

TEST(LmHeadCheckpointTest, AnLmHeadInSlicesReadsBackWithAndWithoutTiedEmbeddings) {
  for (const bool tied : {true, false}) {
    TempDir dir;
    TestModelOptions options;
    options.tie_word_embeddings = tied;
    options.vocab_size = 330;  // not whole tiles
    ASSERT_EQ(WriteTestModels(dir, options, {.sliced_lm_head = true}), absl::OkStatus());
    const auto source = Checkpoint::Open(dir.Sub("float"), {});
    const auto checkpoint = Checkpoint::Open(dir.Sub("mobiquant"), kVerify);
    ASSERT_EQ(checkpoint.status(), absl::OkStatus());
    ASSERT_TRUE(checkpoint->lm_head().has_value());
    EXPECT_EQ(checkpoint->lm_head()->min_level, kTestLmHead.min_level);
    EXPECT_EQ(checkpoint->lm_head()->loss, kTestLmHead.loss);
    EXPECT_FALSE(checkpoint->Has("lm_head.weight"));
    const auto sliced = checkpoint->Sliced(kLmHead, 330, 128);
    ASSERT_EQ(sliced.status(), absl::OkStatus());
    const auto weights = source->Tensor(tied ? "model.embed_tokens.weight" : "lm_head.weight");
    const TestSliced expected = QuantizeMinMax(TestFloats(*weights), 330, 128);
    for (size_t i = 0; i < kNumSlices; ++i) {
      EXPECT_EQ(sliced->slices[i], expected.views.slices[i]);
      EXPECT_EQ(sliced->scales[i], expected.views.scales[i]);
    }
  }
}

}  // namespace
}  // namespace mobi
