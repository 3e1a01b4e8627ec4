// Two thousand streams at once: all complete, and each takes little memory.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <thread>

#include "server/client.h"
#include "server/loadgen/load_test.h"
#include "tests/engine/sanitized.h"
#include "tests/server/server_fixture.h"

namespace mobi {
namespace {

double ResidentKib() {
  std::ifstream file("/proc/self/statm");
  double pages = 0;
  double resident = 0;
  file >> pages >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1024;
}

std::vector<Outcome> RunStreams(TestServer& server, int count, int tokens) {
  const RealClock clock;
  const Prompts prompts({.vocab_size = 256});
  LoadTest test(
      {}, [&] { return server.Channel(); }, prompts, clock);
  return test.Run(
      std::vector<Arrival>(count, Arrival{.at = {}, .prompt_tokens = 16, .new_tokens = tokens}),
      clock.Now());
}

TEST(ManyStreams, AllCompleteInLittleMemory) {
  constexpr int kStreams = 2000;
  constexpr int kTokens = 10;
  ScriptedEngine::Options engine;
  engine.script = [](const GenerationRequest&, int) {
    return std::vector<int32_t>(kTokens + 1, 65);
  };
  engine.step_time = std::chrono::milliseconds(10);
  engine.paused = true;
  TestServer server(std::move(engine));
  const double before = ResidentKib();
  double open = before;
  double most = before;
  std::thread watch([&] {
    while (server.engine().live() < kStreams) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    open = ResidentKib();
    server.engine().Pause(false);
    while (server.engine().ended() < kStreams) {
      most = std::max(most, ResidentKib());
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  });
  const auto outcomes = RunStreams(server, kStreams, kTokens);
  watch.join();
  for (const Outcome& outcome : outcomes) {
    ASSERT_TRUE(outcome.status.ok()) << outcome.status;
    ASSERT_EQ(outcome.tokens, kTokens);
  }
  EXPECT_TRUE(Eventually([&] { return server.server().running_requests() == 0; }));
  RecordProperty("kib_per_stream_open", static_cast<int>((open - before) / kStreams));
  RecordProperty("kib_per_stream_most", static_cast<int>((most - before) / kStreams));
  if (kSanitized) return;
  // The client's side of every stream counts too, for it lives in this process.
  EXPECT_LT((most - before) / kStreams, 64.0);
}

}  // namespace
}  // namespace mobi
