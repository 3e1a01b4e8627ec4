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

constexpr double kTick = 0.02;

TimePoint At(double seconds) { return TimePoint(Duration(static_cast<int64_t>(seconds * 1e9))); }

// Bits over log(price): a logistic between 2 and 8, as routed models have it. `center` is the
// log(price) of 5 bits and `width` how many nats the middle stretches over. Levels that are shared
// stick at whole ones: around 4 and 6 bits the price must move by `sticking` more nats.
struct Curve {
  double center = -9;
  double width = 3;
  double sticking = 0;

  double LogPrice(double bits) const {
    constexpr double kSharpness = 0.1;
    return center + width * std::log((8 - bits) / (bits - 2)) -
           sticking / 2 * (std::tanh((bits - 4) / kSharpness) + std::tanh((bits - 6) / kSharpness));
  }
  double Bits(double log_price) const {
    if (sticking == 0) return 2 + 6 / (1 + std::exp((log_price - center) / width));
    double low = 2 + 1e-9, high = 8 - 1e-9;
    for (int i = 0; i < 40; ++i) {
      const double middle = (low + high) / 2;
      (LogPrice(middle) > log_price ? low : high) = middle;
    }
    return (low + high) / 2;
  }
  float NatsPerBit(double bits) const {
    // As the controller takes it from a table.
    constexpr double kReach = 0.25;
    const double low = std::max(bits - kReach, 2.1), high = std::min(bits + kReach, 7.9);
    return static_cast<float>((LogPrice(low) - LogPrice(high)) / (high - low));
  }
};

struct Text {
  Curve table;       // as calibrated
  Curve served;      // as it is
  double noise = 0;  // of one token
  double drift = 0;  // of what all tokens of a second have in common
  double step_seconds = 0.02;
  int tokens_per_step = 8;
  bool coherent = false;  // decodes share their bits
  // Now and then a prompt comes along, and its tokens want other bits at the same price.
  int prompt_tokens = 0;
  double prompts_per_second = 0;
  double prompt_shift = 0;  // of log(price)
  double late_looks = 0;    // part of the loop's looks that a busy machine delays
};

PerRegime<float> Slope(const Curve& table, double target) {
  const auto slope = static_cast<float>(table.NatsPerBit(target));
  return {{slope, slope, slope}};
}

// The engine and the loop around it: a step uses what was set when it began, and its counters are
// seen at the first tick after it ended.
class Simulation {
 public:
  Simulation(const Text& text, uint64_t seed) : text_(text), rng_(seed) {}

  void Run(double seconds, double target) {
    for (const double end = time_ + seconds; time_ < end - 1e-9; time_ += NextTick()) {
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
  // What is measured comes after the loop has had time to learn.
  void SettleThenRun(double settle, double seconds, double target) {
    Run(settle, target);
    Mark();
    Run(seconds, target);
  }
  // The farthest that an average over any second since then was from its targets.
  double worst() const { return worst_; }
  const BitsTrackerState& state() const { return state_; }

 private:
  double NextTick() {
    if (!std::bernoulli_distribution(text_.late_looks)(rng_)) return kTick;
    return std::uniform_real_distribution<double>(0.1, 0.4)(rng_);
  }
  struct StepError {
    double time, error;
    int tokens;
  };
  void Tick(double target) {
    state_ = TrackBits({}, Slope(text_.table, target), counters_, At(time_), state_);
  }
  void Step(double target) {
    next_step_ += text_.step_seconds;
    std::normal_distribution<double> normal;
    const double keep = std::exp(-text_.step_seconds);
    common_ = common_ * keep + text_.drift * std::sqrt(1 - keep * keep) * normal(rng_);
    const auto compute = [&](Regime regime, int tokens, double shift) {
      const double trim = step_trim_[regime];
      const double bits = text_.served.Bits(text_.table.LogPrice(target) + trim - shift);
      double sum = 0;
      for (int i = 0; i < tokens; ++i) {
        sum += std::clamp(bits + common_ + text_.noise * normal(rng_), 2.0, 8.0);
      }
      counters_[regime].Add(tokens, sum, target, trim);
      return sum - tokens * target;
    };
    int tokens = text_.tokens_per_step;
    double error = 0;
    if (text_.coherent) {
      const double trim = step_trim_[Regime::kCoherent];
      const double bits = std::clamp(text_.served.Bits(text_.table.LogPrice(target) + trim) +
                                         common_ + text_.noise / std::sqrt(tokens) * normal(rng_),
                                     2.0, 8.0);
      counters_[Regime::kCoherent].Add(1, bits, target, trim);
      error = (bits - target) * tokens;
    } else {
      error = compute(Regime::kDecode, tokens, 0);
    }
    if (std::bernoulli_distribution(text_.prompts_per_second * text_.step_seconds)(rng_)) {
      error += compute(Regime::kPrompt, text_.prompt_tokens, text_.prompt_shift);
      tokens += text_.prompt_tokens;
    }
    step_trim_ = state_.trim;  // of the next step, which begins now
    Judge(error, tokens);
  }
  void Judge(double error, int tokens) {
    errors_.push_back({next_step_, error, tokens});
    bool full = false;
    while (next_step_ - errors_.front().time >= 1) {
      errors_.pop_front();
      full = true;
    }
    if (!full) return;
    double sum = 0, tokens_sum = 0;
    for (const StepError& e : errors_) sum += e.error, tokens_sum += e.tokens;
    worst_ = std::max(worst_, std::abs(sum) / tokens_sum);
  }

  const Text text_;
  std::mt19937_64 rng_;
  double time_ = 0;
  double next_step_ = 0;
  PerRegime<float> step_trim_;
  double common_ = 0;
  PerRegime<BitsCounters> counters_;
  BitsTrackerState state_;
  std::deque<StepError> errors_;
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
      "target %.2f shift %.2f widths %.2f %.2f noise %.2f drift %.2f sticking %.2f, %d tokens a "
      "%.3f s, %.1f prompts a second of %d, shifted by %.2f",
      target, text.served.center - text.table.center, text.table.width, text.served.width,
      text.noise, text.drift, text.table.sticking, text.tokens_per_step, text.step_seconds,
      text.prompts_per_second, text.prompt_tokens, text.prompt_shift);
}

TEST(BitsTracker, HoldsEverySecondOutOfDomainOnceItHasLearned) {
  std::mt19937_64 rng(1);
  for (int round = 0; round < 1000; ++round) {
    const Text text = OutOfDomain(rng);
    const double target = Uniform(rng, 2.2, 7.8);
    Simulation simulation(text, rng());
    simulation.SettleThenRun(3, 6, target);
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
    simulation.SettleThenRun(4, 10, target);
    bad += simulation.worst() >= 0.05;
    // Steps of 100 ms leave the loop three answers a second, so a few of all seconds are outside.
    ASSERT_LT(simulation.worst(), 0.12) << Describe(text, target);
  }
  RecordProperty("runs_with_a_second_outside",
                 std::to_string(bad) + " of " + std::to_string(kRounds));
  EXPECT_LT(bad, kRounds / 8);
}

// What is repaid until a late look is repaid for too long.
TEST(BitsTracker, LooksThatComeLateDoNotMakeItSwing) {
  std::mt19937_64 rng(8);
  double sum = 0;
  constexpr int kRounds = 300;
  for (int round = 0; round < kRounds; ++round) {
    Text text = OutOfDomain(rng);
    text.step_seconds = Uniform(rng, 0.005, 0.03);
    text.tokens_per_step = static_cast<int>(std::ceil(Uniform(rng, 400, 1500) * text.step_seconds));
    text.noise = 0.35;
    text.drift = 0.05;
    text.late_looks = Uniform(rng, 0.02, 0.2);
    const double target = Uniform(rng, 2.4, 7.6);
    Simulation simulation(text, rng());
    simulation.SettleThenRun(4, 10, target);
    sum += simulation.worst();
  }
  RecordProperty("mean_of_the_worst_seconds", absl::StrFormat("%.4f", sum / kRounds));
  EXPECT_LT(sum / kRounds, 0.05);
}

// As measured on the demo model: prompts of Wikipedia want 0.2 bits more than what the model writes
// after them, and every second has a few.
TEST(BitsTracker, PromptsThatWantOtherBitsThanDecodesDisturbNoSecond) {
  std::mt19937_64 rng(6);
  for (int round = 0; round < 600; ++round) {
    Text text = OutOfDomain(rng);
    text.step_seconds = Uniform(rng, 0.005, 0.03);
    text.tokens_per_step = static_cast<int>(std::ceil(Uniform(rng, 600, 3000) * text.step_seconds));
    text.prompt_tokens = static_cast<int>(Uniform(rng, 10, 60));
    const double tokens_per_second = text.tokens_per_step / text.step_seconds;
    text.prompts_per_second = Uniform(rng, 0.1, 0.3) * tokens_per_second / text.prompt_tokens;
    text.prompt_shift = text.table.width * Uniform(rng, -0.3, 0.3);
    const double target = Uniform(rng, 2.4, 7.6);
    Simulation simulation(text, rng());
    simulation.SettleThenRun(4, 10, target);
    ASSERT_LT(simulation.worst(), 0.05) << Describe(text, target);
    // Each has learned its own.
    const auto& learned = simulation.state().learned;
    ASSERT_NEAR(learned[Regime::kPrompt].trim - learned[Regime::kDecode].trim, text.prompt_shift,
                0.15 * text.table.width)
        << Describe(text, target);
  }
}

TEST(BitsTracker, HoldsSharedLevelsOnSteepAndShallowTables) {
  std::mt19937_64 rng(7);
  for (int round = 0; round < 1000; ++round) {
    Text text = OutOfDomain(rng);
    text.coherent = true;
    text.step_seconds = std::exp(Uniform(rng, std::log(0.003), std::log(0.05)));
    text.table.width = std::exp(Uniform(rng, std::log(0.3), std::log(3)));
    text.served = text.table;
    text.table.sticking = Uniform(rng, 0, 0.5) * text.table.width;
    text.served.sticking = text.table.sticking * Uniform(rng, 0.5, 1.5);
    text.served.center += text.table.width * Uniform(rng, -0.6, 0.6);
    text.noise = Uniform(rng, 0, 0.2);
    const double target = Uniform(rng, 2.2, 7.8);
    Simulation simulation(text, rng());
    simulation.SettleThenRun(4, 6, target);
    ASSERT_LT(simulation.worst(), 0.05) << Describe(text, target);
  }
}

TEST(BitsTracker, IdleTimeTeachesAndForgetsNothing) {
  std::mt19937_64 rng(3);
  for (int round = 0; round < 300; ++round) {
    const Text text = OutOfDomain(rng);
    const double target = Uniform(rng, 2.2, 7.8);
    Simulation simulation(text, rng());
    simulation.Run(4, target);
    for (int gap = 0; gap < 3; ++gap) {
      const auto learned = [&] { return simulation.state().learned[Regime::kDecode].trim; };
      const double before = learned();
      simulation.Idle(Uniform(rng, 0.2, 30), target);
      EXPECT_EQ(learned(), before);
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
      constexpr double kMove = 0.05;
      for (double t = 0; t < seconds; t += kMove) {
        target = rng() % 60 == 0 ? Uniform(rng, 3, target) : std::min(7.5, target + 0.05);
        simulation.Run(kMove, target);
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
    EXPECT_NEAR(stuck.state().learned[Regime::kDecode].trim, limit, 1e-3 * limit);
    Text normal = text;
    normal.served = text.table;
    BitsTrackerState state = stuck.state();
    const auto learned = [&] { return state.learned[Regime::kDecode].trim; };
    double used = state.trim[Regime::kDecode], time = 100;
    int looks = 0;
    PerRegime<BitsCounters> counters;
    counters[Regime::kDecode] = state.learned[Regime::kDecode].from;
    for (; looks < 40 && std::abs(learned()) > 0.1 * limit; ++looks, time += kTick) {
      counters[Regime::kDecode].Add(100, 100 * normal.served.Bits(normal.table.LogPrice(4) + used),
                                    4, used);
      used = state.trim[Regime::kDecode];
      state = TrackBits({}, Slope(normal.table, 4), counters, At(time), state);
    }
    EXPECT_LT(looks, 20);  // a second
    EXPECT_FALSE(state.saturated);
  }
}

TEST(BitsTracker, ANewEngineBeginsAtZero) {
  constexpr PerRegime<float> kSlope = {{2, 2, 2}};
  PerRegime<BitsCounters> old, fresh;
  old[Regime::kPrompt].Add(1000, 5000, 4, 0);
  BitsTrackerState state = TrackBits({}, kSlope, old, At(1), BitsTrackerState());
  const float trim = state.trim[Regime::kPrompt];
  EXPECT_GT(trim, 0);
  fresh[Regime::kPrompt].Add(10, 40, 4, trim);
  state = TrackBits({}, kSlope, fresh, At(1.05), state);
  EXPECT_TRUE(std::isfinite(state.trim[Regime::kPrompt]));
  EXPECT_EQ(state.learned[Regime::kPrompt].from.count, 10u);
}

TEST(BitsTracker, HoldsStillWithoutMeasurements) {
  BitsTrackerState state;
  for (int i = 0; i < 100; ++i)
    state = TrackBits({}, {{2, 2, 2}}, PerRegime<BitsCounters>(), At(i * kTick), state);
  for (const Regime regime : kRegimes) EXPECT_EQ(state.trim[regime], 0);
  EXPECT_FALSE(state.saturated);
}

}  // namespace
}  // namespace mobi
