#include "server/bits_tracker.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "gtest/gtest.h"

namespace mobi {
namespace {

// Served text as the loop meets it: bits fall linearly in log(price) with a slope of their own,
// shifted from the table by `shift` bits; tokens are noisy; a step uses the price at its start.
struct Plant {
  double shift = 0;
  double bits_per_nat = 0.5;  // the truth; the table says 0.5
  double noise = 0;
  int tokens_per_step = 8;
  std::mt19937 random{1};

  void Step(float target, float trim, BitsCounters& counters) {
    std::normal_distribution<double> token_noise(0, noise);
    for (int i = 0; i < tokens_per_step; ++i) {
      const double bits = target + shift - bits_per_nat * trim + token_noise(random);
      counters.bits_sum += std::clamp(bits, 2.0, 8.0);
    }
    counters.count += tokens_per_step;
    ++counters.steps;
  }
};

constexpr float kNatsPerBit = 2;

// Runs `steps` steps with a tick every `steps_per_tick`; the step under way at a tick still has the
// old trim. Returns the average bits of the last `last` steps.
double RunPlant(Plant plant, float target, int steps, int steps_per_tick, int last,
                BitsTrackerState* final_state = nullptr) {
  const BitsTrackerOptions options;
  BitsCounters counters;
  BitsTrackerState state;
  float trim_of_step = 0;
  BitsCounters mark;
  for (int step = 0; step < steps; ++step) {
    if (step == steps - last) mark = counters;
    plant.Step(target, trim_of_step, counters);
    trim_of_step = state.trim;  // of the next step
    if (step % steps_per_tick == 0)
      state = TrackBits(options, target, kNatsPerBit, counters, state);
  }
  if (final_state != nullptr) *final_state = state;
  return (counters.bits_sum - mark.bits_sum) / static_cast<double>(counters.count - mark.count);
}

TEST(BitsTracker, RemovesTheShiftOfServedText) {
  for (const double shift : {-0.8, -0.3, 0.0, 0.5, 1.0}) {
    for (const float target : {2.6f, 3.5f, 5.0f, 7.0f}) {
      Plant plant{.shift = shift};
      EXPECT_NEAR(RunPlant(plant, target, 400, 2, 50), target, 0.05) << shift << " " << target;
    }
  }
}

// The table's slope may be wrong by a factor of three either way; noise is that of single tokens.
TEST(BitsTracker, IsStableForWrongSlopesAndNoise) {
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    Plant plant;
    plant.random.seed(random());
    plant.shift = std::uniform_real_distribution<double>(-0.6, 0.6)(random);
    plant.bits_per_nat = 0.5 * std::exp(std::uniform_real_distribution<double>(-1.1, 1.1)(random));
    plant.noise = 0.3;
    plant.tokens_per_step = 1 + static_cast<int>(random() % 64);
    const int steps_per_tick = 1 + static_cast<int>(random() % 5);
    const float target = std::uniform_real_distribution<float>(3, 7)(random);
    const int steps = 4000 / plant.tokens_per_step + 200;
    const int last = std::max(20, 800 / plant.tokens_per_step);
    EXPECT_NEAR(RunPlant(plant, target, steps, steps_per_tick, last), target, 0.05)
        << "round " << round << " slope " << plant.bits_per_nat << " tokens "
        << plant.tokens_per_step;
  }
}

TEST(BitsTracker, SettlesWithinTenCorrections) {
  Plant plant{.shift = 1.0, .tokens_per_step = 64};
  BitsCounters counters;
  BitsTrackerState state;
  int corrections = 0;
  float trim = 0;
  while (corrections < 10) {
    plant.Step(4, trim, counters);
    trim = state.trim;
    const float before = state.trim;
    state = TrackBits({}, 4, kNatsPerBit, counters, state);
    corrections += state.trim != before;
  }
  EXPECT_NEAR(state.trim, 2.0, 0.05);  // one bit at two nats a bit
}

TEST(BitsTracker, SaturatesAndComesBack) {
  BitsTrackerState state;
  Plant far{.shift = 3.0};  // more than the limit of three nats corrects
  RunPlant(far, 4, 400, 1, 10, &state);
  EXPECT_TRUE(state.saturated);
  EXPECT_EQ(state.trim, BitsTrackerOptions().max_trim);
  // The very next corrections already move: nothing was wound up.
  Plant near{.shift = 0.0};
  BitsCounters counters = state.from;
  for (int i = 0; i < 12; ++i) {
    near.Step(4, state.trim, counters);
    state = TrackBits({}, 4, kNatsPerBit, counters, state);
  }
  EXPECT_FALSE(state.saturated);
  EXPECT_LT(state.trim, 2.5f);
}

TEST(BitsTracker, HoldsStillWithoutTokensAndAtTheEdges) {
  BitsTrackerState state;
  BitsCounters counters;
  for (int i = 0; i < 100; ++i) state = TrackBits({}, 4, kNatsPerBit, counters, state);
  EXPECT_EQ(state.trim, 0);
  for (const float target : {2.0f, 8.0f}) {
    // Levels do not depend on the price there, so no error may move it.
    Plant plant{.shift = 0.7};
    BitsTrackerState edge;
    RunPlant(plant, target, 200, 1, 10, &edge);
    EXPECT_EQ(edge.trim, 0) << target;
  }
}

TEST(BitsTracker, ANewTargetDiscardsWhatWasMeasuredAtTheOld) {
  const BitsTrackerOptions options;
  BitsTrackerState state;
  BitsCounters counters;
  Plant plant{.tokens_per_step = 64};
  for (int i = 0; i < 10; ++i) {
    plant.Step(6, 0, counters);
    state = TrackBits(options, 6, kNatsPerBit, counters, state);
  }
  plant.Step(6, 0, counters);  // still at the old target
  state = TrackBits(options, 3, kNatsPerBit, counters, state);
  plant.Step(6, 0, counters);  // began before the change
  state = TrackBits(options, 3, kNatsPerBit, counters, state);
  EXPECT_EQ(state.trim, 0);
  for (int i = 0; i < 10; ++i) {
    plant.Step(3, 0, counters);
    state = TrackBits(options, 3, kNatsPerBit, counters, state);
  }
  EXPECT_EQ(state.trim, 0);
}

}  // namespace
}  // namespace mobi
