// When slices leave and come back: single cases, and loads from seeds in a closed loop.
#include "engine/residency_policy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace mobi {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// A pool whose blocks follow the policy: 100 of its own and 40 for every level that is away.
class Pool {
 public:
  explicit Pool(const ResidencyOptions& options = {}, int resident = kNumLevels)
      : policy_(options), resident_(resident) {}

  // Looks once at a time when `demand` blocks are wanted. Every look is one millisecond later.
  void Look(int demand, int needed = 1) {
    now_ += milliseconds(1);
    ResidencyLoad load;
    load.now = now_;
    load.resident_levels = resident_;
    load.needed_levels = needed;
    load.short_of_blocks = demand > Blocks(resident_);
    load.used_blocks = std::min(demand, Blocks(resident_));
    load.blocks_after_restore = Blocks(resident_ + 1);
    const int wanted = policy_.Decide(load);
    ASSERT_LE(std::abs(wanted - resident_), 1);
    ASSERT_GE(wanted, 1);
    ASSERT_LE(wanted, kNumLevels);
    if (wanted == resident_) return;
    changes_.push_back({now_, resident_, wanted, needed});
    resident_ = wanted;
    policy_.Changed(now_);
  }
  void Run(milliseconds time, int demand, int needed = 1) {
    for (auto i = 0; i < time.count() && !testing::Test::HasFatalFailure(); ++i) {
      Look(demand, needed);
    }
  }

  struct Change {
    TimePoint time;
    int from;
    int to;
    int needed;
  };
  int resident() const { return resident_; }
  const std::vector<Change>& changes() const { return changes_; }
  static int Blocks(int resident) { return 100 + 40 * (kNumLevels - resident); }

 private:
  ResidencyPolicy policy_;
  int resident_;
  TimePoint now_{};
  std::vector<Change> changes_;
};

TEST(ResidencyPolicy, ALevelLeavesOnceBlocksHaveBeenShortForAWhile) {
  Pool pool;
  pool.Run(milliseconds(400), 120);
  EXPECT_EQ(pool.resident(), 4);
  pool.Run(milliseconds(200), 120);
  EXPECT_EQ(pool.resident(), 3);
  pool.Run(seconds(60), 120);
  EXPECT_EQ(pool.resident(), 3) << "120 of 140 blocks are enough, and too many for 100";
}

TEST(ResidencyPolicy, AMomentWithoutBlocksChangesNothing) {
  Pool pool;
  for (int i = 0; i < 60; ++i) {
    pool.Run(milliseconds(100), 120);
    pool.Run(milliseconds(900), 90);
  }
  EXPECT_TRUE(pool.changes().empty());
}

TEST(ResidencyPolicy, ShortageWithBriefPausesIsOneShortage) {
  Pool pool;
  for (int i = 0; i < 600; ++i) pool.Look(i % 3 == 0 ? 120 : 90);
  EXPECT_EQ(pool.resident(), 3);
}

TEST(ResidencyPolicy, TheNextLevelWaitsForTheDwellAndTheLowestStay) {
  Pool pool;
  pool.Run(seconds(10), 1000);
  EXPECT_EQ(pool.resident(), 3);
  pool.Run(seconds(60), 1000);
  EXPECT_EQ(pool.resident(), 2);
  ASSERT_EQ(pool.changes().size(), 2u);
  EXPECT_GE(pool.changes()[1].time - pool.changes()[0].time, seconds(10));
}

TEST(ResidencyPolicy, LevelsReturnOneByOneWhenTheirBlocksAreNotNeeded) {
  Pool pool({}, 2);
  pool.Run(seconds(60), 99);  // of 140 that would be left: more than 70 %
  EXPECT_EQ(pool.resident(), 2);
  pool.Run(seconds(60), 97);
  EXPECT_EQ(pool.resident(), 3);
  for (int i = 0; i < 20; ++i) {
    pool.Run(seconds(9), 60);
    pool.Look(80);
  }
  EXPECT_EQ(pool.resident(), 3) << "never calm for a whole dwell";
  pool.Run(seconds(11), 60);
  EXPECT_EQ(pool.resident(), 4);
}

TEST(ResidencyPolicy, ARequestBringsItsLevelsBackAtOnceAndKeepsThem) {
  Pool pool;
  pool.Run(seconds(30), 1000);
  ASSERT_EQ(pool.resident(), 2);
  pool.Look(1000, 4);
  pool.Look(1000, 4);
  EXPECT_EQ(pool.resident(), 4);
  pool.Run(seconds(60), 1000, 4);
  EXPECT_EQ(pool.resident(), 4);
  pool.Run(seconds(30), 1000, 3);
  EXPECT_EQ(pool.resident(), 3);
}

TEST(ResidencyPolicy, WhereMoreThanTheLowestAreAwayNothingElseIsForced) {
  ResidencyOptions options;
  options.min_levels = 3;
  Pool pool(options, 2);
  pool.Run(seconds(60), 1000);
  EXPECT_EQ(pool.resident(), 2);
}

// Whatever the load: changes of the policy's own are a dwell apart, and no level leaves that is
// needed.
TEST(ResidencyPolicy, KeepsItsPromisesOverRandomLoads) {
  size_t changes = 0, forced = 0;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    std::mt19937_64 random(seed);
    const auto draw = [&](int low, int high) {
      return std::uniform_int_distribution<int>(low, high)(random);
    };
    ResidencyOptions options;
    options.min_levels = draw(1, 4);
    options.dwell = milliseconds(draw(1, 2000));
    options.patience = milliseconds(draw(1, 500));
    options.restore_usage = draw(30, 100) / 100.0;
    Pool pool(options);
    for (int phase = 0; phase < 30; ++phase) {
      const int mean = draw(0, 300), noise = draw(0, 80);
      const int needed = draw(0, 3) == 0 ? draw(1, 4) : 1;
      for (int i = draw(1, 1500); i > 0; --i) pool.Look(mean + draw(-noise, noise), needed);
      ASSERT_FALSE(HasFatalFailure());
    }
    TimePoint last{};
    for (const Pool::Change& change : pool.changes()) {
      const bool was_forced = change.to > change.from && change.needed > change.from;
      if (last != TimePoint{} && !was_forced) {
        ASSERT_GE(change.time - last, options.dwell) << "seed " << seed;
      }
      if (change.to < change.from) {
        ASSERT_GE(change.to, std::max(options.min_levels, change.needed)) << "seed " << seed;
      }
      last = change.time;
      ++changes;
      forced += was_forced;
    }
  }
  EXPECT_GT(changes, 300u);
  EXPECT_GT(forced, 30u);
}

// Demand that keeps its mean never makes a level leave and return: whatever the start, levels move
// one way and rest.
TEST(ResidencyPolicy, NoisyDemandNeverMakesItFlap) {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    std::mt19937_64 random(seed);
    const auto draw = [&](int low, int high) {
      return std::uniform_int_distribution<int>(low, high)(random);
    };
    ResidencyOptions options;
    options.dwell = milliseconds(draw(50, 1000));
    options.patience = milliseconds(draw(5, 200));
    Pool pool(options, draw(2, 4));
    const int mean = draw(20, 250);
    const int noise = mean / 6;  // highest and lowest are 7 to 5, so not 10 to 7
    for (int i = 0; i < 10000; ++i) {
      pool.Look(mean + draw(-noise, noise));
      ASSERT_FALSE(HasFatalFailure());
    }
    for (size_t i = 1; i < pool.changes().size(); ++i) {
      ASSERT_EQ(pool.changes()[i].to > pool.changes()[i].from,
                pool.changes()[0].to > pool.changes()[0].from)
          << "seed " << seed << ", demand " << mean << " +- " << noise;
    }
  }
}

}  // namespace
}  // namespace mobi
