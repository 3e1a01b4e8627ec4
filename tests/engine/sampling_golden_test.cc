// Sampling against transformers' logits processors on fixed logits: what is allowed, how likely it
// is, and that the backend draws by it. See tests/testdata/make_sampling_goldens.py.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "engine/sampling.h"
#include "engine/sequence.h"
#include "kernels/cpu/reference_ops.h"
#include "tests/engine/tokenizer_test_data.h"

namespace mobi {
namespace {

using ::nlohmann::json;

SamplingParams ParamsOf(const json& golden) {
  SamplingParams params;
  params.temperature = golden.value("temperature", 1.0f);
  params.top_k = golden.value("top_k", 0);
  params.top_p = golden.value("top_p", 1.0f);
  params.min_p = golden.value("min_p", 0.0f);
  params.repetition_penalty = golden.value("repetition_penalty", 1.0f);
  params.presence_penalty = golden.value("presence_penalty", 0.0f);
  params.frequency_penalty = golden.value("frequency_penalty", 0.0f);
  const json biases = golden.value("logit_bias", json::object());
  for (const auto& [token, bias] : biases.items()) {
    params.logit_bias.emplace_back(std::stoi(token), bias.get<float>());
  }
  return params;
}

// A sequence in the middle of its completion.
struct Halfway {
  Request request;
  Sequence sequence;

  Halfway(const json& goldens, const SamplingParams& params) {
    request.spec.sampling = params;
    request.spec.prompt = Ids(goldens["prompt"]);
    sequence.request = &request;
    sequence.tokens = request.spec.prompt;
    for (const int32_t token : Ids(goldens["generated"])) {
      sequence.tokens.push_back(token);
      ++sequence.generated_counts[token];
    }
  }
};

TEST(SamplingGolden, FiltersGiveTheProbabilitiesOfTransformers) {
  const json goldens = TestData("sampling_goldens.json");
  ASSERT_GE(goldens["cases"].size(), 70u);
  for (const json& golden : goldens["cases"]) {
    SCOPED_TRACE(golden["params"].dump());
    const Halfway halfway(goldens, ParamsOf(golden["params"]));
    auto logits = goldens["logits"][golden["row"].get<int>()].get<std::vector<float>>();
    const auto vocab = static_cast<int64_t>(logits.size());
    const std::vector<LogitEdit> edits = LogitEdits(halfway.sequence);
    SamplingRow row = MakeSamplingRow(halfway.sequence);
    row.edit_end = static_cast<int32_t>(edits.size());
    const std::vector<double> scores =
        reference::FilteredScores({logits.data(), DType::kF32, 1, vocab, vocab}, row, edits.data());
    const auto expected = golden["probabilities"].get<std::vector<double>>();
    ASSERT_EQ(scores.size(), expected.size());
    const double largest = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (const double score : scores) sum += std::exp(score - largest);
    for (size_t token = 0; token < scores.size(); ++token) {
      const double probability = std::exp(scores[token] - largest) / sum;
      EXPECT_EQ(probability > 0, expected[token] > 0) << token;
      EXPECT_NEAR(probability, expected[token], 1e-6 + 1e-4 * expected[token]) << token;
    }
  }
}

TEST(SamplingGolden, TheBackendDrawsByThem) {
  constexpr int kDraws = 20000;
  const json goldens = TestData("sampling_goldens.json");
  const std::unique_ptr<Backend> backend = CreateCpuBackend({.num_threads = 1});
  for (const json& golden : goldens["cases"]) {
    SCOPED_TRACE(golden["params"].dump());
    const Halfway halfway(goldens, ParamsOf(golden["params"]));
    auto logits = goldens["logits"][golden["row"].get<int>()].get<std::vector<float>>();
    const auto vocab = static_cast<int64_t>(logits.size());
    const std::vector<LogitEdit> edits = LogitEdits(halfway.sequence);
    std::vector<SamplingRow> rows(kDraws, MakeSamplingRow(halfway.sequence));
    for (int i = 0; i < kDraws; ++i) {
      rows[i].edit_end = static_cast<int32_t>(edits.size());
      rows[i].seed = 77 + static_cast<uint64_t>(i);
    }
    std::vector<Sampled> drawn(kDraws);
    backend->Sample({logits.data(), DType::kF32, 1, vocab, vocab},
                    {kDraws, rows.data(), edits.data()}, drawn.data());
    ASSERT_TRUE(backend->Synchronize().ok());
    std::vector<int> counts(logits.size(), 0);
    for (const Sampled& one : drawn) {
      ASSERT_GE(one.token, 0);
      ++counts[one.token];
    }
    const auto expected = golden["probabilities"].get<std::vector<double>>();
    for (size_t token = 0; token < counts.size(); ++token) {
      const double p = expected[token];
      if (p == 0) {
        EXPECT_EQ(counts[token], 0) << token;
      }
      // Five standard deviations: of some 3,400 comparisons none should be outside.
      const double deviation = std::sqrt(p * (1 - p) * kDraws);
      EXPECT_NEAR(counts[token], p * kDraws, 5 * deviation + 3) << token;
    }
  }
}

TEST(SamplingGolden, TemperatureZeroTakesTheLikeliestAfterEdits) {
  const json goldens = TestData("sampling_goldens.json");
  const std::unique_ptr<Backend> backend = CreateCpuBackend({.num_threads = 1});
  for (const json& golden : goldens["cases"]) {
    SCOPED_TRACE(golden["params"].dump());
    SamplingParams params = ParamsOf(golden["params"]);
    params.temperature = 0;
    const Halfway halfway(goldens, params);
    auto logits = goldens["logits"][golden["row"].get<int>()].get<std::vector<float>>();
    const auto vocab = static_cast<int64_t>(logits.size());
    const std::vector<LogitEdit> edits = LogitEdits(halfway.sequence);
    SamplingRow row = MakeSamplingRow(halfway.sequence);
    row.edit_end = static_cast<int32_t>(edits.size());
    Sampled drawn{-2, 0};
    backend->Sample({logits.data(), DType::kF32, 1, vocab, vocab}, {1, &row, edits.data()}, &drawn);
    ASSERT_TRUE(backend->Synchronize().ok());
    const auto expected = golden["probabilities"].get<std::vector<double>>();
    EXPECT_EQ(drawn.token, std::max_element(expected.begin(), expected.end()) - expected.begin());
  }
}

}  // namespace
}  // namespace mobi
