#include "server/bits_tracker.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <random>
#include <string>

#include "absl/strings/str_format.h"
#include "gtest/gtest.h"

namespace mobi {
namespace {

constexpr double kTick = 0.05;

TimePoint At(double seconds) { return TimePoint(Duration(static_cast<int64_t>(seconds * 1e9))); }

// Bits over log(price): a logistic between 2 and 8, as routed models have it. `center` is the
// log(price) of 5 bits and `width` how many nats the middle stretches over.
struct Curve {
  double center = -9;
  double width = 3;

  double Bits(double log_price) const {
    return 2 + 6 / (1 + std::exp((log_price - center) / width));
  }
  double LogPrice(double bits) const { return center + width * std::log((8 - bits) / (bits - 2)); }
  float NatsPerBit(double bits) const {
    return static_cast<float>((LogPrice(bits - 0.1) - LogPrice(bits + 0.1)) / 0.2);
  }
};

struct Text {
  Curve table;       // as calibrated
  Curve served;      // as it is
  double noise = 0;  // of one token
  double drift = 0;  // of what all tokens of a second have in common
  double step_seconds = 0.02;
  int tokens_per_step = 8;
};

// The engine and the loop around it: a step uses what was set when it began, and its counters are
// seen at the first tick after it ended.
class Simulation {
 public:
  Simulation(const Text& text, uint64_t seed) : text_(text), rng_(seed) {}

  void Run(double seconds, double target) {
    for (const double end = time_ + seconds; time_ < end - 1e-9; time_ += kTick) {
      while (next_step_ <= time_) Step(target);
      Tick(target);
    }
  }
  // No requests.
  void Idle(double seconds, double target) {
    for (const double end = time_ + seconds; time_ < end - 1e-9; time_ += kTick) Tick(target);
    next_step_ = time_;
  }
  // Forgets what was measured so far.
  void Mark() { errors_.clear(), worst_ = 0; }
  // The farthest that an average over any second since then was from its targets.
  double worst() const { return worst_; }
  const BitsTrackerState& state() const { return state_; }

 private:
  void Tick(double target) {
    state_ = TrackBits({}, text_.table.NatsPerBit(target), counters_, At(time_), state_);
  }
  void Step(double target) {
    next_step_ += text_.step_seconds;
    std::normal_distribution<double> normal;
    const double keep = std::exp(-text_.step_seconds);
    common_ = common_ * keep + text_.drift * std::sqrt(1 - keep * keep) * normal(rng_);
    const double log_price = text_.table.LogPrice(target) + step_trim_;
    double sum = 0;
    for (int i = 0; i < text_.tokens_per_step; ++i) {
      sum +=
          std::clamp(text_.served.Bits(log_price) + common_ + text_.noise * normal(rng_), 2.0, 8.0);
    }
    counters_.bits_sum += sum;
    counters_.target_sum += text_.tokens_per_step * target;
    counters_.trim_sum += text_.tokens_per_step * step_trim_;
    counters_.count += text_.tokens_per_step;
    step_trim_ = state_.trim;  // of the next step, which begins now
    Judge(sum - text_.tokens_per_step * target);
  }
  void Judge(double error) {
    errors_.push_back({next_step_, error});
    bool full = false;
    while (next_step_ - errors_.front().first >= 1) {
      errors_.pop_front();
      full = true;
    }
    if (!full) return;
    double sum = 0;
    for (const auto& [time, step_error] : errors_) sum += step_error;
    worst_ = std::max(worst_, std::abs(sum) / (errors_.size() * text_.tokens_per_step));
  }

  const Text text_;
  std::mt19937_64 rng_;
  double time_ = 0;
  double next_step_ = 0;
  double step_trim_ = 0;
  double common_ = 0;
  BitsCounters counters_;
  BitsTrackerState state_;
  std::deque<std::pair<double, double>> errors_;
  double worst_ = 0;
};

double Uniform(std::mt19937_64& rng, double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(rng);
}

// Text that is not what was calibrated on: shifted by up to a bit and a half of slope wrong.
Text OutOfDomain(std::mt19937_64& rng) {
  Text text;
  text.table = {.center = Uniform(rng, -16, -6), .width = Uniform(rng, 1, 3)};
  text.served = {.center = text.table.center + text.table.width * Uniform(rng, -0.8, 0.8),
                 .width = text.table.width * std::exp(Uniform(rng, -0.4, 0.4))};
  text.step_seconds = std::exp(Uniform(rng, std::log(0.005), std::log(0.1)));
  // From 400 tokens a second up: below that a second of noise is more than is asked for.
  text.tokens_per_step = static_cast<int>(std::ceil(Uniform(rng, 400, 3000) * text.step_seconds));
  return text;
}

std::string Describe(const Text& text, double target) {
  return absl::StrFormat(
      "target %.2f shift %.2f widths %.2f %.2f noise %.2f drift %.2f, %d tokens a %.3f s", target,
      text.served.center - text.table.center, text.table.width, text.served.width, text.noise,
      text.drift, text.tokens_per_step, text.step_seconds);
}

TEST(BitsTracker, HoldsEverySecondOutOfDomainOnceItHasLearned) {
  std::mt19937_64 rng(1);
  for (int round = 0; round < 1000; ++round) {
    const Text text = OutOfDomain(rng);
    const double target = Uniform(rng, 2.2, 7.8);
    Simulation simulation(text, rng());
    simulation.Run(3, target);
    simulation.Mark();
    simulation.Run(6, target);
    ASSERT_LT(simulation.worst(), 0.05) << Describe(text, target);
  }
}

TEST(BitsTracker, HoldsEverySecondAgainstNoise) {
  std::mt19937_64 rng(2);
  int64_t bad = 0;
  constexpr int kRounds = 600;
  for (int round = 0; round < kRounds; ++round) {
    Text text = OutOfDomain(rng);
    text.noise = Uniform(rng, 0, 0.4);
    text.drift = Uniform(rng, 0, 0.1);
    const double target = Uniform(rng, 2.4, 7.6);
    Simulation simulation(text, rng());
    simulation.Run(4, target);
    simulation.Mark();
    simulation.Run(10, target);
    bad += simulation.worst() >= 0.05;
    // Steps of 100 ms leave the loop three answers a second, so a few of all seconds are outside.
    ASSERT_LT(simulation.worst(), 0.12) << Describe(text, target);
  }
  RecordProperty("runs_with_a_second_outside",
                 std::to_string(bad) + " of " + std::to_string(kRounds));
  EXPECT_LT(bad, kRounds / 8);
}

TEST(BitsTracker, IdleTimeTeachesAndForgetsNothing) {
  std::mt19937_64 rng(3);
  for (int round = 0; round < 300; ++round) {
    const Text text = OutOfDomain(rng);
    const double target = Uniform(rng, 2.2, 7.8);
    Simulation simulation(text, rng());
    simulation.Run(4, target);
    for (int gap = 0; gap < 3; ++gap) {
      const double learned = simulation.state().learned;
      simulation.Idle(Uniform(rng, 0.2, 30), target);
      EXPECT_EQ(simulation.state().learned, learned);
      simulation.Mark();
      simulation.Run(3, target);
      ASSERT_LT(simulation.worst(), 0.05) << Describe(text, target);
    }
  }
}

TEST(BitsTracker, FollowsATargetThatNeverRests) {
  std::mt19937_64 rng(4);
  double worst = 0;
  for (int round = 0; round < 200; ++round) {
    const Text text = OutOfDomain(rng);
    Simulation simulation(text, rng());
    double target = 5;
    // As the outer loop moves it: down at once, up a little at every tick.
    const auto wander = [&](double seconds) {
      for (double t = 0; t < seconds; t += kTick) {
        target = rng() % 60 == 0 ? Uniform(rng, 3, target) : std::min(7.5, target + 0.05);
        simulation.Run(kTick, target);
      }
    };
    wander(6);
    simulation.Mark();
    wander(10);
    worst = std::max(worst, simulation.worst());
    // What is needed differs along the curve, so learning goes on.
    ASSERT_LT(simulation.worst(), 0.4) << Describe(text, target);
  }
  RecordProperty("worst", absl::StrFormat("%.3f", worst));
}

TEST(BitsTracker, ComesBackAtOnceFromATargetThatCannotBeReached) {
  std::mt19937_64 rng(5);
  for (int round = 0; round < 300; ++round) {
    Text text = OutOfDomain(rng);
    text.served.center = text.table.center + 30;  // everything wants 8 bits, whatever the price
    Simulation stuck(text, rng());
    stuck.Run(20, 4);
    EXPECT_TRUE(stuck.state().saturated);
    // A minute of saturation is worth no more than the limit: nothing has wound up.
    const double limit = BitsTrackerOptions().max_shift_bits * text.table.NatsPerBit(4);
    EXPECT_NEAR(stuck.state().learned, limit, 1e-3 * limit);
    Text normal = text;
    normal.served = text.table;
    BitsTrackerState state = stuck.state();
    double used = state.trim, time = 100;
    int looks = 0;
    BitsCounters counters = state.from;
    for (; looks < 40 && std::abs(state.learned) > 0.1 * limit; ++looks, time += kTick) {
      counters.bits_sum += 100 * normal.served.Bits(normal.table.LogPrice(4) + used);
      counters.target_sum += 100 * 4;
      counters.trim_sum += 100 * used;
      counters.count += 100;
      used = state.trim;
      state = TrackBits({}, normal.table.NatsPerBit(4), counters, At(time), state);
    }
    EXPECT_LT(looks, 20);  // a second
    EXPECT_FALSE(state.saturated);
  }
}

TEST(BitsTracker, ANewEngineBeginsAtZero) {
  const BitsCounters old{.bits_sum = 5000, .target_sum = 4000, .trim_sum = 0, .count = 1000};
  BitsTrackerState state = TrackBits({}, 2, old, At(1), {});
  const float trim = state.trim;
  EXPECT_GT(trim, 0);
  const BitsCounters fresh{
      .bits_sum = 40, .target_sum = 40, .trim_sum = 10 * double{trim}, .count = 10};
  state = TrackBits({}, 2, fresh, At(1.05), state);
  EXPECT_TRUE(std::isfinite(state.trim));
  EXPECT_EQ(state.from.count, 10u);
}

TEST(BitsTracker, HoldsStillWithoutMeasurements) {
  BitsTrackerState state;
  for (int i = 0; i < 100; ++i) state = TrackBits({}, 2, {}, At(i * kTick), state);
  EXPECT_EQ(state.trim, 0);
  EXPECT_FALSE(state.saturated);
}

}  // namespace
}  // namespace mobi
