#include "engine/step_pace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <random>

namespace mobi {
namespace {

constexpr int kBudget = 512;

// A machine's step time in seconds.
using Machine = std::function<double(int decodes, int prompt_tokens)>;

// Decodes alone for a while, then a long prompt beside them: the chunks that the pace allowed.
struct Served {
  double worst_slowdown = 0;  // after a few steps to learn
  double mean_chunk = 0;
};
Served Serve(const Machine& machine, int decodes, double noise, uint64_t seed) {
  StepPace pace(1.75, 64, kBudget / 2);
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> factor(1, 1 + noise);
  for (int i = 0; i < 50; ++i) pace.Observe(decodes, 0, machine(decodes, 0) * factor(random));
  Served served;
  constexpr int kSteps = 300;
  for (int i = 0; i < kSteps; ++i) {
    const int chunk = std::min(pace.PromptTokensBeside(decodes), kBudget);
    const double seconds = machine(decodes, chunk);
    pace.Observe(decodes, chunk, seconds * factor(random));
    served.mean_chunk += static_cast<double>(chunk) / kSteps;
    if (i >= 10) {
      served.worst_slowdown = std::max(served.worst_slowdown, seconds / machine(decodes, 0));
    }
  }
  return served;
}

TEST(StepPace, KeepsStepsShortWhereEveryTokenCosts) {
  const Machine linear = [](int d, int p) { return 2e-4 + 6e-4 * (d + p); };
  for (const int decodes : {16, 32, 64}) {
    const Served served = Serve(linear, decodes, 0, 1);
    EXPECT_LE(served.worst_slowdown, 1.76) << decodes;
    EXPECT_GE(served.mean_chunk, 0.6 * decodes) << decodes;
  }
}

TEST(StepPace, LetsLongChunksRunWhereDecodesAreBoundByMemory) {
  const Machine memory_bound = [](int d, int p) { return std::max(8e-3, 2e-5 * (d + p)); };
  const Served served = Serve(memory_bound, 8, 0, 1);
  EXPECT_GE(served.mean_chunk, 400);
  EXPECT_LE(served.worst_slowdown, 1.76);
}

TEST(StepPace, ToleratesNoise) {
  const Machine linear = [](int d, int p) { return 2e-4 + 6e-4 * (d + p); };
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    const Served served = Serve(linear, 32, 0.5, seed);
    EXPECT_LE(served.worst_slowdown, 2.5) << seed;
    EXPECT_GE(served.mean_chunk, 10) << seed;
  }
}

// Now and then a step loses its core for a hundred times as long: chunks must not grow with it.
TEST(StepPace, IsNotFooledByStalls) {
  const auto machine = [](int d, int p) { return 2e-4 + 6e-4 * (d + p); };
  std::mt19937_64 random(3);
  StepPace pace(1.75, 64, kBudget / 2);
  int largest = 0;
  for (int i = 0; i < 3000; ++i) {
    const int chunk = i % 400 < 200 ? 0 : std::min(pace.PromptTokensBeside(16), kBudget);
    const double stall = random() % 40 == 0 ? 100 : 1;
    pace.Observe(16, chunk, machine(16, chunk) * stall);
    if (i > 50) largest = std::max(largest, chunk);
  }
  EXPECT_LE(largest, 40);
  EXPECT_GE(pace.PromptTokensBeside(16), 8);
}

// Precision fell, or a neighbour went away: the machine is suddenly four times as fast.
TEST(StepPace, FollowsAChangeWithoutADecodeOnlyStep) {
  StepPace pace(1.75, 64, kBudget / 2);
  double scale = 1;
  const auto machine = [&](int d, int p) { return scale * (2e-4 + 6e-4 * (d + p)); };
  for (int i = 0; i < 20; ++i) pace.Observe(16, 0, machine(16, 0));
  double slowdown = 0;
  for (int i = 0; i < 200; ++i) {
    if (i == 100) scale = 0.25;
    const int chunk = std::min(pace.PromptTokensBeside(16), kBudget);
    slowdown = machine(16, chunk) / machine(16, 0);
    pace.Observe(16, chunk, machine(16, chunk));
  }
  EXPECT_LE(slowdown, 4.5);
  EXPECT_GE(slowdown, 1.2);
}

TEST(StepPace, NeverStopsAPromptAndNeverLimitsOneAlone) {
  StepPace pace(1.75, 4, kBudget / 2);
  EXPECT_GT(pace.PromptTokensBeside(0), 1 << 20);
  EXPECT_GE(pace.PromptTokensBeside(1), 1);
  for (int i = 0; i < 100; ++i) pace.Observe(1, 0, 1e-6);
  for (int i = 0; i < 100; ++i) pace.Observe(1, 8, 1.0);
  EXPECT_GE(pace.PromptTokensBeside(1), 1);
  EXPECT_GE(pace.PromptTokensBeside(4), 1);
  const StepPace off(1, 4, kBudget / 2);
  EXPECT_GT(off.PromptTokensBeside(4), 1 << 20);
}

TEST(StepPace, TellsThePaceOfPromptsFromFullSteps) {
  StepPace pace(1.75, 4, 256);
  pace.Observe(0, 255, 1);
  EXPECT_EQ(pace.seconds_per_prompt_token(), 0);
  pace.Observe(0, 500, 1);
  EXPECT_DOUBLE_EQ(pace.seconds_per_prompt_token(), 0.002);
  pace.Observe(0, 500, 0.5);
  EXPECT_DOUBLE_EQ(pace.seconds_per_prompt_token(), 0.001);
  for (int i = 0; i < 100; ++i) pace.Observe(0, 500, 1);
  EXPECT_DOUBLE_EQ(pace.seconds_per_prompt_token(), 0.002);
}

}  // namespace
}  // namespace mobi
