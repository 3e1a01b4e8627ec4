#include "calibrator/multiple_choice.h"

#include <gtest/gtest.h>

#include <fstream>

#include "nlohmann/json.hpp"
#include "tests/paths.h"

namespace mobi {
namespace {

TEST(MultipleChoiceTest, ReadsQuestionsAndNamesMistakes) {
  const auto questions = ParseQuestions(
      "{\"context\": \"A\", \"choices\": [\"b\", \"c\"], \"answer\": 1}\n\n"
      "{\"context\": \"\", \"choices\": [\"x\", \"y\", \"z\"], \"answer\": 0}",
      "q.jsonl");
  ASSERT_TRUE(questions.ok()) << questions.status();
  ASSERT_EQ(questions->size(), 2u);
  EXPECT_EQ((*questions)[0].answer, 1);
  EXPECT_EQ((*questions)[1].choices[2], "z");
  const auto message = [](const std::string& line) {
    return std::string(ParseQuestions("\n" + line, "q.jsonl").status().message());
  };
  EXPECT_EQ(message("{\"context\": 1}"), "q.jsonl:2: context must be a string");
  EXPECT_EQ(message("[1]"), "q.jsonl:2: not a JSON object");
  EXPECT_EQ(message("{\"context\": \"a\", \"choices\": [\"b\"], \"answer\": 0}"),
            "q.jsonl:2: choices must be a list of two or more strings");
  EXPECT_EQ(message("{\"context\": \"a\", \"choices\": [\"b\", \"\"], \"answer\": 0}"),
            "q.jsonl:2: choices must be strings that are not empty");
  EXPECT_EQ(message("{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": 2}"),
            "q.jsonl:2: answer must be a whole number from 0 to 1");
  EXPECT_EQ(message(""), "q.jsonl: no questions");
}

// Golden files were made with transformers: the same questions, every choice's log probability as
// lm-eval sums it.
void ExpectGolden(const std::string& model_dir, const std::string& golden_file) {
  const std::string data = std::string(MOBI_SOURCE_DIR) + "/tests/testdata/";
  std::ifstream in(data + golden_file);
  ASSERT_TRUE(in.good());
  const nlohmann::json golden = nlohmann::json::parse(in);
  ChoiceOptions options;
  options.model_dir = model_dir;
  options.data_path = data + "choices.jsonl";
  options.num_threads = 2;
  const auto results = EvaluateChoices(options, RealClock(), [](const ChoiceResult&) {});
  ASSERT_TRUE(results.ok()) << results.status();
  ASSERT_EQ(results->size(), 1u);
  const ChoiceResult& result = results->front();
  EXPECT_TRUE(result.is_float);
  ASSERT_EQ(result.logprobs.size(), golden["logprobs"].size());
  for (size_t q = 0; q < result.logprobs.size(); ++q) {
    ASSERT_EQ(result.logprobs[q].size(), golden["logprobs"][q].size());
    for (size_t c = 0; c < result.logprobs[q].size(); ++c) {
      const double expected = golden["logprobs"][q][c];
      EXPECT_NEAR(result.logprobs[q][c], expected, 2e-3 * std::abs(expected) + 1e-2)
          << "question " << q << " choice " << c;
    }
  }
  EXPECT_NEAR(result.acc, golden["acc"].get<double>(), 1e-9);
  EXPECT_NEAR(result.acc_norm, golden["acc_norm"].get<double>(), 1e-9);
}

TEST(MultipleChoiceTest, AgreesWithTransformersOnTheDemoModel) {
  ExpectGolden(std::string(MOBI_SOURCE_DIR) + "/deploy/demo/model", "choices_golden.json");
}

TEST(MultipleChoiceTest, AgreesWithTransformersOnTheReferenceModel) {
  const std::string model = std::string(MOBI_SOURCE_DIR) + "/../shared/data/wiki-llama";
  if (!std::ifstream(model + "/config.json").good()) GTEST_SKIP() << "needs " << model;
  ExpectGolden(model, "choices_wiki_llama_golden.json");
}

TEST(MultipleChoiceTest, ChoicesBeyondTheContextAreNamed) {
  const std::string path = testing::TempDir() + "/long.jsonl";
  std::string context;
  for (int i = 0; i < 3000; ++i) context += "once ";
  std::ofstream(path) << nlohmann::json(
      {{"context", context}, {"choices", {"a", "b"}}, {"answer", 0}});
  ChoiceOptions options;
  options.model_dir = std::string(MOBI_SOURCE_DIR) + "/deploy/demo/model";
  options.data_path = path;
  options.num_threads = 1;
  const auto status = EvaluateChoices(options, RealClock(), [](const ChoiceResult&) {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_NE(std::string(status.message()).find("question 1, choice 0"), std::string::npos);
}

}  // namespace
}  // namespace mobi
