#include "server/pressure.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "gtest/gtest.h"
#include "server/policy.h"
#include "server/pressure_signals.h"
#include "tests/server/fluid_plant.h"
#include "tests/server/simulated_server.h"

namespace mobi {
namespace {

constexpr double kTick = 0.05;

TimePoint At(double seconds) { return TimePoint(Duration(static_cast<int64_t>(seconds * 1e9))); }

// The loop on one reading, at 50 ms.
class Loop {
 public:
  Loop(float floor, float ceiling) : floor_(floor), ceiling_(ceiling) {}

  float Tick(double pressure) {
    const SignalReading reading{.name = "load", .value = pressure};
    state_ = UpdatePressure({},
                            {.floor_bits = floor_,
                             .ceiling_bits = ceiling_,
                             .readings = absl::MakeConstSpan(&reading, 1)},
                            At(time_), std::move(state_));
    time_ += kTick;
    EXPECT_GE(state_.target_bits, floor_);
    EXPECT_LE(state_.target_bits, ceiling_);
    return state_.target_bits;
  }
  float Run(double seconds, double pressure) {
    for (const double end = time_ + seconds - kTick / 2; time_ < end;) Tick(pressure);
    return state_.target_bits;
  }
  void SetRange(float floor, float ceiling) { floor_ = floor, ceiling_ = ceiling; }
  const PressureState& state() const { return state_; }
  double relief() const { return (ceiling_ - state_.target_bits) / (ceiling_ - floor_); }

 private:
  float floor_;
  float ceiling_;
  double time_ = 0;
  PressureState state_;
};

TEST(Pressure, ReactsWithin250MsOfALoadStep) {
  std::mt19937_64 rng(1);
  std::uniform_real_distribution<double> quiet(0, 0.6), loud(2, 10);
  for (int round = 0; round < 1000; ++round) {
    Loop loop(3, 8);
    EXPECT_EQ(loop.Run(5, quiet(rng)), 8);
    loop.Run(0.25, loud(rng));
    EXPECT_GT(loop.relief(), 0.5);
    loop.Run(1.5, 4);
    EXPECT_EQ(loop.relief(), 1);
  }
}

TEST(Pressure, ComesBackLaterAndSlowerThanItWentDown) {
  Loop loop(3, 8);
  loop.Run(5, 0);
  double down = 0, held = 0, up = 0;
  for (; loop.relief() < 1; down += kTick) loop.Tick(3);
  for (; loop.relief() == 1; held += kTick) loop.Tick(0);
  for (; loop.relief() > 0; up += kTick) loop.Tick(0);
  EXPECT_LT(down, 1);
  EXPECT_GE(held, 1);
  EXPECT_GT(up, 4 * down);
  EXPECT_LT(up, 60);
}

TEST(Pressure, RestsWherePressureIsNearTheSetpoint) {
  Loop loop(3, 8);
  loop.Run(20, 1.5);
  const float before = loop.Run(1.5, 0.7);
  EXPECT_EQ(loop.Run(30, 0.75), loop.Run(30, 0.75));
  EXPECT_NEAR(loop.Run(30, 0.7), before, 0.2);
}

TEST(Pressure, TakesTheLargestSignalAndForgetsNaN) {
  std::vector<SignalReading> readings = {
      {.name = "a", .value = 4, .reference = 8},
      {.name = "b", .value = 300, .reference = 250},
      {.name = "c", .value = std::nan("")},
      {.name = "d", .value = -5},
      {.name = "e", .stale = true, .default_pressure = 0.25},
      {.name = "f", .value = 1e300, .reference = 1e-300, .stale = true}};
  const auto state =
      UpdatePressure({}, {.floor_bits = 3, .ceiling_bits = 8, .readings = readings}, At(0), {});
  EXPECT_DOUBLE_EQ(state.pressure, 1.2);
  const double expected[] = {0.5, 1.2, 0, 0, 0.25, 0};
  for (size_t i = 0; i < readings.size(); ++i) {
    EXPECT_DOUBLE_EQ(state.signals[i].pressure, expected[i]) << readings[i].name;
  }
  readings[5].stale = false;
  const auto next =
      UpdatePressure({}, {.floor_bits = 3, .ceiling_bits = 8, .readings = readings}, At(60), state);
  EXPECT_NEAR(next.pressure, 4, 1e-6);  // clamped
}

TEST(Pressure, WithoutSignalsTheCeilingHolds) {
  PressureState state;
  for (int i = 0; i < 100; ++i) {
    state = UpdatePressure({}, {.floor_bits = 3, .ceiling_bits = 6, .readings = {}}, At(i * kTick),
                           state);
    EXPECT_EQ(state.target_bits, 6);
  }
}

TEST(Pressure, ANewWindowHoldsAtOnceAndBitsRiseSlowly) {
  Loop loop(3, 5);
  loop.Run(10, 0);
  loop.SetRange(4, 8);
  EXPECT_LT(loop.Tick(0), 5.2f);
  EXPECT_EQ(loop.Run(10, 0), 8);
  loop.SetRange(3, 5);
  EXPECT_EQ(loop.Tick(0), 5);
  loop.SetRange(6, 6);
  EXPECT_EQ(loop.Tick(4), 6);
}

// What a run of a fluid plant under a load of `need` came to.
struct Outcome {
  double swing = 0;          // of relief, once it has settled
  double rest_pressure = 0;  // then, at most
  double relief = 0;         // at the end of the load
  double recovery_seconds = 0;
};

Outcome RunFluid(const FluidOptions& options, double need, double load_seconds, float floor,
                 float ceiling) {
  FluidPlant plant(options);
  Loop loop(floor, ceiling);
  const auto run = [&](double seconds, double load, auto&& look) {
    for (double t = 0; t < seconds; t += kTick) {
      plant.Run(kTick, load, loop.relief());
      loop.Tick(plant.pressure());
      look(t);
    }
  };
  Outcome outcome;
  run(5, -0.5, [](double) {});
  double low = 1, high = 0;
  run(load_seconds, need, [&](double t) {
    if (t < load_seconds - 60) return;
    low = std::min(low, loop.relief());
    high = std::max(high, loop.relief());
    outcome.rest_pressure = std::max(outcome.rest_pressure, loop.state().pressure);
  });
  outcome.swing = high - low;
  outcome.relief = loop.relief();
  outcome.recovery_seconds = 1e9;
  run(90, -0.5, [&](double t) {
    if (loop.relief() < 0.05) outcome.recovery_seconds = std::min(outcome.recovery_seconds, t);
  });
  return outcome;
}

std::string Describe(const FluidOptions& options, double need) {
  return absl::StrFormat("kind %d rate %.3f slope %.2f window %.1f lag %.1f delay %.3f need %.2f",
                         static_cast<int>(options.kind), options.rate, options.slope,
                         options.window_seconds, options.lag_seconds, options.delay_seconds, need);
}

TEST(PressureProperties, SettlesWithoutLimitCycleOnThousandsOfPlants) {
  std::mt19937_64 rng(2);
  std::uniform_real_distribution<double> part(0.05, 0.95), bits(0, 1);
  int worst_round = -1;
  double worst_swing = 0, total_swing = 0;
  constexpr int kRounds = 2000;
  for (int round = 0; round < kRounds; ++round) {
    const FluidOptions options = RandomFluid(rng, 3);
    const double need = part(rng);
    const float floor = 3 + 2 * static_cast<float>(bits(rng));
    const float ceiling = floor + 1 + 2 * static_cast<float>(bits(rng));
    const Outcome outcome = RunFluid(options, need, 360, floor, ceiling);
    total_swing += outcome.swing;
    if (outcome.swing > worst_swing) worst_swing = outcome.swing, worst_round = round;
    ASSERT_LT(outcome.swing, 0.25) << Describe(options, need);
    ASSERT_LT(outcome.rest_pressure, 1) << Describe(options, need);
    ASSERT_LT(outcome.recovery_seconds, 60) << Describe(options, need);
  }
  EXPECT_LT(total_swing / kRounds, 0.05);
  RecordProperty("worst_swing", std::to_string(worst_swing));
  RecordProperty("worst_round", worst_round);
}

TEST(PressureProperties, PlantsFasterThanTheLoopDoNotDriveItIntoALimitCycle) {
  std::mt19937_64 rng(3);
  std::uniform_real_distribution<double> part(0.05, 0.95);
  double total_swing = 0;
  constexpr int kRounds = 300;
  for (int round = 0; round < kRounds; ++round) {
    FluidOptions options = RandomFluid(rng, 10);
    options.kind = FluidKind::kQueue;
    options.rate = std::uniform_real_distribution<double>(3, 10)(rng);
    const double need = part(rng);
    const Outcome outcome = RunFluid(options, need, 200, 3, 8);
    total_swing += outcome.swing;
    ASSERT_LT(outcome.swing, 0.35) << Describe(options, need);
  }
  EXPECT_LT(total_swing / kRounds, 0.1);
}

TEST(PressureProperties, LoadThatCannotBeServedHoldsTheFloorAndNoLoadTheCeiling) {
  std::mt19937_64 rng(4);
  for (int round = 0; round < 300; ++round) {
    const FluidOptions options = RandomFluid(rng, 10, 0.4);
    const Outcome over = RunFluid(options, 1.8, 200, 3, 8);
    EXPECT_EQ(over.relief, 1) << Describe(options, 1.8);
    EXPECT_EQ(over.swing, 0) << Describe(options, 1.8);
    const Outcome none = RunFluid(options, -0.6, 60, 3, 8);
    EXPECT_EQ(none.relief, 0) << Describe(options, -0.6);
  }
}

struct Machine {
  const char* name;
  SimulatedServerOptions options;
  double queue_reference;
  double mean_prompt_tokens = 200;
  double mean_output_tokens = 60;
  double capacity_at_ceiling = 0;  // requests per second
  double capacity_at_floor = 0;
};

std::function<double(double, int, int)> StepTime(double fixed, double weights, double decode,
                                                 double prompt) {
  return [=](double bits, int decodes, int prompt_tokens) {
    return fixed + weights * bits / 8 + decode * decodes + prompt * prompt_tokens;
  };
}

constexpr float kFloor = 3, kCeiling = 8;

double Capacity(const Machine& machine, double bits) {
  SimulatedServer server(machine.options);
  // More than any of the machines can do; what is not served only waits.
  SimulatedArrivals arrivals(
      1, [](double) { return 500.0; }, 500, machine.mean_prompt_tokens, machine.mean_output_tokens);
  server.SetBits(bits);
  const auto run = [&](double until) {
    arrivals.SubmitUntil(until, server);
    server.RunUntil(until);
    return static_cast<double>(server.outcome().finished);
  };
  const double before = run(5);
  return (run(25) - before) / 20;
}

std::vector<Machine> Machines() {
  std::vector<Machine> machines(4);
  machines[0] = {.name = "server", .options = {}, .queue_reference = 8};
  machines[0].options.step_seconds = StepTime(5e-3, 10e-3, 0.05e-3, 0.05e-3);
  machines[1] = {.name = "gpu", .options = {}, .queue_reference = 16};
  machines[1].options = {.max_seqs = 64,
                         .num_kv_blocks = 4096,
                         .step_seconds = StepTime(3e-3, 8e-3, 0.03e-3, 0.01e-3),
                         .itl_objective_seconds = 0.03};
  machines[1].mean_output_tokens = 120;
  machines[2] = {.name = "cpu", .options = {}, .queue_reference = 4};
  machines[2].options = {.max_seqs = 8,
                         .max_step_tokens = 128,
                         .step_seconds = StepTime(40e-3, 120e-3, 2e-3, 1e-3),
                         .ttft_objective_seconds = 4,
                         .itl_objective_seconds = 0.45};
  machines[2].mean_prompt_tokens = 100;
  machines[3] = {.name = "short of KV", .options = {}, .queue_reference = 8};
  machines[3].options = {.max_seqs = 32,
                         .num_kv_blocks = 200,
                         .step_seconds = StepTime(5e-3, 12e-3, 0.05e-3, 0.02e-3)};
  for (Machine& machine : machines) {
    machine.capacity_at_ceiling = Capacity(machine, kCeiling);
    machine.capacity_at_floor = Capacity(machine, kFloor);
  }
  return machines;
}

struct Arm {
  SimulatedOutcome outcome;
  double swings_per_minute = 0;  // turns of the target by half the range
  double resting_bits = 0;       // mean of the last ten seconds
};

Arm Replay(const Machine& machine, uint64_t seed, const std::function<double(double)>& rate,
           double max_rate, double seconds, std::optional<float> fixed_bits) {
  SimulatedServer server(machine.options);
  SimulatedArrivals arrivals(seed, rate, max_rate, machine.mean_prompt_tokens,
                             machine.mean_output_tokens);
  SignalReader reader;
  PressureState state;
  Policy policy;
  policy.slo = {.ttft_p95_ms = 1e3 * machine.options.ttft_objective_seconds,
                .itl_p95_ms = 1e3 * machine.options.itl_objective_seconds};
  policy.signals = {{.kind = SignalKind::kQueueDepth,
                     .name = "queue_depth",
                     .reference = machine.queue_reference},
                    {.kind = SignalKind::kKvUsage, .name = "kv_usage", .reference = 0.9}};
  const std::vector<PolicySignal> signals = policy.AllSignals();
  int turns = 0;
  bool rising = true;
  float extreme = kCeiling;
  Arm arm;
  for (double t = 0; t < seconds; t += kTick) {
    arrivals.SubmitUntil(t, server);
    server.RunUntil(t);
    reader.Add(At(t), server.sample());
    const std::vector<SignalReading> readings = reader.Read(signals, {});
    state = UpdatePressure(
        {}, {.floor_bits = kFloor, .ceiling_bits = kCeiling, .readings = readings}, At(t), state);
    const float bits = fixed_bits.value_or(state.target_bits);
    EXPECT_GE(bits, kFloor);
    EXPECT_LE(bits, kCeiling);
    server.SetBits(bits);
    if (t >= seconds - 10) arm.resting_bits += bits * kTick / 10;
    extreme = rising ? std::max(extreme, bits) : std::min(extreme, bits);
    if (std::abs(bits - extreme) > (kCeiling - kFloor) / 2) {
      ++turns;
      rising = !rising;
      extreme = bits;
    }
  }
  arm.outcome = server.outcome();
  arm.swings_per_minute = turns * 60 / seconds;
  return arm;
}

// Quiet at both ends; in between a load between what the ceiling and what the floor can serve,
// shaped as a step, a ramp, bursts or noise.
std::function<double(double)> RandomLoad(const Machine& machine, std::mt19937_64& rng,
                                         double seconds) {
  const double low = 0.4 * machine.capacity_at_ceiling;
  const double peak = std::uniform_real_distribution<double>(machine.capacity_at_ceiling,
                                                             machine.capacity_at_floor)(rng);
  const double period = std::uniform_real_distribution<double>(4, 20)(rng);
  std::vector<double> noise;
  for (int i = 0; i < 100; ++i) noise.push_back(std::uniform_real_distribution<double>(0, 1)(rng));
  const int shape = static_cast<int>(rng() % 4);
  return [=](double t) {
    if (t < 10 || t > seconds - 60) return low / 2;
    switch (shape) {
      case 0:
        return peak;
      case 1:
        return low + (peak - low) * (t - 10) / (seconds - 70);
      case 2:
        return std::fmod(t, period) < period / 3 ? peak : low;
      default:
        return low + (peak - low) * noise[static_cast<size_t>(t) % noise.size()];
    }
  };
}

TEST(PressureProperties, RandomLoadsOnSimulatedServers) {
  std::mt19937_64 rng(5);
  double elastic_missed = 0, ceiling_missed = 0, floor_missed = 0, bits = 0, swings = 0;
  constexpr int kRounds = 120;
  const std::vector<Machine> machines = Machines();
  for (int round = 0; round < kRounds; ++round) {
    const Machine& machine = machines[round % machines.size()];
    constexpr double kSeconds = 150;
    const auto load = RandomLoad(machine, rng, kSeconds);
    const uint64_t seed = rng();
    const double max_rate = machine.capacity_at_floor;
    const Arm elastic = Replay(machine, seed, load, max_rate, kSeconds, std::nullopt);
    const Arm ceiling = Replay(machine, seed, load, max_rate, kSeconds, kCeiling);
    const Arm floor = Replay(machine, seed, load, max_rate, kSeconds, kFloor);
    SCOPED_TRACE(machine.name);
    // The queue overshoots the fastest server's by no more than a few references.
    EXPECT_LE(elastic.outcome.most_waiting,
              floor.outcome.most_waiting + 4 * machine.queue_reference);
    EXPECT_GE(elastic.resting_bits, kCeiling - 1);
    EXPECT_LT(elastic.swings_per_minute, 15);
    elastic_missed += 1 - elastic.outcome.ttft_attainment();
    ceiling_missed += 1 - ceiling.outcome.ttft_attainment();
    floor_missed += 1 - floor.outcome.ttft_attainment();
    bits += elastic.outcome.mean_bits();
    swings += elastic.swings_per_minute;
  }
  // Most of what fewer bits can save is saved, at far more bits.
  EXPECT_LT(elastic_missed - floor_missed, 0.1 * (ceiling_missed - floor_missed));
  EXPECT_GT(bits / kRounds, kFloor + 1.5);
  EXPECT_LT(swings / kRounds, 5);
  RecordProperty("missed",
                 absl::StrFormat("elastic %.4f ceiling %.4f floor %.4f", elastic_missed / kRounds,
                                 ceiling_missed / kRounds, floor_missed / kRounds));
  RecordProperty("bits", absl::StrFormat("%.3f", bits / kRounds));
  RecordProperty("swings_per_minute", absl::StrFormat("%.2f", swings / kRounds));
}

TEST(PressureSurface, NoQualityIsSpentWhereItBuysNoLatency) {
  // Flat from 5 bits up with few tokens, everywhere with many.
  const auto surface =
      StepSurface::Create({2, 5, 8}, {1, 64, 512}, {{4, 10, 80}, {10, 12, 80}, {10, 20, 80}});
  ASSERT_TRUE(surface.ok()) << surface.status();
  const SignalReading reading{.name = "load", .value = 1.2};
  PressureState state;
  const auto run = [&](double seconds, double tokens, double pressure) {
    SignalReading now = reading;
    now.value = pressure;
    const TimePoint end = *state.updated + Duration(static_cast<int64_t>(seconds * 1e9));
    while (*state.updated < end) {
      state = UpdatePressure({},
                             {.floor_bits = 3,
                              .ceiling_bits = 8,
                              .readings = absl::MakeConstSpan(&now, 1),
                              .surface = &*surface,
                              .step_tokens = tokens},
                             *state.updated + std::chrono::milliseconds(50), state);
    }
    return state.target_bits;
  };
  state.updated = At(0);
  state.target_bits = state.moving_bits = 8;
  EXPECT_EQ(run(30, 512, 3), 8);  // nothing to be had, whatever the pressure
  EXPECT_FLOAT_EQ(state.kept_bits, 5);
  EXPECT_LT(run(30, 64, 3), 3.3f);  // here fewer bits are faster all the way
  EXPECT_LT(state.kept_bits, 0.3f);
  EXPECT_EQ(run(120, 64, 0), 8);
  EXPECT_EQ(run(15, 1, 0.9), 8);  // wants about 7 bits, which are no faster
  EXPECT_GT(state.kept_bits, 0.3f);
  EXPECT_LT(run(30, 1, 3), 3.3f);
}

TEST(PressureSurface, TheTargetNeverPaysForNothing) {
  std::mt19937_64 rng(9);
  const auto uniform = [&](double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(rng);
  };
  for (int round = 0; round < 300; ++round) {
    // Any surface, not even monotone.
    std::vector<double> bits = {2, 3, 4, 5, 6, 8}, tokens = {1, 8, 64};
    std::vector<std::vector<double>> ms;
    for (size_t i = 0; i < bits.size(); ++i) {
      ms.push_back({uniform(5, 6 + i), uniform(5, 6 + i), uniform(5, 6 + i)});
    }
    const auto surface = StepSurface::Create(bits, tokens, ms);
    ASSERT_TRUE(surface.ok());
    const double pressure = uniform(0, 2), step_tokens = uniform(1, 64);
    PressureState state;
    for (int i = 0; i < 2000; ++i) {
      const SignalReading reading{.name = "load", .value = pressure};
      state = UpdatePressure({},
                             {.floor_bits = 3,
                              .ceiling_bits = 8,
                              .readings = absl::MakeConstSpan(&reading, 1),
                              .surface = &*surface,
                              .step_tokens = step_tokens},
                             At(i * kTick), state);
      ASSERT_GE(state.target_bits, 3);
      ASSERT_LE(state.target_bits, 8);
    }
    const double here = surface->StepMs(state.target_bits, step_tokens);
    for (float more = state.target_bits + 0.1f; more <= 8; more += 0.1f) {
      ASSERT_GT(surface->StepMs(more, step_tokens), here * 0.999)
          << "at " << more << " instead of " << state.target_bits;
    }
  }
}

TEST(StepSurface, InterpolatesAndGoesOnAtItsEdges) {
  const auto surface = StepSurface::Create({2, 4, 8}, {1, 16}, {{1, 2}, {3, 4}, {5, 10}});
  ASSERT_TRUE(surface.ok());
  EXPECT_DOUBLE_EQ(surface->StepMs(2, 1), 1);
  EXPECT_DOUBLE_EQ(surface->StepMs(3, 1), 2);
  EXPECT_DOUBLE_EQ(surface->StepMs(8, 4), 7.5);
  EXPECT_DOUBLE_EQ(surface->StepMs(9, 1000), 10);
  EXPECT_DOUBLE_EQ(surface->StepMs(1, 0.1), 1);
  const auto one = StepSurface::Create({2, 8}, {1}, {{1}, {4}});
  ASSERT_TRUE(one.ok());
  EXPECT_DOUBLE_EQ(one->StepMs(5, 7), 2.5);
}

TEST(StepSurface, ReadsWhatItWritesAndRefusesTheRest) {
  const auto surface = StepSurface::Create({2, 4.5, 8}, {1, 16}, {{1, 2}, {3, 4}, {5, 10}});
  ASSERT_TRUE(surface.ok());
  const auto again = StepSurface::Parse(surface->ToJson(), "s");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->ToJson(), surface->ToJson());

  const std::string two = R"({"bits":2,"tokens":1,"milliseconds":1})";
  const std::string eight = R"({"bits":8,"tokens":1,"milliseconds":2})";
  const auto points = [](const std::string& list) { return R"({"points":[)" + list + "]}"; };
  const std::pair<std::string, const char*> cases[] = {
      {"", "s: "},
      {"[]", "s: "},
      {"{}", "s: points: missing"},
      {R"({"points":{}})", "s: points: "},
      {points(""), "s: bits: has 0 entries, needs 2"},
      {points(two), "s: bits: has 1 entries, needs 2"},
      {points("1"), "s: points[0]: "},
      {points(two + "," + two), "s: points[1]: is there twice"},
      {points(two + R"(,{"tokens":1,"milliseconds":1})"), "s: points[1].bits: missing"},
      {points(two + R"(,{"bits":9,"tokens":1,"milliseconds":1})"), "s: points[1].bits: "},
      {points(two + R"(,{"bits":8,"tokens":0,"milliseconds":1})"), "s: points[1].tokens: "},
      {points(two + R"(,{"bits":8,"tokens":1,"milliseconds":0})"), "s: points[1].milliseconds: "},
      {points(two + R"(,{"bits":8,"tokens":1,"milliseconds":"1"})"), "s: points[1].milliseconds: "},
      {points(two + "," + eight + R"(,{"bits":8,"tokens":2,"milliseconds":1})"),
       "s: points: 3 entries, but 2 bits by 2 tokens are 4"},
  };
  for (const auto& [json, message] : cases) {
    const auto parsed = StepSurface::Parse(json, "s");
    ASSERT_FALSE(parsed.ok()) << json;
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(std::string(parsed.status().message()).find(message), 0u) << parsed.status();
  }
}

}  // namespace
}  // namespace mobi
