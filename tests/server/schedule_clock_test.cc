#include "server/schedule_clock.h"

#include <random>

#include "gtest/gtest.h"

namespace mobi {
namespace {

using std::chrono::hours;
using std::chrono::milliseconds;
using std::chrono::minutes;
using std::chrono::seconds;

// A system clock that can be set wrong, read at 50 ms.
class Simulation {
 public:
  // Runs for `span` with the system clock off by `error`; true when what schedules see was always
  // within `tolerance` of the truth plus `belief`.
  bool Run(Duration span, Duration error, Duration belief = Duration::zero()) {
    bool good = true;
    for (const TimePoint end = now_ + span; now_ < end; now_ += milliseconds(50)) {
      const auto truth = WallTime(
          std::chrono::duration_cast<WallTime::duration>(now_.time_since_epoch() + hours(480000)));
      state_ = FollowWallClock({}, now_, truth + error, state_);
      const Duration seen = ScheduleNow(state_, now_) - truth - belief;
      good &= seen <= seconds(2) && seen >= -seconds(2);
    }
    return good;
  }

 private:
  TimePoint now_{};
  ScheduleClockState state_;
};

TEST(ScheduleClock, AJumpOfAnHourThatIsCorrectedIsNeverSeen) {
  for (const Duration jump : {Duration(hours(1)), Duration(-hours(1)), Duration(seconds(30))}) {
    Simulation simulation;
    EXPECT_TRUE(simulation.Run(minutes(1), Duration::zero()));
    for (int i = 0; i < 5; ++i) {
      EXPECT_TRUE(simulation.Run(minutes(4), jump));
      EXPECT_TRUE(simulation.Run(seconds(1), Duration::zero()));
    }
  }
}

TEST(ScheduleClock, AJumpThatStaysIsFollowedOnce) {
  Simulation simulation;
  EXPECT_TRUE(simulation.Run(minutes(1), Duration::zero()));
  EXPECT_TRUE(simulation.Run(minutes(5), hours(1)));
  EXPECT_TRUE(simulation.Run(minutes(60), hours(1), hours(1)));
}

TEST(ScheduleClock, AClockThatFlapsIsNeverFollowed) {
  Simulation simulation;
  EXPECT_TRUE(simulation.Run(minutes(1), Duration::zero()));
  for (int i = 0; i < 50; ++i) {
    EXPECT_TRUE(simulation.Run(minutes(1), i % 2 ? hours(1) : -hours(1)));
  }
}

TEST(ScheduleClock, DriftIsFollowed) {
  Simulation simulation;
  std::mt19937 rng(1);
  Duration drift{};
  for (int i = 0; i < 500; ++i) {
    drift += milliseconds(static_cast<int>(rng() % 1000));
    EXPECT_TRUE(simulation.Run(seconds(1), drift, drift));
  }
}

}  // namespace
}  // namespace mobi
