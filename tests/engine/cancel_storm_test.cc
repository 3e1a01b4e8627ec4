// A hundred thousand requests of which most are cancelled or expire, at any moment of their lives:
// nothing leaks, everybody is told exactly once.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "tests/engine/loaded_engine.h"
#include "tests/engine/sanitized.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

class CountingSink final : public TokenSink {
 public:
  explicit CountingSink(std::atomic<int>& done) : done_(done) {}
  bool OnToken(const TokenEvent&) override { return true; }
  void OnDone(const RequestEnd&) override {
    EXPECT_FALSE(std::exchange(ended_, true));
    ++done_;
  }

 private:
  std::atomic<int>& done_;
  bool ended_ = false;
};

TEST(CancelStorm, EveryBlockComesBack) {
  constexpr int kThreads = 2;
  constexpr int kRequests = kSanitized ? 5000 : 50000;  // by each, at least
  const TempDir dir;
  TestModelOptions tiny;
  tiny.num_hidden_layers = 1;
  ASSERT_TRUE(WriteTestModels(dir, tiny).ok());
  EngineOptions options;
  options.num_kv_blocks = 32;
  // Refusals by the foretold wait are not what is tested, and would leave little to cancel.
  options.max_expected_wait = std::chrono::hours(1);
  options.max_num_seqs = 16;
  auto loaded = LoadedEngine::Open(dir.Sub("mobiquant"), options);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  Engine& engine = *(*loaded)->engine;
  const int baseline = engine.stats().free_kv_blocks;

  std::atomic<int> done{0};
  std::atomic<int> accepted{0};
  std::vector<std::vector<std::unique_ptr<CountingSink>>> sinks(kThreads);
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      std::vector<RequestId> alive;
      // However slow the machine is, some requests live long enough to be cancelled while they run.
      const auto enough = [&] {
        const EngineStats stats = engine.stats();
        return accepted > kThreads * kRequests / 4 && stats.generation_tokens > 1000 &&
               stats.prefix_cache_hits > 100;
      };
      for (int i = 0; i < kRequests || !enough(); ++i) {
        GenerationRequest request;
        // Few distinct prompts, so that cached blocks are shared.
        request.prompt.assign(1 + random() % 40, static_cast<int32_t>(random() % 3));
        request.max_new_tokens = 1 + static_cast<int>(random() % 30);
        request.n = 1 + static_cast<int>(random() % 2);
        request.priority = static_cast<int>(random() % 2);
        if (random() % 8 == 0) {
          request.deadline = (*loaded)->clock.Now() + std::chrono::microseconds(random() % 3000);
        }
        auto sink = std::make_unique<CountingSink>(done);
        const auto id = engine.Submit(std::move(request), sink.get());
        if (id.ok()) {
          ++accepted;
          sinks[t].push_back(std::move(sink));
          alive.push_back(*id);
        }
        while (alive.size() > 20 || (!id.ok() && !alive.empty())) {
          std::swap(alive[random() % alive.size()], alive.back());
          engine.Cancel(alive.back());
          if (random() % 8 == 0) engine.Cancel(alive.back());
          alive.pop_back();
          if (random() % 4 == 0) break;
        }
        // Now and then, and when it refuses, the engine gets on with what it has.
        if (!id.ok() || random() % 16 == 0)
          std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  while (engine.stats().running_requests + engine.stats().waiting_requests > 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  const EngineStats stats = engine.stats();
  EXPECT_EQ(done, accepted);
  RecordProperty("accepted", accepted);
  RecordProperty("tokens", static_cast<int>(stats.generation_tokens));
  RecordProperty("preemptions", static_cast<int>(stats.preemptions));
  EXPECT_EQ(stats.free_kv_blocks, baseline);
  EXPECT_EQ(stats.waiting_requests, 0);
  EXPECT_EQ(stats.waiting_tokens, 0);
}

}  // namespace
}  // namespace mobi
