// The load generator against a server over loopback.
#include "server/loadgen/load_test.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <thread>

#include "server/client.h"
#include "server/loadgen/bits_watch.h"
#include "tests/server/server_fixture.h"

namespace mobi {
namespace {

using std::chrono::milliseconds;
using testing::Each;

ScriptedEngine::Script Endless() {
  return [](const GenerationRequest& request, int) {
    return std::vector<int32_t>(request.max_new_tokens + 1, 65);
  };
}

std::vector<Outcome> RunLoad(TestServer& server, const std::vector<Arrival>& arrivals,
                             LoadTestOptions options = {}) {
  const RealClock clock;
  const Prompts prompts({.vocab_size = 256});
  LoadTest test(
      std::move(options), [&] { return server.Channel(); }, prompts, clock);
  return test.Run(arrivals, clock.Now());
}

TEST(LoadTest, SendsWhatThePlanSaysAndReportsWhatCameBack) {
  TestServer server({.script = Endless(), .step_time = milliseconds(1)});
  const auto arrivals =
      PoissonArrivals(std::vector<RatePhase>{{200, milliseconds(500)}}, {2, 30}, {2, 9}, 5);
  const auto outcomes = RunLoad(server, arrivals);
  ASSERT_EQ(outcomes.size(), arrivals.size());
  const auto submitted = server.engine().submitted();
  ASSERT_EQ(submitted.size(), arrivals.size());
  int prompt_tokens = 0;
  for (const auto& request : submitted) prompt_tokens += static_cast<int>(request.prompt.size());
  for (size_t i = 0; i < outcomes.size(); ++i) {
    const Outcome& o = outcomes[i];
    prompt_tokens -= arrivals[i].prompt_tokens;
    ASSERT_TRUE(o.status.ok()) << o.status;
    EXPECT_EQ(o.tokens, arrivals[i].new_tokens);
    EXPECT_GT(o.ttft, Duration::zero());
    EXPECT_GE(o.end, o.ttft);
    EXPECT_LT(o.gaps_ms.size(), static_cast<size_t>(o.tokens));
    EXPECT_GE(o.effective_bits, 0);
  }
  EXPECT_EQ(prompt_tokens, 0) << "a prompt was not as long as planned";
}

// A server that stands still must not slow the sender, and the wait must show in the latencies.
TEST(LoadTest, IsOpenLoop) {
  TestServer server({.script = Endless(), .paused = true});
  const std::vector<Arrival> arrivals(200, Arrival{.at = {}, .prompt_tokens = 4, .new_tokens = 3});
  std::thread resume([&] {
    EXPECT_TRUE(Eventually([&] { return server.engine().live() == 200; }));
    std::this_thread::sleep_for(milliseconds(100));
    server.engine().Pause(false);
  });
  const auto outcomes = RunLoad(server, arrivals, {.max_streams_per_connection = 16});
  resume.join();
  for (const Outcome& o : outcomes) {
    ASSERT_TRUE(o.status.ok()) << o.status;
    EXPECT_GE(o.ttft, milliseconds(100));
  }
}

TEST(LoadTest, ReportsRefusalsDeadlinesAndWhatItHadToCancel) {
  const std::vector<Arrival> arrivals(10, Arrival{.at = {}, .prompt_tokens = 4, .new_tokens = 3});
  const auto code_of = [](const Outcome& o) { return o.status.code(); };
  TestServer server({.script = Endless(), .paused = true});
  for (const Outcome& o : RunLoad(server, arrivals, {.deadline = milliseconds(50)})) {
    EXPECT_EQ(code_of(o), absl::StatusCode::kDeadlineExceeded);
  }
  for (const Outcome& o : RunLoad(server, arrivals, {.grace = milliseconds(50)})) {
    EXPECT_EQ(code_of(o), absl::StatusCode::kCancelled);
  }
  server.engine().RefuseSubmits(absl::ResourceExhaustedError("full"));
  for (const Outcome& o : RunLoad(server, arrivals)) {
    EXPECT_EQ(code_of(o), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(o.tokens, 0);
  }
  EXPECT_TRUE(Eventually([&] { return server.engine().live() == 0; }));
}

TEST(LoadTest, DrawsClassesByTheirShares) {
  TestServer server({.script = Endless()});
  const std::vector<Arrival> arrivals(400, Arrival{.at = {}, .prompt_tokens = 1, .new_tokens = 1});
  LoadTestOptions options;
  options.classes = {{"premium", 1}, {"standard", 3}};
  int premium = 0;
  for (const Outcome& o : RunLoad(server, arrivals, options)) {
    ASSERT_TRUE(o.status.ok()) << o.status;
    premium += o.priority_class == "premium" ? 1 : 0;
  }
  EXPECT_NEAR(premium, 100, 45);  // five standard deviations
}

TEST(BitsWatch, SeesLoadedBits) {
  TestServer server({.script = Endless(), .step_time = milliseconds(1)});
  const RealClock clock;
  auto watch = BitsWatch::Start(server.Channel(), clock.Now(), clock);
  EXPECT_EQ(watch.status().code(), absl::StatusCode::kUnimplemented);  // not the admin port
  watch = BitsWatch::Start(ConnectTo(server.admin_address()), clock.Now(), clock);
  ASSERT_TRUE(watch.ok()) << watch.status();
  RunLoad(server, {Arrival{.at = {}, .prompt_tokens = 4, .new_tokens = 1500}});
  const auto samples = (*watch)->Stop();
  EXPECT_GE(samples.size(), 2u);
  EXPECT_TRUE(std::any_of(samples.begin(), samples.end(),
                          [](const BitsSample& s) { return s.working && s.loaded_bits == 8; }));
}

}  // namespace
}  // namespace mobi
