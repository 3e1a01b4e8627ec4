// Whole models on CUDA beside the same models on the CPU: the text's perplexity, the most likely
// token at every position, and greedy completions, at every pinned level and at routed bits. The
// models are the demo checkpoint, a quantized wiki-llama where its float folder lies beside the
// checkout, and the folder that the environment variable MOBI_AGREEMENT_MODEL names.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "tests/engine/collecting_sink.h"
#include "tests/engine/loaded_engine.h"
#include "tests/engine/test_models.h"
#include "tests/paths.h"

namespace mobi {
namespace {

// The CPU computes in fp32, CUDA keeps activations in fp16 (11 bits). Over a model's layers that
// moves a log probability by a few hundredths, and may turn a token whose two best choices lie
// nearer than that. A fault in a kernel moves them by whole units.
constexpr double kLogprobTolerance = 0.15;
constexpr double kPerplexityTolerance = 0.001;
constexpr double kLeastAgreement = 0.99;

constexpr int kTexts = 8;
constexpr int kTextTokens = 160;
constexpr int kPromptTokens = 16;
constexpr int kGreedyTokens = 64;

// One way to choose the slices: a level everywhere, or bits by the router's prices.
struct Precision {
  std::string name;
  PrecisionBand band;
};

std::vector<Precision> Precisions() {
  std::vector<Precision> precisions;
  for (int level = 1; level <= kNumLevels; ++level) {
    precisions.push_back({"level " + std::to_string(level), {.level = level}});
  }
  for (const float bits : {3.0f, 4.0f, 6.0f}) {
    precisions.push_back(
        {std::to_string(static_cast<int>(bits)) + " bits", {.min_bits = bits, .max_bits = bits}});
  }
  return precisions;
}

using Text = std::vector<int32_t>;

// What a model says of a text: log p of each token but the first, and the two likeliest tokens
// there.
struct Reading {
  std::vector<float> logprobs;
  std::vector<TopLogprobs> top;
};

// All requests at once, so that they run in company.
std::vector<std::unique_ptr<CollectingSink>> RunAll(
    Engine& engine, const std::vector<GenerationRequest>& requests) {
  std::vector<std::unique_ptr<CollectingSink>> sinks;
  for (const GenerationRequest& request : requests) {
    sinks.push_back(std::make_unique<CollectingSink>());
    const auto id = engine.Submit(request, sinks.back().get());
    EXPECT_TRUE(id.ok()) << id.status();
    if (!id.ok()) return {};
  }
  for (const auto& sink : sinks) EXPECT_TRUE(sink->Wait().status.ok()) << sink->Wait().status;
  return sinks;
}

// The model's own words, at 8 bits: text that it finds likely, whatever it was trained on.
std::vector<Text> WriteTexts(Engine& engine, int32_t first, int length) {
  std::vector<GenerationRequest> requests(kTexts);
  for (int i = 0; i < kTexts; ++i) {
    requests[i].prompt = {first};
    requests[i].max_new_tokens = length - 1;
    requests[i].ignore_eos = true;
    requests[i].sampling.seed = static_cast<uint64_t>(i) + 1;
    requests[i].precision.level = kNumLevels;
  }
  std::vector<Text> texts;
  for (const auto& sink : RunAll(engine, requests)) {
    texts.push_back({first});
    const auto& tokens = sink->completions[0];
    texts.back().insert(texts.back().end(), tokens.begin(), tokens.end());
  }
  return texts;
}

std::vector<Reading> Read(Engine& engine, const std::vector<Text>& texts,
                          const PrecisionBand& band) {
  std::vector<GenerationRequest> requests(texts.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    requests[i].prompt = texts[i];
    requests[i].max_new_tokens = 0;
    requests[i].prompt_logprobs = true;
    requests[i].prompt_top_logprobs = 2;
    requests[i].precision = band;
    requests[i].cache_salt = std::to_string(i);
  }
  std::vector<Reading> readings;
  for (const auto& sink : RunAll(engine, requests)) {
    readings.push_back({sink->prompt_logprobs, sink->prompt_top});
  }
  return readings;
}

std::vector<Text> Greedy(Engine& engine, const std::vector<Text>& texts,
                         const PrecisionBand& band) {
  std::vector<GenerationRequest> requests(texts.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    requests[i].prompt.assign(texts[i].begin(), texts[i].begin() + kPromptTokens);
    requests[i].max_new_tokens = kGreedyTokens;
    requests[i].sampling.temperature = 0;
    requests[i].ignore_eos = true;
    requests[i].precision = band;
  }
  std::vector<Text> completions;
  for (const auto& sink : RunAll(engine, requests)) completions.push_back(sink->completions[0]);
  return completions;
}

struct Comparison {
  int positions = 0;
  int agreed = 0;           // the same likeliest token
  double widest_miss = 0;   // between the CPU's two best where they differ
  double largest_move = 0;  // of a log probability
  double cpu_nll = 0, cuda_nll = 0;
  int greedy_tokens = 0;
  int greedy_agreed = 0;  // up to the first difference of each completion

  double perplexity_ratio() const { return std::exp((cuda_nll - cpu_nll) / positions); }
};

void Compare(const Reading& cpu, const Reading& cuda, Comparison& sum) {
  ASSERT_EQ(cpu.logprobs.size(), cuda.logprobs.size());
  for (size_t i = 1; i < cpu.logprobs.size(); ++i) {
    ++sum.positions;
    sum.cpu_nll -= cpu.logprobs[i];
    sum.cuda_nll -= cuda.logprobs[i];
    sum.largest_move =
        std::max<double>(sum.largest_move, std::abs(cpu.logprobs[i] - cuda.logprobs[i]));
    const TopLogprobs& best = cpu.top[i];
    if (best.tokens[0] == cuda.top[i].tokens[0]) {
      ++sum.agreed;
    } else {
      sum.widest_miss = std::max<double>(sum.widest_miss, best.logprobs[0] - best.logprobs[1]);
    }
  }
}

void CompareGreedy(const Text& cpu, const Text& cuda, Comparison& sum) {
  const auto same = std::mismatch(cpu.begin(), cpu.end(), cuda.begin(), cuda.end()).first;
  sum.greedy_tokens += static_cast<int>(cpu.size());
  sum.greedy_agreed += static_cast<int>(same - cpu.begin());
}

void ExpectAgreement(const std::string& dir) {
  auto cuda_backend = CreateCudaBackend({});
  if (!cuda_backend.ok()) GTEST_SKIP() << "NOT COMPARED: " << cuda_backend.status().message();
  EngineOptions options;
  options.max_num_seqs = kTexts;
  auto cuda = LoadedEngine::Open(dir, options, *std::move(cuda_backend));
  ASSERT_TRUE(cuda.ok()) << cuda.status();
  auto cpu = LoadedEngine::Open(dir, options);
  ASSERT_TRUE(cpu.ok()) << cpu.status();
  const ModelConfig& config = (*cpu)->model->config();
  const int length = std::min(kTextTokens, (*cpu)->engine->max_model_len());
  const int32_t first = std::max(config.bos_token_id, 0);
  const std::vector<Text> texts = WriteTexts(*(*cpu)->engine, first, length);
  ASSERT_EQ(texts.size(), size_t{kTexts});
  std::printf("%s\n%-8s %9s %9s %9s %9s %9s %9s\n", dir.c_str(), "", "ppl cpu", "cuda/cpu",
              "same top", "of margin", "max move", "greedy");
  for (const Precision& precision : Precisions()) {
    SCOPED_TRACE(precision.name);
    Comparison sum;
    const auto cpu_read = Read(*(*cpu)->engine, texts, precision.band);
    const auto cuda_read = Read(*(*cuda)->engine, texts, precision.band);
    const auto cpu_greedy = Greedy(*(*cpu)->engine, texts, precision.band);
    const auto cuda_greedy = Greedy(*(*cuda)->engine, texts, precision.band);
    ASSERT_FALSE(testing::Test::HasFailure());
    for (size_t i = 0; i < texts.size(); ++i) {
      Compare(cpu_read[i], cuda_read[i], sum);
      CompareGreedy(cpu_greedy[i], cuda_greedy[i], sum);
    }
    const double agreement = static_cast<double>(sum.agreed) / sum.positions;
    std::printf("%-8s %9.4f %9.5f %8.2f%% %9.4f %9.4f %4d/%4d\n", precision.name.c_str(),
                std::exp(sum.cpu_nll / sum.positions), sum.perplexity_ratio(), 100 * agreement,
                sum.widest_miss, sum.largest_move, sum.greedy_agreed, sum.greedy_tokens);
    EXPECT_NEAR(sum.perplexity_ratio(), 1, kPerplexityTolerance);
    EXPECT_GE(agreement, kLeastAgreement);
    EXPECT_LE(sum.widest_miss, kLogprobTolerance);
    // A router may choose another level where two cost the same: then the move is a level's.
    if (precision.band.level != 0) {
      EXPECT_LE(sum.largest_move, kLogprobTolerance);
    }
  }
}

TEST(Agreement, DemoCheckpoint) {
  ExpectAgreement(std::string(MOBI_SOURCE_DIR) + "/deploy/demo/checkpoint");
}

TEST(Agreement, QuantizedWikiLlama) {
  const std::string folder = std::string(MOBI_SOURCE_DIR) + "/../shared/data/wiki-llama";
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << "NOT COMPARED: no " << folder;
  if (auto cuda = CreateCudaBackend({}); !cuda.ok()) {
    GTEST_SKIP() << "NOT COMPARED: " << cuda.status().message();
  }
  const TempDir dir;
  const auto status = WriteQuantizedTestModel(folder, dir.Sub("quantized"), {.router_hidden = 32});
  ASSERT_TRUE(status.ok()) << status;
  ExpectAgreement(dir.Sub("quantized"));
}

TEST(Agreement, ModelOfTheEnvironment) {
  const char* folder = std::getenv("MOBI_AGREEMENT_MODEL");
  if (folder == nullptr) GTEST_SKIP() << "NOT COMPARED: MOBI_AGREEMENT_MODEL is not set";
  ExpectAgreement(folder);
}

}  // namespace
}  // namespace mobi
