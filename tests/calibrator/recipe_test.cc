#include "calibrator/recipe.h"

#include <gtest/gtest.h>

namespace mobi {
namespace {

TEST(RecipeTest, ChangesWhatItNamesAndKeepsTheRest) {
  const auto recipe = ParseRecipe(
      "statistics: {damping: 0.5, stream_levels: [1, 3]}\n"
      "joint: {enabled: false, level_weights: [1, 2, 3, 4.5]}\n"
      "tuning: {train: [true, false, true, false]}\n",
      "r.yaml");
  ASSERT_TRUE(recipe.ok()) << recipe.status();
  EXPECT_EQ(recipe->blocks.damping, 0.5);
  EXPECT_EQ(recipe->blocks.stream_levels, (std::vector<int>{1, 3}));
  EXPECT_FALSE(recipe->blocks.fit.joint_codes);
  EXPECT_EQ(recipe->blocks.level_weights[3], 4.5f);
  EXPECT_TRUE(recipe->tuning.train[2]);
  EXPECT_EQ(recipe->blocks.fit.passes, Recipe().blocks.fit.passes);
  EXPECT_TRUE(ParseRecipe("", "r.yaml").ok());
}

TEST(RecipeTest, RecordsEveryKeySoThatItCanBeReadBack) {
  Recipe recipe;
  recipe.blocks.fit.rounds = 7;
  recipe.routing.training.epochs = 3;
  recipe.routing.method = RoutingMethod::kGates;
  recipe.lm_head.slices = false;
  const nlohmann::json json = RecipeToJson(recipe);
  EXPECT_EQ(json["refine"]["rounds"], 7);
  EXPECT_EQ(json["routing"]["method"], "gates");
  const auto again = ParseRecipe(json.dump(), "config.json");  // JSON is YAML
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(RecipeToJson(*again), json);
}

TEST(RecipeTest, BaselinesHaveNames) {
  const auto gptq = ReadRecipe("gptq-3");
  ASSERT_TRUE(gptq.ok()) << gptq.status();
  EXPECT_EQ(gptq->blocks.fixed.method, FixedMethod::kGptq);
  EXPECT_EQ(gptq->blocks.fixed.bits, 3);
  EXPECT_EQ(RecipeToJson(*gptq)["baseline"]["method"], "gptq");
  EXPECT_EQ(RecipeToJson(*ParseRecipe(RecipeToJson(*gptq).dump(), "config.json")),
            RecipeToJson(*gptq));
  for (const char* name : {"gptq-9", "awq-3", "none-3", "gptq-"}) {
    EXPECT_EQ(ReadRecipe(name).status().code(), absl::StatusCode::kNotFound) << name;
  }
}

TEST(RecipeTest, ThePapersRecipeHasAName) {
  const auto paper = ReadRecipe("paper");
  ASSERT_TRUE(paper.ok()) << paper.status();
  const nlohmann::json json = RecipeToJson(*paper);
  EXPECT_EQ(json["base"]["method"], "clipping");
  EXPECT_EQ(json["routing"]["method"], "gates");
  EXPECT_EQ(json["lm_head"]["slices"], false);
  EXPECT_EQ(json["tuning"]["steps"], 0);
  EXPECT_EQ(json["statistics"]["positions"], 0);
  EXPECT_EQ(RecipeToJson(*ParseRecipe(json.dump(), "config.json")), json);
}

TEST(RecipeTest, MistakesAreNamedWithFileAndLine) {
  const auto message = [](const char* yaml) {
    return std::string(ParseRecipe(yaml, "r.yaml").status().message());
  };
  EXPECT_EQ(message("refine:\n  rounds: many\n"), "r.yaml:2: refine.rounds must be a whole number");
  EXPECT_EQ(message("refine:\n  rounds: -1\n"), "r.yaml:2: refine.rounds must be within 0 and 100");
  EXPECT_EQ(message("refine: {round: 1}\n"), "r.yaml:1: unknown key refine.round");
  EXPECT_EQ(message("joint:\n  level_weights: [1, 2]\n"),
            "r.yaml:2: joint.level_weights must be a list of 4");
  EXPECT_EQ(message("- 1\n"), "r.yaml:1: a recipe is a mapping of sections");
  EXPECT_EQ(message("statistics: {stream_levels: [2, 1]}\n"),
            "r.yaml: statistics.stream_levels must ascend");
  EXPECT_EQ(message("statistics: {damping: .nan}\n"),
            "r.yaml:1: statistics.damping must be within 1e-08 and 10");
  EXPECT_EQ(message("baseline: {method: awq}\n"),
            "r.yaml:1: baseline.method must be none, rtn, gptq or lwc");
  EXPECT_EQ(message("base: {method: guess}\n"), "r.yaml:1: base.method must be search or clipping");
  EXPECT_EQ(message("routing: {method: random}\n"),
            "r.yaml:1: routing.method must be losses or gates");
  EXPECT_NE(message("a: [1\n"), "");
}

TEST(RecipeTest, GatesAndSlicesOfLmHeadDoNotGoTogether) {
  const auto status = ParseRecipe("routing: {method: gates}\n", "r.yaml").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(std::string(status.message()),
            "r.yaml: routing.method gates needs lm_head.slices false: the price of gates is not in "
            "nats, by which lm_head's slices are chosen");
  EXPECT_TRUE(ParseRecipe("routing: {method: gates}\nlm_head: {slices: false}\n", "r.yaml").ok());
}

}  // namespace
}  // namespace mobi
