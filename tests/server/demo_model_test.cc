// The demo model through gRPC: what a client asks of sampling and log-probabilities, end to end.
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/paths.h"
#include "tests/server/server_fixture.h"

namespace mobi {
namespace {

using ::testing::Each;
using ::testing::Ne;

class DemoModelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    LoadOptions load;
    load.dir = std::string(MOBI_SOURCE_DIR) + "/deploy/demo/checkpoint";
    load.threads = 1;
    auto model = LoadForTest(std::move(load), clock_);
    ASSERT_NE(model, nullptr);
    server_ = std::make_unique<TestServer>(std::move(model));
    stub_ = server_->Client();
  }

  // Pinned, so that company changes nothing.
  static v1::GenerateRequest Story(int max_new_tokens, float temperature) {
    v1::GenerateRequest request = TextRequest("Once upon a time", max_new_tokens);
    request.set_ignore_eos(true);
    request.mutable_sampling()->set_temperature(temperature);
    request.mutable_precision()->set_pinned_bits(4);
    return request;
  }
  Collected Ask(const v1::GenerateRequest& request) {
    Collected result = Collect(*stub_, request);
    EXPECT_TRUE(result.status.ok()) << result.status;
    return result;
  }
  static std::vector<v1::TokenLogprob> LogprobsOf(const Collected& result) {
    std::vector<v1::TokenLogprob> logprobs;
    for (const auto& message : result.messages) {
      for (const auto& chunk : message.chunks()) {
        logprobs.insert(logprobs.end(), chunk.logprobs().begin(), chunk.logprobs().end());
      }
    }
    return logprobs;
  }

  RealClock clock_;
  std::unique_ptr<TestServer> server_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

TEST_F(DemoModelTest, GreedyTokensAreTheLikeliest) {
  v1::GenerateRequest request = Story(20, 0);
  request.set_logprobs(5);
  const Collected result = Ask(request);
  const auto logprobs = LogprobsOf(result);
  ASSERT_EQ(logprobs.size(), 20u);
  std::string text;
  for (size_t i = 0; i < logprobs.size(); ++i) {
    const v1::TokenLogprob& logprob = logprobs[i];
    EXPECT_EQ(logprob.token_id(), result.token_ids[0][i]);
    EXPECT_LT(logprob.logprob(), 0);
    ASSERT_EQ(logprob.top_size(), 5);
    EXPECT_EQ(logprob.top(0).token_id(), logprob.token_id());
    EXPECT_EQ(logprob.top(0).logprob(), logprob.logprob());
    for (int j = 1; j < 5; ++j) EXPECT_LE(logprob.top(j).logprob(), logprob.top(j - 1).logprob());
    text += logprob.token();
  }
  EXPECT_EQ(text, result.text[0]);
}

// What a completion was worth when it was made, it is worth when it is read as a prompt.
TEST_F(DemoModelTest, ScoresOfACompletionAreThoseOfAPrompt) {
  v1::GenerateRequest request = Story(12, 1);
  request.set_logprobs(0);
  request.set_echo(true);
  const Collected made = Ask(request);
  ASSERT_TRUE(made.has_prompt);
  EXPECT_EQ(made.prompt.text(), "Once upon a time");
  v1::GenerateRequest scoring = Story(0, 1);
  scoring.set_prompt_logprobs(3);
  auto& ids = *scoring.mutable_token_ids()->mutable_ids();
  ids = made.prompt.token_ids();
  for (const int32_t id : made.token_ids[0]) ids.Add(id);
  const Collected read = Ask(scoring);
  ASSERT_EQ(read.prompt.logprobs_size(), ids.size() - 1);
  const auto logprobs = LogprobsOf(made);
  const int first = made.prompt.token_ids_size() - 1;
  for (int i = 0; i < static_cast<int>(logprobs.size()); ++i) {
    const v1::TokenLogprob& again = read.prompt.logprobs(first + i);
    EXPECT_EQ(again.token_id(), logprobs[i].token_id());
    EXPECT_NEAR(again.logprob(), logprobs[i].logprob(), 0.02) << i;
    ASSERT_EQ(again.top_size(), 3);
    EXPECT_GE(again.top(0).logprob(), again.logprob() - 1e-5);
    EXPECT_GE(again.top(0).logprob(), again.top(2).logprob());
  }
}

TEST_F(DemoModelTest, ASeedRepeatsAllCompletions) {
  v1::GenerateRequest request = Story(16, 1);
  request.set_n(3);
  request.mutable_sampling()->set_seed(11);
  const Collected once = Ask(request);
  const std::set<std::vector<int32_t>> different(once.token_ids.begin(), once.token_ids.end());
  EXPECT_EQ(different.size(), 3u) << "each completion draws for itself";
  EXPECT_EQ(Ask(request).token_ids, once.token_ids);
  request.mutable_sampling()->set_seed(12);
  EXPECT_NE(Ask(request).token_ids, once.token_ids);
}

TEST_F(DemoModelTest, BiasesForceAndForbid) {
  v1::GenerateRequest request = Story(6, 1);
  const int32_t favourite = Ask(Story(1, 0)).token_ids[0][0];
  (*request.mutable_sampling()->mutable_logit_bias())[favourite] = 100;
  EXPECT_THAT(Ask(request).token_ids[0], Each(favourite));
  (*request.mutable_sampling()->mutable_logit_bias())[favourite] = -100;
  EXPECT_THAT(Ask(request).token_ids[0], Each(Ne(favourite)));
}

}  // namespace
}  // namespace mobi
