// Slices that leave under KV pressure: what requests get is what they would have got, whatever is
// away, and nothing is lost on the way. On the CPU, and on CUDA where there is a GPU.
#include "engine/slice_residency.h"

#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <random>
#include <thread>

#include "engine/checkpoint.h"
#include "engine/step_runner.h"
#include "kernels/create_backend.h"
#include "tests/engine/collecting_sink.h"
#include "tests/engine/gate_sink.h"
#include "tests/engine/loaded_engine.h"
#include "tests/engine/refusing_backend.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

// One sequence's.
constexpr int kContext = 256;
constexpr int kOwnBlocks = 16;

// How many requests of a test hold blocks at the same time, and the fewest levels that they saw.
struct Company {
  Engine* engine = nullptr;
  int now = 0;
  std::atomic<int> most{0};
  std::atomic<int> fewest_levels{kNumLevels};
};

class CountingSink final : public TokenSink {
 public:
  explicit CountingSink(Company& company) : company_(company) {}
  bool OnToken(const TokenEvent& event) override {
    if (!counted_) company_.most = std::max(company_.most.load(), ++company_.now);
    counted_ = true;
    company_.fewest_levels =
        std::min(company_.fewest_levels.load(), company_.engine->stats().resident_levels);
    return inner_.OnToken(event);
  }
  void OnDone(const RequestEnd& end) override {
    if (counted_) --company_.now;
    inner_.OnDone(end);
  }
  const RequestEnd& Wait() { return inner_.Wait(); }
  const std::vector<int32_t>& tokens() { return inner_.completions[0]; }

 private:
  Company& company_;
  CollectingSink inner_;
  bool counted_ = false;
};

class SliceResidencyTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    auto backend = CreateBackend(GetParam(), 2);
    if (!backend.ok()) GTEST_SKIP() << "NOT RUN: " << backend.status().message();
    dir_ = &ModelFor((*backend)->page_bytes());
  }

  // Slices of one level make blocks for a few requests and not for all, whatever a page holds.
  static TempDir& ModelFor(size_t page_bytes) {
    static std::map<bool, TempDir> models;
    const bool large_pages = page_bytes > (1 << 20);
    const auto [entry, is_new] = models.try_emplace(large_pages);
    if (!is_new) return entry->second;
    TestModelOptions model;
    model.hidden_size = 256;
    model.intermediate_size = 1024;
    model.num_key_value_heads = 1;
    if (large_pages) {
      model.num_hidden_layers = 4;
      model.num_key_value_heads = 2;
      model.head_dim = 64;
    }
    EXPECT_TRUE(WriteTestModels(entry->second, model).ok());
    return entry->second;
  }

  static std::unique_ptr<Backend> NewBackend() {
    auto backend = CreateBackend(GetParam(), 2);
    EXPECT_TRUE(backend.ok()) << backend.status();
    return *std::move(backend);
  }

  // Residency that acts at the second look, so that no test has to wait for it.
  static EngineOptions Eager() {
    EngineOptions options;
    options.max_model_len = kContext;
    options.num_kv_blocks = kOwnBlocks;
    options.max_decode_slowdown = 1;  // blocks alone keep requests waiting
    options.max_expected_wait = options.max_queue_wait = std::chrono::hours(1);
    options.residency.enabled = true;
    options.residency.dwell = options.residency.patience = std::chrono::nanoseconds(1);
    return options;
  }

  void Open(const EngineOptions& options, std::unique_ptr<Backend> backend = NewBackend()) {
    engine_ = nullptr;
    loaded_.reset();
    checkpoint_.reset();
    auto checkpoint = Checkpoint::Open(dir_->Sub("mobiquant"), {});
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    checkpoint_ = std::make_unique<Checkpoint>(*std::move(checkpoint));
    loaded_ = std::make_unique<LoadedEngine>();
    loaded_->backend = std::move(backend);
    auto model = Model::Load(*checkpoint_, *loaded_->backend, 0);
    ASSERT_TRUE(model.ok()) << model.status();
    loaded_->model = *std::move(model);
    auto engine =
        Engine::Create(options, *loaded_->model, *checkpoint_, *loaded_->backend, loaded_->clock);
    ASSERT_TRUE(engine.ok()) << engine.status();
    loaded_->engine = *std::move(engine);
    engine_ = loaded_->engine.get();
  }

  static GenerationRequest Request(int seed, int prompt_length, int max_new_tokens) {
    std::mt19937 random(seed);
    GenerationRequest request;
    request.prompt.resize(prompt_length);
    for (int32_t& id : request.prompt) id = static_cast<int32_t>(random() % 256);
    request.max_new_tokens = max_new_tokens;
    request.sampling.seed = seed;
    request.ignore_eos = true;
    return request;
  }
  // Takes most of the own pool alone.
  static GenerationRequest Large(int seed) { return Request(seed, 200, 40); }
  static GenerationRequest AtLevel(GenerationRequest request, int level) {
    request.precision.level = level;
    return request;
  }

  std::vector<int32_t> Run(const GenerationRequest& request) {
    CollectingSink sink;
    EXPECT_TRUE(engine_->Submit(request, &sink).ok());
    EXPECT_TRUE(sink.Wait().status.ok()) << sink.Wait().status;
    return sink.completions[0];
  }

  // All of them at once, so that blocks are short however slowly this thread runs.
  std::vector<std::unique_ptr<CountingSink>> SubmitTogether(
      const std::vector<GenerationRequest>& requests, Company& company) {
    company.engine = engine_;
    std::vector<std::unique_ptr<CountingSink>> sinks;
    GateSink gate;
    EXPECT_TRUE(engine_->Submit(Request(9999, 4, 4), &gate).ok());
    EXPECT_TRUE(gate.WaitUntilHeld());
    for (const GenerationRequest& request : requests) {
      sinks.push_back(std::make_unique<CountingSink>(company));
      EXPECT_TRUE(engine_->Submit(request, sinks.back().get()).ok());
    }
    gate.Open();
    gate.WaitUntilDone();
    return sinks;
  }

  template <typename Condition>
  EngineStats WaitUntil(Condition condition) {
    for (;;) {
      const EngineStats stats = engine_->stats();
      if (condition(stats)) return stats;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  // Once nothing runs everything comes back, and the lent blocks go.
  void ExpectAllComesBack() {
    const EngineStats stats = WaitUntil([](const EngineStats& s) {
      return s.resident_levels == kNumLevels && s.running_requests == 0 && s.lent_kv_blocks == 0 &&
             s.free_kv_blocks == s.num_kv_blocks;
    });
    EXPECT_EQ(stats.num_kv_blocks, kOwnBlocks);
    EXPECT_EQ(stats.waiting_requests, 0);
    EXPECT_EQ(stats.slice_drops, stats.slice_restores);
  }

  const TempDir* dir_ = nullptr;
  std::unique_ptr<Checkpoint> checkpoint_;  // slices come back from it
  std::unique_ptr<LoadedEngine> loaded_;
  Engine* engine_ = nullptr;
};

// Steps of routed, capped and pinned sequences on a model of its own.
class CappedRun {
 public:
  CappedRun(const Checkpoint& checkpoint, bool coherent, std::unique_ptr<Backend> backend)
      : backend_(std::move(backend)) {
    auto model = Model::Load(checkpoint, *backend_, 0);
    EXPECT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    options_.coherent_decode = coherent;
    auto kv = KvCache::Create(model_->config(), 64, options_.block_size, *backend_);
    EXPECT_TRUE(kv.ok());
    const auto token = checkpoint.price_table(), shared = checkpoint.coherent_price_table();
    const Prices prices{PriceTable({token.begin(), token.end()}),
                        PriceTable({shared.begin(), shared.end()}), checkpoint.coherent_batch()};
    auto runner =
        StepRunner::Create(options_, kContext, *model_, prices, *std::move(kv), *backend_);
    EXPECT_TRUE(runner.ok());
    runner_ = std::make_unique<StepRunner>(*std::move(runner));
  }

  SlicePlanes& planes() { return model_->slice_planes(); }

  // Everything that `requests` were given: tokens, log-probabilities and bits of every step.
  std::vector<double> Generate(const std::vector<GenerationRequest>& requests, float target_bits,
                               int max_level) {
    std::vector<Request> live(requests.size());
    std::vector<ScheduledChunk> plan;
    int32_t block = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
      live[i].spec = requests[i];
      Sequence& s = live[i].sequences.emplace_back();
      s.request = &live[i];
      s.tokens = requests[i].prompt;
      for (int b = 0; b < 8; ++b) s.blocks.push_back(block++);
      plan.push_back({&s, 0, s.length(), false});
    }
    std::vector<double> given;
    for (int step = 0; step < 24; ++step) {
      const PrecisionTarget target{target_bits, {{0.2f, 0.1f, -0.1f}}};
      auto result = runner_->Run(plan, target, max_level);
      EXPECT_TRUE(result.ok()) << result.status();
      given.push_back(result->loaded_bits);
      for (const ChunkResult& chunk : result->chunks) {
        given.insert(given.end(), {static_cast<double>(chunk.token.token), chunk.token.logprob,
                                   chunk.effective_bits_sum});
        EXPECT_LE(chunk.last_effective_bits, BitsOfLevel(max_level));
        chunk.chunk.sequence->tokens.push_back(chunk.token.token);
      }
      for (ScheduledChunk& chunk : plan) {
        chunk = {chunk.sequence, chunk.sequence->length() - 1, 1, true};
      }
    }
    return given;
  }

 private:
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Model> model_;
  EngineOptions options_;
  std::unique_ptr<StepRunner> runner_;
};

TEST_P(SliceResidencyTest, DroppedSlicesEqualACapBitForBit) {
  auto checkpoint = Checkpoint::Open(dir_->Sub("mobiquant"), {});
  ASSERT_TRUE(checkpoint.ok());
  const RealClock clock;
  for (const bool coherent : {false, true}) {
    CappedRun whole(*checkpoint, coherent, NewBackend());
    CappedRun dropped(*checkpoint, coherent, NewBackend());
    for (int cap = kNumLevels - 1; cap >= 1; --cap) {
      std::vector<GenerationRequest> requests;
      for (int i = 0; i < 4; ++i) requests.push_back(Request(10 * cap + i, 20 + 11 * i, 99));
      requests.push_back(AtLevel(Request(10 * cap + 5, 30, 99), cap));
      requests.push_back(Request(10 * cap + 6, 30, 99));
      requests.back().precision = {2.0f, 2.0f + 0.5f * cap, 0};
      while (dropped.planes().resident_levels() > cap) dropped.planes().Drop();
      for (const float target : {1.6f * cap, 2.0f * cap}) {
        EXPECT_EQ(whole.Generate(requests, target, cap), dropped.Generate(requests, target, cap))
            << "levels up to " << cap << ", target " << target;
      }
    }
    while (dropped.planes().resident_levels() < kNumLevels) {
      ASSERT_TRUE(dropped.planes().Restore(clock, Duration::zero()).ok());
    }
    const std::vector<GenerationRequest> all = {Request(1, 40, 99), AtLevel(Request(2, 40, 99), 4)};
    EXPECT_EQ(whole.Generate(all, 6.5f, 4), dropped.Generate(all, 6.5f, 4)) << "after the return";
  }
}

TEST_P(SliceResidencyTest, PressureLendsBlocksAndTheyComeBackWithTheSameTokensThroughout) {
  std::vector<GenerationRequest> requests;
  for (int i = 0; i < 24; ++i) requests.push_back(AtLevel(Large(i), 1 + i % 2));
  EngineOptions off = Eager();
  off.residency.enabled = false;
  Open(off);
  std::vector<std::vector<int32_t>> expected;
  for (const GenerationRequest& request : requests) expected.push_back(Run(request));
  const GenerationRequest highest = AtLevel(Large(100), 4);
  const std::vector<int32_t> expected_highest = Run(highest);

  Open(Eager());
  for (int round = 0; round < 3; ++round) {
    Company company;
    const auto sinks = SubmitTogether(requests, company);
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_TRUE(sinks[i]->Wait().status.ok()) << sinks[i]->Wait().status;
      EXPECT_EQ(sinks[i]->tokens(), expected[i]) << i;
    }
    EXPECT_GE(company.most, 3) << "the own pool holds one of them";
    EXPECT_GT(engine_->stats().slice_drops, 0u);
    ExpectAllComesBack();
    EXPECT_EQ(Run(highest), expected_highest);
  }
}

TEST_P(SliceResidencyTest, ARequestThatNeedsWhatIsAwayGetsIt) {
  EngineOptions off = Eager();
  off.residency.enabled = false;
  Open(off);
  std::vector<GenerationRequest> picky = {AtLevel(Large(50), 4), AtLevel(Large(51), 3), Large(52),
                                          Large(53)};
  picky[2].precision = {5.0f, 5.0f, 0};
  picky[3].precision = {8.0f, 8.0f, 0};
  std::vector<std::vector<int32_t>> expected;
  for (const GenerationRequest& request : picky) expected.push_back(Run(request));

  Open(Eager());
  for (size_t i = 0; i < picky.size(); ++i) {
    // Far more than fit, so that slices leave; then the engine is held until the request is there.
    Company company{engine_};
    GateSink start, held([this] { return engine_->stats().resident_levels == 2; });
    ASSERT_TRUE(engine_->Submit(Request(9999, 4, 4), &start).ok());
    ASSERT_TRUE(start.WaitUntilHeld());
    ASSERT_TRUE(engine_->Submit(AtLevel(Large(999), 1), &held).ok());
    std::vector<std::unique_ptr<CountingSink>> crowd;
    for (int k = 0; k < 30; ++k) {
      crowd.push_back(std::make_unique<CountingSink>(company));
      ASSERT_TRUE(engine_->Submit(AtLevel(Large(1000 + k), 1), crowd.back().get()).ok());
    }
    start.Open();
    ASSERT_TRUE(held.WaitUntilHeld()) << "slices did not leave";
    CollectingSink sink;
    ASSERT_TRUE(engine_->Submit(picky[i], &sink).ok());
    held.Open();
    EXPECT_TRUE(sink.Wait().status.ok()) << sink.Wait().status;
    EXPECT_EQ(sink.completions[0], expected[i]) << i;
    for (auto& other : crowd) EXPECT_TRUE(other->Wait().status.ok());
    start.WaitUntilDone();
    held.WaitUntilDone();
  }
  ExpectAllComesBack();
}

TEST_P(SliceResidencyTest, WhileMemoryIsRefusedRequestsAreServedWithoutIt) {
  EngineOptions off = Eager();
  off.residency.enabled = false;
  Open(off);
  const GenerationRequest low = AtLevel(Large(60), 1), highest = AtLevel(Large(61), 4);
  const std::vector<int32_t> expected_low = Run(low), expected_highest = Run(highest);

  auto owned = std::make_unique<RefusingBackend>(NewBackend());
  RefusingBackend& backend = *owned;
  Open(Eager(), std::move(owned));
  backend.RefuseAfter(0);
  Company company;
  std::vector<GenerationRequest> crowd;
  for (int i = 0; i < 24; ++i) crowd.push_back(AtLevel(Large(70 + i), 1 + i % 2));
  for (auto& sink : SubmitTogether(crowd, company)) EXPECT_TRUE(sink->Wait().status.ok());
  EXPECT_GT(engine_->stats().slice_drops, 0u);
  // The crowd has gone and the slices want to come back, again and again.
  WaitUntil([&](const EngineStats&) { return backend.refused() >= 3; });
  EXPECT_LT(engine_->stats().resident_levels, kNumLevels);
  EXPECT_GT(engine_->stats().lent_kv_blocks, 0)
      << "what could not be used for slices is lent again";
  EXPECT_EQ(Run(low), expected_low);
  // One that needs what is away waits, and does not fail.
  CollectingSink sink;
  ASSERT_TRUE(engine_->Submit(highest, &sink).ok());
  const int refused = backend.refused();
  WaitUntil([&](const EngineStats&) { return backend.refused() >= refused + 3; });
  EXPECT_LT(engine_->stats().resident_levels, kNumLevels);
  backend.RefuseNothing();
  EXPECT_TRUE(sink.Wait().status.ok()) << sink.Wait().status;
  EXPECT_EQ(sink.completions[0], expected_highest);
  ExpectAllComesBack();
}

TEST_P(SliceResidencyTest, OffMeansOff) {
  EngineOptions options = Eager();
  options.residency.enabled = false;
  Open(options);
  Company company;
  std::vector<GenerationRequest> requests;
  for (int i = 0; i < 12; ++i) requests.push_back(Large(i));
  const auto sinks = SubmitTogether(requests, company);
  for (auto& sink : sinks) EXPECT_TRUE(sink->Wait().status.ok());
  EXPECT_EQ(company.most, 1);
  const EngineStats stats = engine_->stats();
  EXPECT_EQ(stats.slice_drops, 0u);
  EXPECT_EQ(stats.resident_levels, kNumLevels);
  EXPECT_EQ(stats.num_kv_blocks, kOwnBlocks);
}

TEST_P(SliceResidencyTest, ThePolicysFloorKeepsItsSlices) {
  Open(Eager());
  engine_->SetPrecision({.target_bits = 6.0f, .floor_bits = 4.5f});
  Company company;
  std::vector<GenerationRequest> requests;
  for (int i = 0; i < 24; ++i) requests.push_back(Large(i));
  const auto sinks = SubmitTogether(requests, company);
  for (auto& sink : sinks) EXPECT_TRUE(sink->Wait().status.ok());
  EXPECT_EQ(company.fewest_levels, 3) << "4.5 bits are routed within three levels";
  ExpectAllComesBack();
}

// Requests of every kind, cancelled at any time, with slices leaving and returning under them.
TEST_P(SliceResidencyTest, AStormLeaksNothingAndFailsNobody) {
  EngineOptions options = Eager();
  options.max_num_batched_tokens = 64;
  options.num_kv_blocks = kOwnBlocks + 5;
  Open(options);
  for (uint64_t seed = 0; seed < 4; ++seed) {
    std::mt19937 random(seed);
    const auto draw = [&](int low, int high) {
      return std::uniform_int_distribution<int>(low, high)(random);
    };
    std::vector<std::unique_ptr<CollectingSink>> sinks;
    std::vector<RequestId> ids;
    for (int i = 0; i < 60; ++i) {
      const int prompt = draw(1, 200);
      GenerationRequest request = Request(draw(0, 9), prompt, draw(1, kContext - prompt - 1));
      const int kind = draw(0, 9);
      if (kind == 0) request.precision.level = draw(1, 4);
      if (kind == 2) request.precision.min_bits = static_cast<float>(draw(2, 6));
      if (kind == 3) request.precision.min_bits = request.precision.max_bits = 3.5f;
      request.n = draw(1, 2);
      request.priority = draw(0, 1);
      engine_->SetPrecision({.target_bits = static_cast<float>(draw(2, 8)),
                             .floor_bits = static_cast<float>(draw(2, 4))});
      sinks.push_back(std::make_unique<CollectingSink>());
      const auto id = engine_->Submit(request, sinks.back().get());
      ASSERT_TRUE(id.ok()) << id.status();
      ids.push_back(*id);
      if (draw(0, 4) == 0) engine_->Cancel(ids[draw(0, static_cast<int>(ids.size()) - 1)]);
      if (draw(0, 9) == 0) sinks[draw(0, static_cast<int>(sinks.size()) - 1)]->WaitForTokens(1);
    }
    for (auto& sink : sinks) {
      const absl::Status& status = sink->Wait().status;
      EXPECT_TRUE(status.ok() || absl::IsCancelled(status)) << status;
      EXPECT_EQ(sink->times_done, 1);
    }
  }
  WaitUntil([](const EngineStats& s) {
    return s.resident_levels == kNumLevels && s.running_requests == 0 && s.lent_kv_blocks == 0 &&
           s.free_kv_blocks == s.num_kv_blocks;
  });
  RecordProperty("slice_drops", static_cast<int>(engine_->stats().slice_drops));
}

TEST_P(SliceResidencyTest, BadOptionsAreRefused) {
  Open(Eager());
  for (int i = 0; i < 4; ++i) {
    EngineOptions options = Eager();
    if (i == 0) options.residency.min_levels = 0;
    if (i == 1) options.residency.dwell = Duration::zero();
    if (i == 2) options.residency.restore_usage = 1.5;
    if (i == 3) options.residency.patience = -std::chrono::seconds(1);
    const auto engine =
        Engine::Create(options, *loaded_->model, *checkpoint_, *loaded_->backend, loaded_->clock);
    EXPECT_EQ(engine.status().code(), absl::StatusCode::kInvalidArgument) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, SliceResidencyTest, testing::Values("cpu", "cuda"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace mobi
