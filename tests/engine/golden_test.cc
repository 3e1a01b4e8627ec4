// The float model against transformers: logits, greedy continuations, loss of real text.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "engine/checkpoint.h"
#include "engine/kv_cache.h"
#include "engine/model.h"
#include "engine/safetensors.h"
#include "tests/engine/collecting_sink.h"
#include "tests/engine/loaded_engine.h"
#include "tests/paths.h"

namespace mobi {
namespace {

constexpr int kBlockSize = 16;

struct GoldenModel {
  std::string name;
  std::string dir;      // of the model folder
  std::string goldens;  // of NAME_logits.safetensors
};

std::vector<GoldenModel> GoldenModels() {
  const std::string root = MOBI_SOURCE_DIR;
  return {{"stories-llama", root + "/deploy/demo/model", root + "/tests/testdata"},
          {"wiki-llama", root + "/../shared/data/wiki-llama", root + "/../shared/data/goldens"}};
}

class GoldenTest : public testing::TestWithParam<GoldenModel> {
 protected:
  void SetUp() override {
    const GoldenModel& golden = GetParam();
    const std::string path = golden.goldens + "/" + golden.name + "_logits.safetensors";
    if (!std::filesystem::exists(golden.dir) || !std::filesystem::exists(path)) {
      GTEST_SKIP() << "needs " << golden.dir << " and " << path;
    }
    auto file = SafetensorsFile::Open(path);
    ASSERT_TRUE(file.ok()) << file.status();
    file_.emplace(*std::move(file));
  }

  template <typename T>
  absl::Span<const T> Golden(const std::string& name) {
    return file_->Find(name)->As<T>();
  }
  std::vector<int32_t> Ids(const std::string& name) {
    const auto ids = Golden<int32_t>(name);
    return {ids.begin(), ids.end()};
  }

  std::optional<SafetensorsFile> file_;
};

// All positions' logits of one prompt, straight through the model.
std::vector<float> PromptLogits(const Model& model, const std::vector<int32_t>& ids) {
  Backend& backend = model.backend();
  const int n = static_cast<int>(ids.size()), blocks = (n + kBlockSize - 1) / kBlockSize;
  auto kv = KvCache::Create(model.config(), blocks, kBlockSize, backend);
  auto act = Activations::Create(model.config(), n, backend);
  std::vector<int32_t> positions(n), table(blocks), query_start = {0, n}, context = {n};
  std::iota(positions.begin(), positions.end(), 0);
  std::iota(table.begin(), table.end(), 0);
  StepTensors step;
  step.num_tokens = n;
  step.token_ids = ids.data();
  step.positions = step.slots = positions.data();
  step.attention = {1, n, n, query_start.data(), context.data(), table.data(), blocks};
  model.Forward(step, *kv, *act);
  std::vector<float> logits(static_cast<size_t>(n) * model.config().vocab_size);
  model.Logits(act->normed.FirstRows(n), /*levels=*/nullptr,
               Tensor::Of(logits.data(), DType::kF32, n, model.config().vocab_size));
  EXPECT_TRUE(backend.Synchronize().ok());
  return logits;
}

TEST_P(GoldenTest, LogitsAgreeAndTheMostLikelyTokenIsTheSameEverywhere) {
  auto checkpoint = Checkpoint::Open(GetParam().dir, {});
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto backend = CreateCpuBackend({});
  auto model = Model::Load(*checkpoint, *backend, 0);
  ASSERT_TRUE(model.ok()) << model.status();
  const int vocab = (*model)->config().vocab_size;
  for (int p = 0; p < 4; ++p) {
    const std::string prefix = "p" + std::to_string(p);
    const std::vector<int32_t> ids = Ids(prefix + "_ids");
    const std::vector<float> logits = PromptLogits(**model, ids);
    const auto expected = Golden<float>(prefix + "_last_logits");
    const float* last = logits.data() + (ids.size() - 1) * vocab;
    double error = 0, norm = 0;
    for (int i = 0; i < vocab; ++i) {
      error += std::pow(double{last[i]} - expected[i], 2);
      norm += std::pow(double{expected[i]}, 2);
    }
    EXPECT_LT(std::sqrt(error / norm), 1e-4) << prefix;
    const auto top = Golden<int32_t>(prefix + "_top20_ids");
    for (size_t t = 0; t < ids.size(); ++t) {
      const float* row = logits.data() + t * vocab;
      EXPECT_EQ(std::max_element(row, row + vocab) - row, top[t * 20]) << prefix << " at " << t;
    }
  }
}

TEST_P(GoldenTest, GreedyTokensAreIdenticalAloneAndTogether) {
  auto loaded = LoadedEngine::Open(GetParam().dir);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  CollectingSink sinks[4];
  for (int p = 0; p < 4; ++p) {
    GenerationRequest request;
    request.prompt = Ids("p" + std::to_string(p) + "_ids");
    request.max_new_tokens = 64;
    request.sampling.temperature = 0;
    request.ignore_eos = true;
    ASSERT_TRUE((*loaded)->engine->Submit(request, &sinks[p]).ok());
  }
  for (int p = 0; p < 4; ++p) {
    const RequestEnd& end = sinks[p].Wait();
    EXPECT_TRUE(end.status.ok()) << end.status;
    EXPECT_EQ(sinks[p].completions[0], Ids("p" + std::to_string(p) + "_greedy")) << "prompt " << p;
    EXPECT_EQ(end.usage.completion_tokens, 64);
  }
}

TEST_P(GoldenTest, LossOfAWindowOfTextAgrees) {
  auto loaded = LoadedEngine::Open(GetParam().dir);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  GenerationRequest request;
  request.prompt = Ids("wt2_w0_ids");
  request.max_new_tokens = 0;
  request.prompt_logprobs = true;
  CollectingSink sink;
  ASSERT_TRUE((*loaded)->engine->Submit(request, &sink).ok());
  ASSERT_TRUE(sink.Wait().status.ok());
  const auto expected = Golden<float>("wt2_w0_nll");
  ASSERT_EQ(sink.prompt_logprobs.size(), request.prompt.size());
  ASSERT_EQ(expected.size(), request.prompt.size() - 1);
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_NEAR(-sink.prompt_logprobs[i + 1], expected[i], 2e-3) << "token " << i + 1;
  }
}

INSTANTIATE_TEST_SUITE_P(Models, GoldenTest, testing::ValuesIn(GoldenModels()),
                         [](const auto& param) {
                           std::string name = param.param.name;
                           name.erase(std::remove(name.begin(), name.end(), '-'), name.end());
                           return name;
                         });

}  // namespace
}  // namespace mobi
