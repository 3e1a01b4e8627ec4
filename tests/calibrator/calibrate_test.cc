// The whole walk on tiny models: what is written can be served, bad input leaves nothing behind.
#include "calibrator/calibrate.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <utility>
#include <vector>

#include "calibrator/evaluate.h"
#include "engine/checkpoint.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

class CalibrateTest : public testing::Test {
 protected:
  void SetUp() override {
    std::mt19937_64 random(1);
    std::ofstream text(TextPath());
    for (int i = 0; i < 4000; ++i) {
      for (uint64_t letters = 1 + random() % 7; letters > 0; --letters) {
        text << static_cast<char>('a' + random() % 26);
      }
      text << (i % 17 == 16 ? ".\n" : " ");
    }
  }

  std::string TextPath() const { return dir_.Sub("text.txt"); }

  void MakeModel(const TestModelOptions& options = {}) {
    const absl::Status status = WriteTestModel(dir_.Sub("float"), options);
    ASSERT_TRUE(status.ok()) << status;
  }

  CalibrateOptions Options(const std::string& out) const {
    CalibrateOptions options;
    options.model_dir = dir_.Sub("float");
    options.data_paths = {TextPath()};
    options.output_dir = dir_.Sub(out);
    options.num_samples = 8;
    options.seq_len = 64;
    options.num_threads = 2;
    options.recipe.routing.sequences = 4;
    options.recipe.routing.price_tokens = 32;
    options.recipe.tuning.steps = 4;
    options.recipe.tuning.batch = 4;  // of the 8 sequences
    return options;
  }

  absl::Status Run(const CalibrateOptions& options) const {
    std::FILE* sink = std::fopen("/dev/null", "w");
    const absl::Status status = Calibrate(options, RealClock(), sink, false);
    std::fclose(sink);
    return status;
  }

  EvaluateOptions Evaluation(const std::string& dir, std::vector<float> bits,
                             int limit = 16) const {
    EvaluateOptions evaluate;
    evaluate.model_dir = dir_.Sub(dir);
    evaluate.data_path = TextPath();
    evaluate.window = 64;
    evaluate.limit = limit;
    evaluate.num_threads = 1;
    evaluate.bits = std::move(bits);
    return evaluate;
  }

  static absl::StatusOr<std::vector<EvaluateResult>> Evaluated(const EvaluateOptions& options) {
    return Evaluate(options, RealClock(), [](const EvaluateResult&) {});
  }

  // Nothing but the model and the text is left in the folder.
  void ExpectNothingWritten() const {
    for (const auto& entry : std::filesystem::directory_iterator(dir_.path())) {
      const std::string name = entry.path().filename().string();
      EXPECT_TRUE(name == "float" || name == "text.txt") << name;
    }
  }

  TempDir dir_;
};

TEST_F(CalibrateTest, WhatIsWrittenIsServedAndNearsTheFloatModelWithBits) {
  MakeModel();
  const absl::Status status = Run(Options("out"));
  ASSERT_TRUE(status.ok()) << status;
  const auto checkpoint = Checkpoint::Open(dir_.Sub("out"), {.verify_manifest = true});
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->price_table().size(), 61u);
  EXPECT_EQ(checkpoint->coherent_batch(), 4);
  EXPECT_EQ(checkpoint->quantization_config()["recipe"]["tuning"]["steps"], 4);

  const auto exact = Evaluated(Evaluation("float", {}));
  ASSERT_TRUE(exact.ok()) << exact.status();
  ASSERT_EQ(exact->size(), 1u);
  EXPECT_TRUE(exact->front().is_float);
  EXPECT_EQ(exact->front().predicted_tokens, 16 * 63);

  const EvaluateOptions evaluate = Evaluation("out", {2, 4, 5, 6, 8});
  const auto results = Evaluated(evaluate);
  ASSERT_TRUE(results.ok()) << results.status();
  const auto gap = [&](size_t i) { return std::abs((*results)[i].nll - exact->front().nll); };
  EXPECT_EQ((*results)[0].effective_bits, 2);
  EXPECT_EQ((*results)[4].effective_bits, 8);
  for (size_t i = 1; i < 4; ++i) {
    EXPECT_NEAR((*results)[i].effective_bits, evaluate.bits[i], 0.3);
  }
  EXPECT_LT(gap(4), 0.02);
  EXPECT_LT(gap(3), 0.05);
}

// The fitted pairs are served as they are, and whoever looks at the progress is told.
TEST_F(CalibrateTest, ModelsTooLargeToTuneAreNotTuned) {
  MakeModel();
  CalibrateOptions plain = Options("plain"), limited = Options("limited");
  plain.recipe.tuning.steps = 0;
  ASSERT_TRUE(Run(plain).ok());
  limited.recipe.tuning.max_memory_gib = 0;
  std::FILE* progress = std::fopen(dir_.Sub("progress").c_str(), "w");
  const absl::Status status = Calibrate(limited, RealClock(), progress, false);
  std::fclose(progress);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_NE(ReadAll(dir_.Sub("progress")).find("no tuning: it would need 1 GiB"),
            std::string::npos);
  EXPECT_TRUE(ReadAll(dir_.Sub("plain") + "/model.safetensors") ==
              ReadAll(dir_.Sub("limited") + "/model.safetensors"));
}

TEST_F(CalibrateTest, SameSeedSameCheckpoint) {
  MakeModel();
  ASSERT_TRUE(Run(Options("a")).ok());
  ASSERT_TRUE(Run(Options("b")).ok());
  CalibrateOptions other = Options("c");
  other.seed = 2;
  ASSERT_TRUE(Run(other).ok());
  const std::string a = ReadAll(dir_.Sub("a") + "/model.safetensors");
  EXPECT_TRUE(a == ReadAll(dir_.Sub("b") + "/model.safetensors"));
  EXPECT_FALSE(a == ReadAll(dir_.Sub("c") + "/model.safetensors"));
}

TEST_F(CalibrateTest, GoesOnWhereItWasInterruptedAndEndsWithTheSameCheckpoint) {
  MakeModel();
  CalibrateOptions options = Options("whole");
  options.recipe.lm_head.slices = true;
  // Tuning takes half of its windows' answers from the fit, if it was not interrupted in between.
  options.recipe.fit_positions = options.recipe.tuning.positions = 32;
  ASSERT_TRUE(Run(options).ok());
  options.output_dir = dir_.Sub("out");
  int asked = 0, tries = 0;
  // Every try gets a little further: a block is four questions, tuning, lm_head and routers some
  // more.
  absl::Status status;
  do {
    asked = 0;
    options.interrupted = [&] { return ++asked > 5; };
    status = Run(options);
    if (!status.ok()) {
      ASSERT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
      EXPECT_FALSE(std::filesystem::exists(dir_.Sub("out")));
    }
  } while (!status.ok() && ++tries < 10);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_GT(tries, 0);
  EXPECT_TRUE(ReadAll(dir_.Sub("out") + "/model.safetensors") ==
              ReadAll(dir_.Sub("whole") + "/model.safetensors"));
  EXPECT_FALSE(std::filesystem::exists(dir_.Sub("out.progress")));
}

// An lm_head of its own in slices: nothing of the float one is left, and 8 bits are near it.
TEST_F(CalibrateTest, AnLmHeadInSlicesIsServedAndCostsLittleAtHighBits) {
  TestModelOptions model;
  model.tie_word_embeddings = false;
  model.vocab_size = 330;
  MakeModel(model);
  CalibrateOptions options = Options("whole");
  options.recipe.lm_head.slices = false;
  ASSERT_TRUE(Run(options).ok());
  options.recipe.lm_head.slices = true;
  options.output_dir = dir_.Sub("sliced");
  const absl::Status status = Run(options);
  ASSERT_TRUE(status.ok()) << status;
  const auto checkpoint = Checkpoint::Open(dir_.Sub("sliced"), {.verify_manifest = true});
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_FALSE(checkpoint->Has("lm_head.weight"));
  ASSERT_TRUE(checkpoint->lm_head().has_value());
  EXPECT_EQ(checkpoint->lm_head()->min_level, options.recipe.lm_head.min_level);
  const std::array<float, kNumLevels> loss = checkpoint->lm_head()->loss;
  for (int k = 1; k < kNumLevels; ++k) EXPECT_LT(loss[k], loss[k - 1]) << k;

  const auto nll = [&](const std::string& dir) {
    // All windows: of sixteen, roundings alone make as much as what is looked for.
    const auto results = Evaluated(Evaluation(dir, {2, 8}, 0));
    EXPECT_TRUE(results.ok()) << results.status();
    return std::pair((*results)[0].nll, (*results)[1].nll);
  };
  const auto whole = nll("whole"), sliced = nll("sliced");
  EXPECT_NE(sliced.second, whole.second);
  EXPECT_NEAR(sliced.second, whole.second, 2e-3);
  // At 2 bits the head is read at min_level: its own error is small beside the linears'.
  EXPECT_NE(sliced.first, whole.first);
  EXPECT_NEAR(sliced.first, whole.first, 0.2);
}

TEST_F(CalibrateTest, BaselinesAreServedByTheSamePath) {
  MakeModel();
  const auto nll = [&](const std::string& dir) {
    const auto results = Evaluated(Evaluation(dir, {8}));
    EXPECT_TRUE(results.ok()) << results.status();
    return results.ok() ? results->front().nll : 0;
  };
  const double exact = nll("float");
  for (const char* name : {"rtn-8", "gptq-8", "lwc-8", "paper"}) {
    CalibrateOptions options = Options(name);
    const auto recipe = ReadRecipe(name);
    ASSERT_TRUE(recipe.ok()) << recipe.status();
    options.recipe = *recipe;
    options.recipe.blocks.clipping.base_epochs = 2;
    options.recipe.blocks.clipping.joint_epochs = 2;
    options.recipe.routing.training.epochs = 2;
    const absl::Status status = Run(options);
    ASSERT_TRUE(status.ok()) << status;
    // The paper's ranges begin with a fiftieth cut off both ends.
    EXPECT_NEAR(nll(name), exact, options.output_dir == dir_.Sub("paper") ? 0.1 : 0.01) << name;
  }
}

TEST_F(CalibrateTest, CoherentModeSharesLevelsAndMeetsTheEnds) {
  MakeModel();
  ASSERT_TRUE(Run(Options("out")).ok());
  EvaluateOptions evaluate = Evaluation("out", {2, 5, 8}, /*limit=*/8);
  const auto token = Evaluated(evaluate);
  evaluate.coherent = true;
  evaluate.batch = 4;
  const auto coherent = Evaluated(evaluate);
  ASSERT_TRUE(token.ok() && coherent.ok()) << token.status() << coherent.status();
  // At the ends every token reads the same level in either mode.
  for (const size_t i : {0, 2}) {
    EXPECT_EQ((*coherent)[i].effective_bits, (*token)[i].effective_bits);
    EXPECT_NEAR((*coherent)[i].nll, (*token)[i].nll, 2e-3);
  }
  EXPECT_NEAR((*coherent)[1].effective_bits, 5, 0.7);
  EXPECT_EQ((*coherent)[1].predicted_tokens, 8 * 63);
}

// What is served misses the target by what the price table does; asking for the difference meets
// it.
TEST_F(CalibrateTest, TrackedBitsMeetTheTargetOnTheWhole) {
  MakeModel();
  ASSERT_TRUE(Run(Options("out")).ok());
  EvaluateOptions evaluate = Evaluation("out", {2, 3.5f, 5}, /*limit=*/96);
  evaluate.num_threads = 2;
  evaluate.track_bits = true;
  for (const bool coherent : {false, true}) {
    evaluate.coherent = coherent;
    evaluate.batch = 4;
    const auto results = Evaluated(evaluate);
    ASSERT_TRUE(results.ok()) << results.status();
    for (const EvaluateResult& result : *results) {
      EXPECT_NEAR(result.effective_bits, result.target_bits, 0.02) << coherent;
    }
  }
}

TEST_F(CalibrateTest, ShortTextIsRefusedAndNothingIsWritten) {
  MakeModel();
  CalibrateOptions options = Options("out");
  options.num_samples = 100000;
  const absl::Status status = Run(options);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  ExpectNothingWritten();
}

TEST_F(CalibrateTest, WeightsThatAreNotNumbersAreNamed) {
  MakeModel();
  const std::string path = dir_.Sub("float") + "/model.safetensors";
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(-2, std::ios::end);
  file.write("\xc0\x7f", 2);  // NaN in bf16
  file.close();
  const absl::Status status = Run(Options("out"));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_NE(std::string(status.message()).find("NaN"), std::string::npos) << status;
  ExpectNothingWritten();
}

TEST_F(CalibrateTest, InputSizesThatAreNotWholeGroupsAreNamed) {
  TestModelOptions options;
  options.hidden_size = 192;
  MakeModel(options);
  const absl::Status status = Run(Options("out"));
  EXPECT_FALSE(status.ok());
  EXPECT_NE(std::string(status.message()).find("192"), std::string::npos) << status;
  ExpectNothingWritten();
}

TEST_F(CalibrateTest, QuantizedFoldersAreNotCalibratedAgain) {
  MakeModel();
  ASSERT_TRUE(Run(Options("out")).ok());
  CalibrateOptions again = Options("again");
  again.model_dir = dir_.Sub("out");
  EXPECT_EQ(Run(again).code(), absl::StatusCode::kFailedPrecondition);
}

// Parts of a text add up to the whole: what is measured in pieces is what one run would say.
TEST_F(CalibrateTest, WindowsReadInPartsAddUp) {
  MakeModel();
  EvaluateOptions options;
  options.model_dir = dir_.Sub("float");
  options.data_path = TextPath();
  options.window = 64;
  options.num_threads = 1;
  const auto evaluate = [&](int64_t skip, int64_t limit) {
    options.skip = skip;
    options.limit = limit;
    const auto results = Evaluate(options, RealClock(), [](const EvaluateResult&) {});
    EXPECT_TRUE(results.ok()) << results.status();
    return results.ok() ? results->front() : EvaluateResult();
  };
  const EvaluateResult all = evaluate(0, 0), first = evaluate(0, 5), rest = evaluate(5, 0);
  EXPECT_EQ(first.windows, 5);
  EXPECT_EQ(first.windows + rest.windows, all.windows);
  const auto sum = [](const EvaluateResult& r) {
    return r.nll * static_cast<double>(r.predicted_tokens);
  };
  EXPECT_NEAR(sum(first) + sum(rest), sum(all), 1e-6 * sum(all));
  options.skip = all.windows;
  EXPECT_EQ(Evaluate(options, RealClock(), [](const EvaluateResult&) {}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(CalibrateTest, EvaluationRefusesWhatItCannotDo) {
  MakeModel();
  const auto ignore = [](const EvaluateResult&) {};
  EvaluateOptions options;
  options.model_dir = dir_.Sub("float");
  options.data_path = TextPath();
  options.window = 100000;
  EXPECT_EQ(Evaluate(options, RealClock(), ignore).status().code(),
            absl::StatusCode::kInvalidArgument);
  options.window = 64;
  options.bits = {1.5f};
  EXPECT_EQ(Evaluate(options, RealClock(), ignore).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace mobi
