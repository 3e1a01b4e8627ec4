// Batch invariance of a whole model on CUDA: what a pinned request gives does not depend on who
// shares its steps, whose kernels do.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/engine/collecting_sink.h"
#include "tests/engine/loaded_engine.h"
#include "tests/paths.h"

namespace mobi {
namespace {

constexpr int kCompany = 6;
constexpr int kCompanyTokens = 300;

GenerationRequest Pinned(int length, int vocab_size, int level) {
  GenerationRequest request;
  for (int i = 0; i < length; ++i) request.prompt.push_back((i * 7919 + 13) % vocab_size);
  request.max_new_tokens = 8;
  request.sampling.temperature = 0;
  request.ignore_eos = true;
  request.prompt_logprobs = true;
  request.precision.level = level;
  request.cache_salt = "read anew";
  return request;
}

TEST(Company, APinnedPromptHasTheSameBitsAloneAndBesideDecodesThatChoose) {
  auto backend = CreateCudaBackend({});
  if (!backend.ok()) GTEST_SKIP() << "NOT COMPARED: " << backend.status().message();
  EngineOptions options;
  options.max_num_seqs = kCompany + 1;
  options.coherent_decode = true;
  auto loaded = LoadedEngine::Open(std::string(MOBI_SOURCE_DIR) + "/deploy/demo/checkpoint",
                                   options, *std::move(backend));
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  Engine& engine = *(*loaded)->engine;
  const int vocab_size = (*loaded)->model->config().vocab_size;
  for (const int length : {40, 100, 700}) {  // short, long, in two chunks
    for (const int level : {1, 3}) {
      GenerationRequest request = Pinned(length, vocab_size, level);
      CollectingSink alone;
      ASSERT_TRUE(engine.Submit(request, &alone).ok());
      ASSERT_TRUE(alone.Wait().status.ok());

      std::vector<std::unique_ptr<CollectingSink>> company;
      for (int i = 0; i < kCompany; ++i) {
        GenerationRequest other;
        other.prompt = {i + 5};
        other.max_new_tokens = kCompanyTokens;
        other.ignore_eos = true;
        ASSERT_TRUE(engine.Submit(other, company.emplace_back(new CollectingSink).get()).ok());
      }
      for (const auto& sink : company) sink->WaitForTokens(2);
      request.cache_salt = "and once more";
      CollectingSink beside;
      ASSERT_TRUE(engine.Submit(request, &beside).ok());
      ASSERT_TRUE(beside.Wait().status.ok());
      for (const auto& sink : company) ASSERT_TRUE(sink->Wait().status.ok());

      EXPECT_EQ(beside.prompt_logprobs, alone.prompt_logprobs) << length << " at " << level;
      EXPECT_EQ(beside.completions[0], alone.completions[0]) << length << " at " << level;
    }
  }
}

}  // namespace
}  // namespace mobi
