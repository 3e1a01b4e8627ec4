#include "server/controller.h"

#include <cmath>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/policy_yaml.h"
#include "tests/server/fake_clock.h"

namespace mobi {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;

constexpr PricePoint kTable[] = {{2, 1e-3f}, {4, 1e-5f}, {6, 1e-7f}, {8, 1e-9f}};

// An engine that only counts: every step, eight tokens use the bits that target, trim and the
// text's shift give, with the table's slope.
class CountingEngine final : public Engine {
 public:
  absl::StatusOr<RequestId> Submit(GenerationRequest, TokenSink*) override {
    return absl::UnavailableError("only counts");
  }
  void Cancel(RequestId) override {}
  void SetPrecision(const PrecisionTarget& target) override { target_ = target; }
  EngineStats stats() const override { return stats_; }
  int max_model_len() const override { return 1; }

  // A request is in, though no step has ended.
  void SetRunning(int requests) { stats_.running_requests = requests; }

  void Step() {
    const double nats_per_bit = std::log(100.0) / 2;
    const double free =
        target_.target_bits + shift_ - target_.log_price_trim[Regime::kDecode] / nats_per_bit;
    const double bits = std::clamp(free, 2.0, 8.0);
    ++stats_.steps;
    stats_.step_seconds_sum += 0.01;
    stats_.generation_tokens += 8;
    stats_.effective_tokens += 8;
    stats_.effective_bits_sum += 8 * bits;
    stats_.tracked[Regime::kDecode].Add(8, 8 * bits, target_.target_bits,
                                        target_.log_price_trim[Regime::kDecode]);
    stats_.loaded_bits_sum += bits + 0.5;
  }

  PrecisionTarget target_;
  EngineStats stats_;
  double shift_ = 0;
};

class ControllerTest : public ::testing::Test {
 protected:
  explicit ControllerTest(float bits = 8) : controller_({}, PolicyFromFlags(bits), clock_) {}

  void Attach() { controller_.Attach(&engine_, {{std::begin(kTable), std::end(kTable)}, {}}); }
  // Ticks every 50 ms, with a step every 10 ms.
  void Run(Duration duration) {
    for (Duration t{}; t < duration; t += milliseconds(50)) {
      for (int i = 0; i < 5; ++i) engine_.Step();
      clock_.Advance(milliseconds(50));
      controller_.Tick();
    }
  }

  FakeClock clock_;
  CountingEngine engine_;
  Controller controller_;
};

TEST_F(ControllerTest, AttachingSetsTheTarget) {
  EXPECT_EQ(controller_.status().target_bits, 8);
  ASSERT_TRUE(controller_.Override(5, seconds(10)).ok());  // before there is an engine
  Attach();
  EXPECT_EQ(engine_.target_.target_bits, 5);
}

TEST_F(ControllerTest, AnOverrideTakesEffectAtOnceAndEnds) {
  Attach();
  EXPECT_EQ(controller_.status().mode, ControlMode::kFixed);
  ASSERT_TRUE(controller_.Override(3.5, seconds(10)).ok());
  EXPECT_EQ(engine_.target_.target_bits, 3.5f);  // without a tick
  ControlStatus status = controller_.status();
  EXPECT_EQ(status.mode, ControlMode::kOverride);
  ASSERT_TRUE(status.override_until);
  EXPECT_EQ(*status.override_until, clock_.WallNow() + seconds(10));
  Run(milliseconds(9950));
  EXPECT_EQ(engine_.target_.target_bits, 3.5f);
  Run(milliseconds(50));
  EXPECT_EQ(engine_.target_.target_bits, 8);
  EXPECT_EQ(controller_.status().mode, ControlMode::kFixed);
  EXPECT_FALSE(controller_.status().override_until);
  ASSERT_TRUE(controller_.Override(4, seconds(10)).ok());
  controller_.ClearOverride();
  EXPECT_EQ(engine_.target_.target_bits, 8);
}

TEST_F(ControllerTest, BadOverridesChangeNothing) {
  Attach();
  EXPECT_THAT(std::string(controller_.Override(1.9f, seconds(10)).message()),
              HasSubstr("target_bits: 1.9 is out of range [2, 8]"));
  EXPECT_FALSE(controller_.Override(std::nanf(""), seconds(10)).ok());
  EXPECT_THAT(std::string(controller_.Override(4, milliseconds(900)).message()),
              HasSubstr("ttl: 0.9 s is out of range"));
  EXPECT_FALSE(controller_.Override(4, std::chrono::hours(25)).ok());
  EXPECT_EQ(engine_.target_.target_bits, 8);
}

TEST_F(ControllerTest, HoldsTheTargetWhateverTheTextDoes) {
  Attach();
  for (const double shift : {0.7, -0.9, 0.2}) {
    engine_.shift_ = shift;
    for (const float target : {3.0f, 5.5f, 6.5f}) {
      ASSERT_TRUE(controller_.Override(target, std::chrono::hours(1)).ok());
      Run(seconds(2));
      const ControlStatus status = controller_.status();
      EXPECT_NEAR(status.effective_bits, target, 0.05) << "shift " << shift;
      EXPECT_NEAR(status.loaded_bits, target + 0.5, 0.05);
      EXPECT_FALSE(status.saturated);
    }
  }
}

TEST_F(ControllerTest, StatusAveragesTheLastSecond) {
  Attach();
  Run(seconds(3));
  const ControlStatus status = controller_.status();
  EXPECT_NEAR(status.tokens_per_second, 800, 1);
  EXPECT_NEAR(status.step_seconds, 0.01, 1e-6);
  clock_.Advance(seconds(1));
  controller_.Tick();
  clock_.Advance(seconds(1));
  controller_.Tick();
  EXPECT_EQ(controller_.status().tokens_per_second, 0);
  EXPECT_NEAR(controller_.status().effective_bits, 8, 1e-3);  // of the last time that had work
}

TEST_F(ControllerTest, AnIdleServerHasNoDeficit) {
  Attach();
  Policy policy = FixedPolicy(6);
  policy.windows[0].floor_bits = 4;
  policy.windows[0].ceiling_bits = 8;
  policy.signals = {{.kind = SignalKind::kQueueDepth, .name = "queue_depth", .reference = 2}};
  ASSERT_TRUE(controller_.SetPolicy({policy, "", "test"}, std::nullopt).ok());
  EXPECT_EQ(controller_.status().bits_deficit, 0);
  ASSERT_TRUE(controller_.Override(5, std::chrono::hours(1)).ok());
  Run(seconds(3));
  EXPECT_NEAR(controller_.status().bits_deficit, 0.75, 0.02);
  const auto rest = [&](Duration duration) {
    for (Duration t{}; t < duration; t += milliseconds(50)) {
      clock_.Advance(milliseconds(50));
      controller_.Tick();
    }
    return controller_.status().bits_deficit;
  };
  engine_.SetRunning(1);
  EXPECT_NEAR(rest(seconds(5)), 0.75, 0.02);  // a long step
  engine_.SetRunning(0);
  EXPECT_EQ(rest(seconds(2)), 0);
  EXPECT_NEAR(controller_.status().effective_bits, 5, 0.05);
  Run(seconds(1));
  EXPECT_NEAR(controller_.status().bits_deficit, 0.75, 0.02);
}

TEST_F(ControllerTest, AMeasuredSurfaceKeepsBitsThatBuyNothing) {
  const auto flat = StepSurface::Create({2, 8}, {1}, {{5}, {5}});
  ASSERT_TRUE(flat.ok());
  controller_.Attach(&engine_, {{std::begin(kTable), std::end(kTable)}, {}}, *flat);
  Policy policy = FixedPolicy(8);
  policy.windows[0].floor_bits = 4;
  policy.signals = {{.kind = SignalKind::kQueueDepth, .name = "queue_depth", .reference = 2}};
  ASSERT_TRUE(controller_.SetPolicy({policy, "", "test"}, std::nullopt).ok());
  engine_.stats_.waiting_requests = 20;
  Run(seconds(5));
  EXPECT_GT(controller_.status().pressure, 1);
  EXPECT_EQ(engine_.target_.target_bits, 8);
  EXPECT_NEAR(controller_.status().kept_bits, 4, 1e-3);
}

TEST_F(ControllerTest, ConcurrentPoliciesAreSerialised) {
  Attach();
  EXPECT_EQ(controller_.policy().generation, 1u);
  EXPECT_EQ(controller_.policy().source, "flags");
  LoadedPolicy four = PolicyFromFlags(4);
  four.source = "admin";
  EXPECT_TRUE(controller_.SetPolicy(four, 1).ok());
  EXPECT_EQ(engine_.target_.target_bits, 4);
  const absl::Status second = controller_.SetPolicy(PolicyFromFlags(5), 1);
  EXPECT_EQ(second.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(engine_.target_.target_bits, 4);
  EXPECT_EQ(controller_.policy().generation, 2u);
  EXPECT_EQ(controller_.policy().source, "admin");
  EXPECT_FALSE(controller_.SetPolicy(PolicyFromFlags(9), std::nullopt).ok());
  EXPECT_EQ(controller_.policy().generation, 2u);
}

TEST_F(ControllerTest, ASystemClockThatJumpsAnHourMovesNoWindow) {
  Attach();
  // The clock begins at midnight.
  const auto policy = ParsePolicy(
      "windows:\n"
      "  - {name: night, cron: \"0 0 * * *\", duration: 40m, time_zone: UTC, floor_bits: 4, "
      "ceiling_bits: 4}\n"
      "  - {name: day, floor_bits: 7, ceiling_bits: 7}\n",
      "p");
  ASSERT_TRUE(policy.ok()) << policy.status();
  ASSERT_TRUE(controller_.SetPolicy({*policy, "", "test"}, std::nullopt).ok());
  int changes = 0;
  const auto run = [&](Duration duration) {
    for (Duration t{}; t < duration; t += seconds(1)) {
      const std::string before = controller_.status().window.name;
      clock_.Advance(seconds(1));
      controller_.Tick();
      changes += controller_.status().window.name != before;
    }
  };
  run(seconds(60));
  EXPECT_EQ(controller_.status().window.name, "night");
  for (const Duration jump : {std::chrono::hours(1), -std::chrono::hours(1)}) {
    clock_.SetWallForward(jump);
    run(std::chrono::minutes(4));
    clock_.SetWallForward(-jump);
    run(std::chrono::minutes(1));
  }
  EXPECT_EQ(changes, 0);
  EXPECT_EQ(engine_.target_.target_bits, 4);
  // One that stays is meant, and followed once.
  clock_.SetWallForward(std::chrono::hours(1));
  run(std::chrono::minutes(20));
  EXPECT_EQ(changes, 1);
  EXPECT_EQ(engine_.target_.target_bits, 7);
}

TEST_F(ControllerTest, TimeBelowTheFloorIsCounted) {
  Attach();
  engine_.shift_ = -6;  // further than the trim reaches
  ASSERT_TRUE(controller_.SetPolicy(PolicyFromFlags(6), std::nullopt).ok());
  Run(seconds(10));
  const ControlStatus status = controller_.status();
  EXPECT_TRUE(status.saturated);
  EXPECT_NEAR(status.seconds_below_floor, 10, 0.5);
}

TEST(NatsPerBit, IsTheTablesSlope) {
  EXPECT_NEAR(NatsPerBit(kTable, 5), std::log(100.0) / 2, 1e-4);
  EXPECT_NEAR(NatsPerBit(kTable, 2), std::log(100.0) / 2, 1e-4);
  EXPECT_NEAR(NatsPerBit(kTable, 8), std::log(100.0) / 2, 1e-4);
  EXPECT_EQ(NatsPerBit({}, 5), 1);
  const PricePoint flat[] = {{2, 1e-3f}, {8, 1e-3f}};
  EXPECT_GT(NatsPerBit(flat, 5), 0);
  const PricePoint free[] = {{2, 1e-3f}, {8, 0}};
  EXPECT_TRUE(std::isfinite(NatsPerBit(free, 5)));
}

}  // namespace
}  // namespace mobi
