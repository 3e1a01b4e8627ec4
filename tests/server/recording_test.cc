// Recordings of load tests as text, and scored by the real server with the demo model.
#include "server/loadgen/recording.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "server/loadgen/load_test.h"
#include "tests/paths.h"
#include "tests/server/server_fixture.h"

namespace mobi {
namespace {

using testing::HasSubstr;

TEST(Recording, ReadsWhatItWrites) {
  std::mt19937_64 rng(1);
  std::vector<RecordedRequest> requests(50);
  const auto ids = [&](size_t count) {
    std::vector<int32_t> ids(count);
    for (int32_t& id : ids) id = static_cast<int32_t>(rng() % 100'000);
    return ids;
  };
  for (RecordedRequest& request : requests) {
    request.prompt = ids(1 + rng() % 20);
    request.completion = ids(1 + rng() % 20);
    if (rng() % 2) request.text = ids(request.completion.size());
    request.bits = std::uniform_real_distribution<double>(2, 8)(rng);
  }
  const auto again = ParseRecording(FormatRecording(requests), "r");
  ASSERT_TRUE(again.ok()) << again.status();
  ASSERT_EQ(again->size(), requests.size());
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ((*again)[i].prompt, requests[i].prompt);
    EXPECT_EQ((*again)[i].completion, requests[i].completion);
    EXPECT_EQ((*again)[i].text, requests[i].text);
    EXPECT_EQ((*again)[i].bits, requests[i].bits);
  }
}

TEST(Recording, BadLinesAreRefusedWithFileLineAndField) {
  const std::string good = R"({"prompt":[1],"completion":[2],"text":[3],"bits":4})";
  ASSERT_TRUE(ParseRecording(good, "r").ok());
  const std::pair<std::string, const char*> cases[] = {
      {"", "r: no requests"},
      {good + "\n{", "r:2: "},
      {"[]", "r:1: "},
      {R"({"completion":[2],"text":[],"bits":4})", "r:1: prompt: missing"},
      {R"({"prompt":[],"completion":[2],"text":[],"bits":4})", "r:1: prompt: is empty"},
      {R"({"prompt":[1],"completion":[],"text":[],"bits":4})", "r:1: completion: is empty"},
      {R"({"prompt":[1],"completion":[2],"text":[1,2],"bits":4})", "r:1: text: is not as long"},
      {R"({"prompt":[-1],"completion":[2],"text":[],"bits":4})", "r:1: prompt: has -1"},
      {R"({"prompt":[1],"completion":[2.5],"text":[],"bits":4})", "r:1: completion: has 2.5"},
      {R"({"prompt":[1],"completion":[2],"text":[],"bits":99})", "r:1: bits: "},
  };
  for (const auto& [text, message] : cases) {
    const auto parsed = ParseRecording(text, "r");
    ASSERT_FALSE(parsed.ok()) << text;
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(parsed.status().message()), HasSubstr(message));
  }
}

class RecordingTest : public testing::Test {
 protected:
  void SetUp() override {
    LoadOptions load;
    load.dir = MOBI_SOURCE_DIR "/deploy/demo/checkpoint";
    load.verify_manifest = false;
    auto model = LoadForTest(std::move(load), clock_);
    ASSERT_NE(model, nullptr);
    const auto ids = model->tokenizer->Encode(
        "Once upon a time there was a little girl named Lily. She loved to play outside in the "
        "park with her friends. One day she saw a big red ball under a tree and ran to it.",
        {.add_special_tokens = true});
    ASSERT_TRUE(ids.ok()) << ids.status();
    text_ = *ids;
    server_ = std::make_unique<TestServer>(std::move(model), TestServerOptions());
  }

  RealClock clock_;
  std::vector<int32_t> text_;
  std::unique_ptr<TestServer> server_;
};

TEST_F(RecordingTest, ALoadTestIsScoredAtItsBits) {
  const Prompts prompts({.text = text_, .vocab_size = 4096});
  const auto served_at = [&](float bits) {
    LoadTestOptions options;
    options.precision.set_pinned_bits(bits);
    LoadTest test(
        options, [&] { return server_->Channel(); }, prompts, clock_);
    const std::vector<Arrival> arrivals(12, {.prompt_tokens = 12, .new_tokens = 8});
    return RecordingOf(test.Run(arrivals, clock_.Now()), prompts);
  };
  RecordingScore scores[2];
  for (const int i : {0, 1}) {
    const float bits = i == 0 ? 8 : 2;
    const std::vector<RecordedRequest> recording = served_at(bits);
    ASSERT_EQ(recording.size(), 12u);
    for (const RecordedRequest& request : recording) {
      EXPECT_EQ(request.prompt.size(), 12u);
      EXPECT_EQ(request.prompt.front(), text_.front());
      EXPECT_EQ(request.completion.size(), 8u);
      EXPECT_EQ(request.text.size(), 8u);
      EXPECT_NEAR(request.bits, bits, 1e-3);
    }
    const auto score = ScoreRecording(*server_->Client(), recording, 100);
    ASSERT_TRUE(score.ok()) << score.status();
    scores[i] = *score;
    EXPECT_EQ(score->requests, 12);
    EXPECT_EQ(score->tokens, 96);
    EXPECT_NEAR(score->replayed_bits, bits, 1e-3);
    EXPECT_GT(score->text_perplexity, 1);
    EXPECT_GT(score->served_perplexity, 1);
  }
  // The same text, read with two bits and with eight; and what two bits say, judged by eight.
  EXPECT_GT(scores[1].text_perplexity, scores[0].text_perplexity);
  EXPECT_GT(scores[1].served_perplexity, scores[0].served_perplexity);
}

TEST_F(RecordingTest, TheReplayComesNearTheRecordedBits) {
  std::vector<RecordedRequest> requests;
  for (const double bits : {2.6, 3.4, 4.7, 5.5, 6.3}) {
    requests.push_back({.prompt = {text_.begin(), text_.begin() + 20},
                        .completion = {text_.begin() + 20, text_.begin() + 30},
                        .text = {text_.begin() + 20, text_.begin() + 30},
                        .bits = bits});
  }
  const auto score = ScoreRecording(*server_->Client(), requests, 5);
  ASSERT_TRUE(score.ok()) << score.status();
  EXPECT_NEAR(score->bits, 4.5, 1e-9);
  EXPECT_NEAR(score->replayed_bits, 4.5, 0.1);
  // Half of them: the first, the third.
  const auto part = ScoreRecording(*server_->Client(), requests, 2);
  ASSERT_TRUE(part.ok());
  EXPECT_EQ(part->requests, 2);
  EXPECT_NEAR(part->bits, (2.6 + 4.7) / 2, 1e-9);
}

}  // namespace
}  // namespace mobi
