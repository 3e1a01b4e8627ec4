// The engine over tiny random models: what a request gets, whatever else happens around it.
#include "engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <thread>

#include "tests/engine/collecting_sink.h"
#include "tests/engine/gate_sink.h"
#include "tests/engine/loaded_engine.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

class EngineTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    dir_ = new TempDir();
    ASSERT_TRUE(WriteTestModels(*dir_).ok());
  }
  static void TearDownTestSuite() {
    delete dir_;
    dir_ = nullptr;
  }

  void Open(const EngineOptions& options = {}, const std::string& folder = "mobiquant") {
    loaded_.reset();
    auto loaded = LoadedEngine::Open(dir_->Sub(folder), options);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    loaded_ = *std::move(loaded);
    engine_ = loaded_->engine.get();
  }

  std::vector<int32_t> Prompt(int length, int seed = 1) {
    std::mt19937 random(seed);
    std::vector<int32_t> prompt(length);
    for (int32_t& id : prompt) id = static_cast<int32_t>(random() % 256);
    return prompt;
  }

  GenerationRequest Request(int prompt_length, int max_new_tokens, int seed = 1) {
    GenerationRequest request;
    request.prompt = Prompt(prompt_length, seed);
    request.max_new_tokens = max_new_tokens;
    request.sampling.seed = seed;
    request.ignore_eos = true;
    return request;
  }

  std::vector<int32_t> Run(const GenerationRequest& request) {
    CollectingSink sink;
    EXPECT_TRUE(engine_->Submit(request, &sink).ok());
    EXPECT_TRUE(sink.Wait().status.ok()) << sink.Wait().status;
    return sink.completions[0];
  }

  // Blocks return within a step of the end; stats are published after it.
  void ExpectAllBlocksFree() {
    EngineStats stats;
    for (int i = 0; i < 2000; ++i) {
      stats = engine_->stats();
      if (stats.free_kv_blocks == stats.num_kv_blocks && stats.running_requests == 0) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_EQ(stats.free_kv_blocks, stats.num_kv_blocks);
    EXPECT_EQ(stats.waiting_requests, 0);
    EXPECT_EQ(stats.waiting_tokens, 0);
  }

  static TempDir* dir_;
  std::unique_ptr<LoadedEngine> loaded_;
  Engine* engine_ = nullptr;
};
TempDir* EngineTest::dir_ = nullptr;

TEST_F(EngineTest, GeneratesAndReportsUsage) {
  Open();
  CollectingSink sink;
  ASSERT_TRUE(engine_->Submit(Request(20, 10), &sink).ok());
  const RequestEnd& end = sink.Wait();
  EXPECT_TRUE(end.status.ok());
  EXPECT_EQ(end.reason, FinishReason::kLength);
  EXPECT_EQ(end.usage.prompt_tokens, 20);
  EXPECT_EQ(end.usage.completion_tokens, 10);
  EXPECT_EQ(sink.completions[0].size(), 10u);
  EXPECT_EQ(sink.times_done, 1);
  EXPECT_NEAR(end.mean_effective_bits, 8.0, 1e-6);
  ExpectAllBlocksFree();
}

TEST_F(EngineTest, PinnedPrecisionGivesTheSameTokensAloneAndInCompany) {
  EngineOptions options;
  options.max_num_batched_tokens = 96;
  for (const PrecisionBand band : {PrecisionBand{2, 2, 0}, PrecisionBand{3.5f, 3.5f, 0},
                                   PrecisionBand{8, 8, 0}, PrecisionBand{2, 8, 3}}) {
    Open(options);
    GenerationRequest request = Request(37, 24);
    request.precision = band;
    const std::vector<int32_t> alone = Run(request);
    Open(options);  // nothing cached
    engine_->SetPrecision({4.0f, {{0.1f, -0.1f, 0}}});
    std::vector<std::unique_ptr<CollectingSink>> company;
    for (int i = 0; i < 12; ++i) {
      company.push_back(std::make_unique<CollectingSink>());
      ASSERT_TRUE(engine_->Submit(Request(11 + 13 * i, 20, 100 + i), company.back().get()).ok());
    }
    EXPECT_EQ(Run(request), alone) << band.min_bits << " " << band.level;
    for (auto& sink : company) sink->Wait();
  }
}

TEST_F(EngineTest, ChunkedPrefillAndPreemptionDoNotChangeTokens) {
  Open();
  std::vector<std::vector<int32_t>> expected;
  std::vector<GenerationRequest> requests;
  for (int i = 0; i < 6; ++i) {
    requests.push_back(Request(40 + 9 * i, 60, i));
    requests.back().precision = {4, 4, 0};
    expected.push_back(Run(requests.back()));
  }
  EngineOptions tight;
  tight.max_num_seqs = 6;
  tight.max_num_batched_tokens = 16;
  tight.num_kv_blocks = 20;
  tight.max_model_len = 200;
  Open(tight);
  CollectingSink sinks[6];
  for (int i = 0; i < 6; ++i) ASSERT_TRUE(engine_->Submit(requests[i], &sinks[i]).ok());
  for (int i = 0; i < 6; ++i) {
    EXPECT_TRUE(sinks[i].Wait().status.ok());
    EXPECT_EQ(sinks[i].completions[0], expected[i]) << i;
  }
  EXPECT_GT(engine_->stats().preemptions, 0u) << "the test is meant to preempt";
  ExpectAllBlocksFree();
}

TEST_F(EngineTest, CompletionsOfOneRequestShareThePromptAndDiffer) {
  Open();
  GenerationRequest request = Request(64, 16);
  request.n = 4;
  CollectingSink sink;
  ASSERT_TRUE(engine_->Submit(request, &sink).ok());
  const RequestEnd& end = sink.Wait();
  EXPECT_EQ(end.usage.completion_tokens, 64);
  EXPECT_EQ(sink.ends.size(), 4u);
  EXPECT_NE(sink.completions[0], sink.completions[1]);
  EXPECT_GE(engine_->stats().prefix_cache_hits, 3u * 48);
}

TEST_F(EngineTest, ASecondRequestFindsItsPrefixCachedAndSaysSo) {
  Open();
  const std::vector<int32_t> first = Run(Request(80, 8));
  CollectingSink sink;
  ASSERT_TRUE(engine_->Submit(Request(80, 8), &sink).ok());
  EXPECT_EQ(sink.Wait().usage.cached_tokens, 64);
  EXPECT_EQ(sink.completions[0], first);
}

TEST_F(EngineTest, StopsWhereItIsTold) {
  Open();
  GenerationRequest request = Request(20, 30);
  const std::vector<int32_t> tokens = Run(request);
  // A stop id ends the completion and is not part of it.
  const auto at = std::find(tokens.begin(), tokens.end(), tokens[7]) - tokens.begin();
  request.stop_ids = {tokens[7]};
  CollectingSink stopped;
  ASSERT_TRUE(engine_->Submit(request, &stopped).ok());
  EXPECT_EQ(stopped.Wait().reason, FinishReason::kStop);
  EXPECT_EQ(static_cast<std::ptrdiff_t>(stopped.completions[0].size()), at);
  EXPECT_EQ(stopped.ends.at(0).stop_id, tokens[7]);
  // A sink's no ends it with the token.
  request.stop_ids.clear();
  CollectingSink full(5);
  ASSERT_TRUE(engine_->Submit(request, &full).ok());
  EXPECT_EQ(full.Wait().reason, FinishReason::kStop);
  EXPECT_EQ(full.completions[0].size(), 5u);
  // The context ends it as length.
  CollectingSink longest;
  ASSERT_TRUE(engine_->Submit(Request(250, 100), &longest).ok());
  EXPECT_EQ(longest.Wait().reason, FinishReason::kLength);
  EXPECT_EQ(longest.completions[0].size(), 6u);
}

TEST_F(EngineTest, EffectiveBitsAreExactAtPinnedLevelsAndAtAFloor) {
  Open();
  for (int level = 1; level <= 4; ++level) {
    GenerationRequest request = Request(20, 5, level);
    request.precision.level = level;
    CollectingSink sink;
    ASSERT_TRUE(engine_->Submit(request, &sink).ok());
    EXPECT_NEAR(sink.Wait().mean_effective_bits, 2.0 * level, 1e-6);
    for (const float bits : sink.bits) EXPECT_FLOAT_EQ(bits, 2.0f * level);
    // The prompt gives the first of five tokens, four decodes the others; stats are published after
    // a step.
    while (engine_->stats().steps < 5u * level) std::this_thread::yield();
    const PhaseTokens counted = engine_->stats().tokens_by_level;
    EXPECT_EQ(counted[static_cast<int>(Phase::kPrefill)][level - 1], 20u);
    EXPECT_EQ(counted[static_cast<int>(Phase::kDecode)][level - 1], 4u);
  }
  // A floor holds in the same engine, against a target below it.
  engine_->SetPrecision({.target_bits = 2.0f});
  GenerationRequest premium = Request(20, 5, 10);
  premium.precision.min_bits = 8.0f;
  CollectingSink kept;
  ASSERT_TRUE(engine_->Submit(premium, &kept).ok());
  EXPECT_NEAR(kept.Wait().mean_effective_bits, 8.0, 1e-6);
}

// Changes the target at every token; each next one must have the bits set at the one before.
class SwitchingSink final : public TokenSink {
 public:
  explicit SwitchingSink(Engine& engine) : engine_(engine) {}
  bool OnToken(const TokenEvent& event) override {
    if (expected_) {
      EXPECT_FLOAT_EQ(event.effective_bits, *expected_);
    }
    expected_ = expected_ == 2.0f ? 8.0f : 2.0f;
    engine_.SetPrecision({.target_bits = *expected_});
    return inner_.OnToken(event);
  }
  void OnDone(const RequestEnd& end) override { inner_.OnDone(end); }
  const RequestEnd& Wait() { return inner_.Wait(); }

 private:
  Engine& engine_;
  std::optional<float> expected_;
  CollectingSink inner_;
};

TEST_F(EngineTest, ASwitchHoldsFromTheNextStepAndCostsNone) {
  for (const bool coherent : {false, true}) {
    EngineOptions options;
    options.coherent_decode = coherent;
    Open(options);
    const uint64_t before = engine_->stats().steps;
    SwitchingSink sink(*engine_);
    ASSERT_TRUE(engine_->Submit(Request(20, 100), &sink).ok());
    EXPECT_TRUE(sink.Wait().status.ok());
    ExpectAllBlocksFree();
    EXPECT_EQ(engine_->stats().steps - before, 100u) << "a step a token, the prompt's the first's";
  }
}

TEST_F(EngineTest, EveryRegimeIsTrimmedAndCountedByItself) {
  for (const bool coherent : {false, true}) {
    EngineOptions options;
    options.coherent_decode = coherent;
    Open(options);
    engine_->SetPrecision({4.0f, {{0.5f, -0.5f, 0.25f}}});
    GenerationRequest pinned = Request(20, 10, 2);
    pinned.precision.level = 4;
    Run(Request(20, 11));
    Run(pinned);  // the price decided nothing
    ExpectAllBlocksFree();
    const EngineStats stats = engine_->stats();
    const BitsCounters& prompts = stats.tracked[Regime::kPrompt];
    const BitsCounters& decodes = stats.tracked[coherent ? Regime::kCoherent : Regime::kDecode];
    EXPECT_EQ(prompts.count, 20u);
    EXPECT_EQ(decodes.count, 10u);
    EXPECT_EQ(stats.tracked[coherent ? Regime::kDecode : Regime::kCoherent].count, 0u);
    EXPECT_DOUBLE_EQ(prompts.trim_sum, 20 * 0.5);
    EXPECT_DOUBLE_EQ(decodes.trim_sum, 10 * (coherent ? 0.25 : -0.5));
    EXPECT_DOUBLE_EQ(prompts.target_sum + decodes.target_sum, 30 * 4);
    EXPECT_GT(prompts.bits_sum, 20 * 2);
    EXPECT_LT(decodes.bits_sum, 10 * 8);
    EXPECT_EQ(stats.decode_steps, 19u);
  }
}

TEST_F(EngineTest, WholeLevelPromptsReadOneLevelAndDecodesChoose) {
  EngineOptions options;
  options.whole_level_prompts = true;
  Open(options);
  engine_->SetPrecision({.target_bits = 3.0f});
  const auto prompt_bits = [&](const PrecisionBand& band) {
    const EngineStats before = engine_->stats();
    GenerationRequest request = Request(20, 1);
    request.precision = band;
    request.cache_salt = std::to_string(before.effective_tokens);
    Run(request);
    EngineStats after;  // published after the end of the step that the request ends in
    do {
      std::this_thread::yield();
      after = engine_->stats();
    } while (after.effective_tokens < before.effective_tokens + 20);
    return (after.effective_bits_sum - before.effective_bits_sum) /
           static_cast<double>(after.effective_tokens - before.effective_tokens);
  };
  EXPECT_EQ(prompt_bits({}), 4);
  EXPECT_EQ(prompt_bits({.min_bits = 4.5f}), 6);
  EXPECT_EQ(prompt_bits({.level = 4}), 8);
  EXPECT_EQ(engine_->stats().tracked[Regime::kPrompt].count, 0u) << "no price has decided";
  EXPECT_LT(prompt_bits({.max_bits = 3.5f}), 3.9) << "by the token, within the band";
  EXPECT_EQ(engine_->stats().tracked[Regime::kPrompt].count, 20u);
  CollectingSink sink;
  ASSERT_TRUE(engine_->Submit(Request(20, 40, 7), &sink).ok());
  sink.Wait();
  ExpectAllBlocksFree();
  EXPECT_EQ(engine_->stats().tracked[Regime::kDecode].count, 39u);
}

TEST_F(EngineTest, WholeLevelDecodesReadOneLevel) {
  for (const bool coherent : {false, true}) {
    EngineOptions options;
    options.coherent_decode = coherent;
    options.whole_level_decodes = true;
    Open(options);
    engine_->SetPrecision({.target_bits = 3.0f});
    const PrecisionBand bands[] = {{}, {.min_bits = 4.5f}, {.level = 4}, {.max_bits = 3.5f}};
    constexpr int kDecodes = 39;
    CollectingSink sinks[std::size(bands)];
    for (size_t i = 0; i < std::size(bands); ++i) {
      GenerationRequest request = Request(20, kDecodes + 1, static_cast<int>(i));
      request.precision = bands[i];
      ASSERT_TRUE(engine_->Submit(request, &sinks[i]).ok());
    }
    for (CollectingSink& sink : sinks) sink.Wait();
    for (int step = 1; step <= kDecodes; ++step) {  // the first token is its prompt's
      // Those that share levels read what one of them needs.
      EXPECT_TRUE(sinks[0].bits[step] == 4 || (coherent && sinks[0].bits[step] == 6)) << step;
      EXPECT_EQ(sinks[1].bits[step], 6) << step;
      EXPECT_EQ(sinks[2].bits[step], 8) << step;
    }
    ExpectAllBlocksFree();
    const EngineStats stats = engine_->stats();
    EXPECT_EQ(stats.tracked[Regime::kDecode].count + stats.tracked[Regime::kCoherent].count,
              kDecodes)
        << "only the band that ends below the level is routed";
  }
}

TEST_F(EngineTest, CoherentDecodesShareTheirBitsAndPinnedOnesKeepTheirOwn) {
  EngineOptions options;
  options.coherent_decode = true;
  Open(options);
  engine_->SetPrecision({.target_bits = 4.0f});
  GenerationRequest pinned = Request(20, 60, 50);
  pinned.precision.level = 4;
  GateSink gate;
  ASSERT_TRUE(engine_->Submit(Request(4, 1), &gate).ok());
  gate.WaitUntilHeld();
  CollectingSink kept, sinks[8];
  ASSERT_TRUE(engine_->Submit(pinned, &kept).ok());
  for (int i = 0; i < 8; ++i) ASSERT_TRUE(engine_->Submit(Request(20, 60, i), &sinks[i]).ok());
  gate.Open();
  for (CollectingSink& sink : sinks) sink.Wait();
  EXPECT_NEAR(kept.Wait().mean_effective_bits, 8.0, 1e-6);
  const EngineStats stats = engine_->stats();
  EXPECT_GT(stats.tracked[Regime::kCoherent].count, 30u);
  // The first token comes from the prompt's step, where tokens choose for themselves.
  for (int step = 1; step < 60; ++step) {
    for (int i = 1; i < 8; ++i) EXPECT_EQ(sinks[i].bits[step], sinks[0].bits[step]) << step;
  }
}

TEST_F(EngineTest, APremiumRequestKeepsItsFloorInTheBatchThatLowersAStandardOne) {
  Open();
  engine_->SetPrecision({.target_bits = 2.0f});
  GateSink gate;
  ASSERT_TRUE(engine_->Submit(Request(4, 1), &gate).ok());
  gate.WaitUntilHeld();
  CollectingSink premium[3], standard[3];
  const float floors[] = {8.0f, 6.0f, 4.0f};
  for (int i = 0; i < 3; ++i) {
    GenerationRequest kept = Request(20, 60, 10 + i);
    kept.precision.min_bits = floors[i];
    ASSERT_TRUE(engine_->Submit(kept, &premium[i]).ok());
    ASSERT_TRUE(engine_->Submit(Request(20, 60, i), &standard[i]).ok());
  }
  gate.Open();
  std::vector<double> alone, beside;
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(standard[i].Wait().mean_effective_bits, 2);
    beside.push_back(premium[i].Wait().mean_effective_bits);
  }
  EXPECT_EQ(beside[0], 8);
  // What it has beside others is what it has alone at a target of its floor, to the bit.
  for (int i = 0; i < 3; ++i) {
    engine_->SetPrecision({.target_bits = floors[i]});
    CollectingSink sink;
    GenerationRequest request = Request(20, 60, 10 + i);
    request.cache_salt = "apart";
    ASSERT_TRUE(engine_->Submit(request, &sink).ok());
    alone.push_back(sink.Wait().mean_effective_bits);
    EXPECT_EQ(sink.completions[0], premium[i].completions[0]);
  }
  EXPECT_EQ(alone, beside);
  EXPECT_GT(beside[1], beside[2]);
  EXPECT_GT(beside[2], 2);
}

TEST_F(EngineTest, CoherentDecodesShareTheHighestFloorAndRequestsThatAcceptLessDoNot) {
  EngineOptions options;
  options.coherent_decode = true;
  Open(options);
  engine_->SetPrecision({.target_bits = 3.0f});
  GateSink gate;
  ASSERT_TRUE(engine_->Submit(Request(4, 1), &gate).ok());
  gate.WaitUntilHeld();
  GenerationRequest premium = Request(20, 40, 1), modest = Request(20, 40, 2);
  premium.precision.min_bits = 8;
  modest.precision.max_bits = 2;
  CollectingSink kept, lifted, apart;
  ASSERT_TRUE(engine_->Submit(premium, &kept).ok());
  ASSERT_TRUE(engine_->Submit(Request(20, 80, 3), &lifted).ok());
  ASSERT_TRUE(engine_->Submit(modest, &apart).ok());
  gate.Open();
  EXPECT_EQ(kept.Wait().mean_effective_bits, 8);
  EXPECT_EQ(apart.Wait().mean_effective_bits, 2);
  lifted.Wait();
  for (int step = 1; step < 38; ++step) EXPECT_EQ(lifted.bits[step], 8) << step;
  // Alone again, it is at the target.
  EXPECT_LT(lifted.bits.back(), 8);
  const BitsCounters shared = engine_->stats().tracked[Regime::kCoherent];
  EXPECT_GE(shared.target_sum / static_cast<double>(shared.count), 3);
}

TEST_F(EngineTest, CancelledAndExpiredRequestsFreeTheirBlocks) {
  EngineOptions options;
  options.max_num_seqs = 4;
  options.max_num_batched_tokens = 32;
  options.max_expected_wait = std::chrono::hours(1);
  Open(options);
  std::mt19937 random(7);
  std::vector<std::unique_ptr<CollectingSink>> sinks;
  for (int i = 0; i < 200; ++i) {
    sinks.push_back(std::make_unique<CollectingSink>());
    GenerationRequest request = Request(1 + random() % 100, 1 + random() % 100, i);
    request.n = 1 + static_cast<int>(random() % 3);
    if (i % 5 == 0) request.deadline = loaded_->clock.Now() + std::chrono::milliseconds(20);
    const auto id = engine_->Submit(request, sinks.back().get());
    if (absl::IsDeadlineExceeded(id.status())) {  // the queue is longer than that
      sinks.pop_back();
      continue;
    }
    ASSERT_TRUE(id.ok()) << id.status();
    if (random() % 2 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
    engine_->Cancel(*id);
    engine_->Cancel(*id);
  }
  for (auto& sink : sinks) {
    sink->Wait();
    EXPECT_EQ(sink->times_done, 1);
  }
  ExpectAllBlocksFree();
}

TEST_F(EngineTest, DeadlinesEndRequestsWherverTheyAre) {
  Open();
  GenerationRequest request = Request(20, 200);
  CollectingSink sink;
  request.deadline = loaded_->clock.Now();
  EXPECT_EQ(engine_->Submit(request, &sink).status().code(), absl::StatusCode::kDeadlineExceeded);
  GateSink gate;
  ASSERT_TRUE(engine_->Submit(Request(4, 4), &gate).ok());
  gate.WaitUntilHeld();
  request.deadline = loaded_->clock.Now() + std::chrono::milliseconds(200);
  ASSERT_TRUE(engine_->Submit(request, &sink).ok());
  std::this_thread::sleep_for(std::chrono::milliseconds(210));
  gate.Open();
  EXPECT_EQ(sink.Wait().status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(sink.done->reason, FinishReason::kDeadline);
  EXPECT_TRUE(sink.completions[0].empty());
}

TEST_F(EngineTest, RefusesWhatCanNeverRunAndWhatIsTooMuch) {
  EngineOptions options;
  options.max_waiting_requests = 4;
  options.max_num_seqs = 1;
  Open(options);
  CollectingSink never;
  const auto code = [&](GenerationRequest request) {
    return engine_->Submit(std::move(request), &never).status().code();
  };
  GenerationRequest empty = Request(1, 1);
  empty.prompt.clear();
  EXPECT_EQ(code(empty), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Request(256, 1)), absl::StatusCode::kInvalidArgument);
  GenerationRequest outside = Request(4, 1);
  outside.prompt[2] = 320;
  EXPECT_EQ(code(outside), absl::StatusCode::kInvalidArgument);
  outside.prompt[2] = -1;
  EXPECT_EQ(code(outside), absl::StatusCode::kInvalidArgument);
  std::vector<std::unique_ptr<CollectingSink>> sinks;
  int refused = 0;
  for (int i = 0; i < 30; ++i) {
    auto sink = std::make_unique<CollectingSink>();
    const auto id = engine_->Submit(Request(100, 100, i), sink.get());
    if (id.ok()) {
      sinks.push_back(std::move(sink));
    } else {
      EXPECT_EQ(id.status().code(), absl::StatusCode::kResourceExhausted);
      ++refused;
    }
  }
  EXPECT_GT(refused, 0);
  loaded_.reset();  // stopping ends the rest, each exactly once
  for (auto& sink : sinks) EXPECT_EQ(sink->times_done, 1);
  EXPECT_FALSE(never.done.has_value());
}

TEST_F(EngineTest, ScoringGivesEveryPromptTokenButTheFirst) {
  Open({}, "float");
  GenerationRequest request = Request(100, 0);
  request.prompt_logprobs = true;
  CollectingSink sink;
  ASSERT_TRUE(engine_->Submit(request, &sink).ok());
  EXPECT_EQ(sink.Wait().usage.completion_tokens, 0);
  ASSERT_EQ(sink.prompt_logprobs.size(), 100u);
  for (int i = 1; i < 100; ++i) EXPECT_LT(sink.prompt_logprobs[i], 0.0f) << i;
  EngineOptions chunked;
  chunked.max_num_batched_tokens = 7;
  chunked.max_num_seqs = 3;
  Open(chunked, "float");
  CollectingSink pieces;
  ASSERT_TRUE(engine_->Submit(request, &pieces).ok());
  pieces.Wait();
  EXPECT_EQ(pieces.prompt_logprobs, sink.prompt_logprobs);
  // Alternatives: none is likelier than the first, and a prompt token among them has its score.
  request.prompt_top_logprobs = 20;
  CollectingSink top;
  ASSERT_TRUE(engine_->Submit(request, &top).ok());
  top.Wait();
  ASSERT_EQ(top.prompt_top.size(), 100u);
  int found = 0;
  for (int i = 1; i < 100; ++i) {
    EXPECT_GE(top.prompt_top[i].logprobs[0], top.prompt_logprobs[i]);
    for (int k = 0; k < 20; ++k) {
      if (top.prompt_top[i].tokens[k] != request.prompt[i]) continue;
      EXPECT_FLOAT_EQ(top.prompt_top[i].logprobs[k], top.prompt_logprobs[i]);
      ++found;
    }
  }
  EXPECT_GT(found, 0);
}

TEST_F(EngineTest, LogprobsAndMostLikelyTokensAgree) {
  Open({}, "float");
  GenerationRequest request = Request(30, 10);
  request.sampling.temperature = 0;
  request.top_logprobs = 5;
  CollectingSink sink;
  ASSERT_TRUE(engine_->Submit(request, &sink).ok());
  sink.Wait();
  ASSERT_EQ(sink.top.size(), 10u);
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(sink.top[i].tokens[0], sink.completions[0][i]);
    EXPECT_FLOAT_EQ(sink.top[i].logprobs[0], sink.logprobs[0][i]);
    EXPECT_GE(sink.top[i].logprobs[0], sink.top[i].logprobs[4]);
  }
}

}  // namespace
}  // namespace mobi
