// lm_head in slices: the level of a row of logits, the logits at a level, and requests through the
// engine.
#include "engine/lm_head.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "engine/model.h"
#include "engine/step_bench.h"
#include "engine/synthetic_weights.h"
#include "kernels/numeric.h"
#include "tests/engine/collecting_sink.h"
#include "tests/engine/loaded_engine.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

using Rows = std::vector<TokenPrecision>;

struct Choice {
  const char* name;
  int min_level;
  std::array<float, kNumLevels> loss;
  Rows rows;
  int num_coherent;
  std::vector<int> levels;
};

class LmHeadLevelTest : public testing::TestWithParam<Choice> {};

TEST_P(LmHeadLevelTest, FollowsPriceAndBounds) {
  SlicedLmHead head;
  head.levels = {GetParam().min_level, GetParam().loss};
  head.bytes = {100, 200, 300, 400};
  std::vector<uint8_t> levels(GetParam().rows.size());
  ChooseLmHeadLevels(head, GetParam().rows, GetParam().num_coherent, levels.data());
  EXPECT_EQ(std::vector<int>(levels.begin(), levels.end()), GetParam().levels);
}

// A level is worth its 100 bytes up to a price of 0.9, 0.09 and 0.009.
constexpr std::array<float, kNumLevels> kLoss = {100, 10, 1, 0.1f};

INSTANTIATE_TEST_SUITE_P(
    Table, LmHeadLevelTest,
    testing::Values(
        Choice{"bits are plenty", 2, kLoss, {{0.001f, 1, 4}}, 0, {4}},
        Choice{"between", 2, kLoss, {{0.05f, 1, 4}}, 0, {3}},
        Choice{"bits are scarce", 2, kLoss, {{0.5f, 1, 4}}, 0, {2}},
        Choice{"dearer than the lowest level", 2, kLoss, {{50, 1, 4}}, 0, {2}},
        Choice{"the lowest level is the first", 1, kLoss, {{50, 1, 4}}, 0, {1}},
        Choice{"pinned", 2, kLoss, {{1, 1, 1}, {1, 2, 2}, {1, 3, 3}, {1, 4, 4}}, 0, {2, 2, 3, 4}},
        Choice{"a token's bounds", 2, kLoss, {{0.001f, 1, 3}, {0.5f, 3, 4}}, 0, {3, 3}},
        Choice{"a bound below the lowest level", 3, kLoss, {{0.001f, 1, 2}}, 0, {3}},
        Choice{"each for itself", 2, kLoss, {{0.001f, 1, 4}, {0.5f, 1, 4}}, 0, {4, 2}},
        // The last level saves two tokens 2 x 0.9 / 0.05 = 36 bytes' worth, forty of them 720.
        Choice{"two share", 2, kLoss, {{0.05f, 1, 4}, {0.05f, 1, 4}}, 2, {3, 3}},
        Choice{"forty share", 2, kLoss, Rows(40, {0.05f, 1, 4}), 40, std::vector<int>(40, 4)},
        Choice{"shared levels stay within a token's bounds",
               2,
               kLoss,
               {{0.001f, 1, 4}, {0.001f, 1, 3}},
               2,
               {4, 3}},
        // What a pinned row reads anyway is free for those that share.
        Choice{"beside a pinned row", 2, kLoss, {{0.5f, 1, 4}, {1, 4, 4}}, 1, {4, 4}},
        Choice{"losses that rise do not tempt", 2, {1, 1, 2, 3}, {{1e-9f, 1, 4}}, 0, {2}}),
    [](const auto& info) {
      std::string name = info.param.name;
      for (char& c : name) c = std::isalnum(c) != 0 ? c : '_';
      return name;
    });

// logits[row] of W_level x in double, straight from the checkpoint's tensors.
std::vector<double> ExactLogits(const SlicedTensors& head, int level, const float* x) {
  std::vector<uint8_t> codes(static_cast<size_t>(head.rows * head.cols));
  const uint8_t* slices[kNumSlices];
  for (size_t i = 0; i < kNumSlices; ++i) slices[i] = head.slices[i].data();
  UnpackSlices(slices, head.rows, head.cols, kNumLevels, codes.data());
  std::vector<double> logits(static_cast<size_t>(head.rows));
  for (int64_t row = 0; row < head.rows; ++row) {
    for (int64_t col = 0; col < head.cols; ++col) {
      const int64_t pair = 2 * ScaleIndex(row, col / kGroupSize, head.cols);
      const auto& scales = head.scales[level - 1];
      const double fraction = (CodeAtLevel(codes[row * head.cols + col], level) + 0.5) /
                              static_cast<double>(1 << BitsOfLevel(level));
      logits[row] +=
          (HalfToFloat(scales[pair + 1]) + HalfToFloat(scales[pair]) * fraction) * x[col];
    }
  }
  return logits;
}

TEST(SlicedLmHeadTest, LogitsAreThoseOfEachRowsLevel) {
  for (const bool tied : {true, false}) {
    TempDir dir;
    TestModelOptions options;
    options.tie_word_embeddings = tied;
    options.vocab_size = 330;  // the last tile of rows is padded
    options.hidden_size = 256;
    ASSERT_TRUE(WriteTestModels(dir, options, {.sliced_lm_head = true}).ok());
    const auto checkpoint = Checkpoint::Open(dir.Sub("mobiquant"), {});
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const auto backend = CreateCpuBackend({.num_threads = 2});
    const auto model = Model::Load(*checkpoint, *backend, 0);
    ASSERT_TRUE(model.ok()) << model.status();
    ASSERT_EQ((*model)->logits_stride(), 336);

    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    constexpr int kRows = 9;
    std::vector<float> hidden(kRows * 256), logits(kRows * 336);
    for (float& x : hidden) x = normal(random);
    const std::vector<uint8_t> levels = {1, 2, 3, 4, 4, 2, 3, 1, 2};
    (*model)->Logits(Tensor::Of(hidden.data(), DType::kF32, kRows, 256), levels.data(),
                     {logits.data(), DType::kF32, kRows, 330, 336});
    ASSERT_TRUE(backend->Synchronize().ok());
    const auto head = checkpoint->Sliced(kLmHead, 330, 256);
    ASSERT_TRUE(head.ok()) << head.status();
    for (int i = 0; i < kRows; ++i) {
      const std::vector<double> exact = ExactLogits(*head, levels[i], &hidden[i * 256]);
      // Of inputs that are rounded to 16 bits.
      for (int v = 0; v < 330; ++v)
        EXPECT_NEAR(logits[i * 336 + v], exact[v], 1e-3) << i << " " << v;
    }
  }
}

class SlicedLmHeadEngineTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    dir_ = new TempDir();
    TestModelOptions options;
    options.vocab_size = 330;
    ASSERT_TRUE(WriteTestModels(*dir_, options, {.sliced_lm_head = true}).ok());
  }
  static void TearDownTestSuite() {
    delete dir_;
    dir_ = nullptr;
  }

  void Open(bool coherent) {
    EngineOptions options;
    options.max_num_batched_tokens = 96;
    options.coherent_decode = coherent;
    loaded_.reset();
    auto loaded = LoadedEngine::Open(dir_->Sub("mobiquant"), options);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    loaded_ = *std::move(loaded);
  }

  static GenerationRequest Request(int prompt_length, int max_new_tokens, int seed) {
    std::mt19937 random(seed);
    GenerationRequest request;
    for (int i = 0; i < prompt_length; ++i) request.prompt.push_back(random() % 256);
    request.max_new_tokens = max_new_tokens;
    request.sampling.seed = seed;
    request.ignore_eos = true;
    return request;
  }

  static TempDir* dir_;
  std::unique_ptr<LoadedEngine> loaded_;
};
TempDir* SlicedLmHeadEngineTest::dir_ = nullptr;

TEST_F(SlicedLmHeadEngineTest, PinnedRequestsGetTheSameLogitsAloneAndInCompany) {
  for (const bool coherent : {false, true}) {
    for (const PrecisionBand band : {PrecisionBand{2, 2, 0}, PrecisionBand{3.5f, 3.5f, 0},
                                     PrecisionBand{2, 8, 1}, PrecisionBand{2, 8, 3}}) {
      GenerationRequest request = Request(37, 24, 1);
      request.precision = band;
      CollectingSink alone, together;
      Open(coherent);
      ASSERT_TRUE(loaded_->engine->Submit(request, &alone).ok());
      alone.Wait();
      Open(coherent);  // nothing cached
      loaded_->engine->SetPrecision({6.0f, 0.1f, 0});
      std::vector<std::unique_ptr<CollectingSink>> company;
      for (int i = 0; i < 12; ++i) {
        company.push_back(std::make_unique<CollectingSink>());
        ASSERT_TRUE(
            loaded_->engine->Submit(Request(11 + 13 * i, 20, 100 + i), company.back().get()).ok());
      }
      ASSERT_TRUE(loaded_->engine->Submit(request, &together).ok());
      together.Wait();
      EXPECT_EQ(together.completions[0], alone.completions[0]);
      EXPECT_EQ(together.logprobs, alone.logprobs);
      for (auto& sink : company) sink->Wait();
    }
  }
}

// What a token was given when it was drawn is what scoring the text gives it, at every level.
TEST_F(SlicedLmHeadEngineTest, ScoringReadsTheLevelsOfGeneration) {
  Open(/*coherent=*/false);
  for (int level = 1; level <= kNumLevels; ++level) {
    GenerationRequest request = Request(30, 12, level);
    request.precision.level = level;
    CollectingSink drawn, scored;
    ASSERT_TRUE(loaded_->engine->Submit(request, &drawn).ok());
    drawn.Wait();
    GenerationRequest score = request;
    score.prompt.insert(score.prompt.end(), drawn.completions[0].begin(),
                        drawn.completions[0].end());
    score.max_new_tokens = 0;
    score.prompt_logprobs = true;
    ASSERT_TRUE(loaded_->engine->Submit(score, &scored).ok());
    scored.Wait();
    ASSERT_EQ(scored.prompt_logprobs.size(), score.prompt.size());
    for (size_t i = 0; i < 12; ++i) {
      EXPECT_NEAR(scored.prompt_logprobs[30 + i], drawn.logprobs[0][i], 1e-4) << level << " " << i;
    }
  }
}

TEST(SlicedLmHeadBenchTest, AStepMovesTheBytesOfItsLevel) {
  auto config = ConfigOfShape("wiki-llama");
  config->num_hidden_layers = 1;
  const auto backend = CreateCpuBackend({.num_threads = 1});
  std::array<double, 2> bytes_at_2, bytes_at_8;
  for (const bool sliced : {false, true}) {
    const auto weights =
        SyntheticWeights::Create("synthetic", *config, {.lm_head_min_level = sliced ? 3 : 0});
    ASSERT_TRUE(weights.ok()) << weights.status();
    const auto model = Model::Load(*weights, *backend, 64);
    ASSERT_TRUE(model.ok()) << model.status();
    const auto bench = StepBench::Create({.max_seqs = 2, .context = 33}, **model, *weights);
    ASSERT_TRUE(bench.ok()) << bench.status();
    ASSERT_TRUE((*bench)->Set(2, 8).ok());
    bytes_at_8[sliced] = (*bench)->StepBytes();
    ASSERT_TRUE((*bench)->Set(2, 2).ok());
    bytes_at_2[sliced] = (*bench)->StepBytes();
    EXPECT_EQ((*bench)->effective_bits(), 2);
  }
  const int64_t vocab = config->vocab_size, hidden = config->hidden_size;
  const auto whole = 2.0 * static_cast<double>(vocab * hidden);
  EXPECT_EQ(bytes_at_8[0] - bytes_at_8[1], whole - BytesAtLevel(vocab, hidden, 4));
  EXPECT_EQ(bytes_at_2[0] - bytes_at_2[1], whole - BytesAtLevel(vocab, hidden, 3));
}

}  // namespace
}  // namespace mobi
