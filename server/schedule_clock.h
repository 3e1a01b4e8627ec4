// The wall clock as schedules should see it: runs on the monotonic clock and takes over the
// system's time only when that is close, or has been different for long enough to be meant. A clock
// that is set wrong for a moment opens and closes no window. A pure function.
#ifndef MOBI_SERVER_SCHEDULE_CLOCK_H_
#define MOBI_SERVER_SCHEDULE_CLOCK_H_

#include <chrono>
#include <optional>

#include "engine/base/clock.h"

namespace mobi {

using WallTime = std::chrono::system_clock::time_point;

struct ScheduleClockOptions {
  // A difference up to this is drift, and followed at once; a larger one is a jump.
  Duration tolerance = std::chrono::seconds(2);
  // A jump that lasts so long is followed (a corrected clock, a machine that slept).
  Duration patience = std::chrono::minutes(5);
};

struct ScheduleClockState {
  std::optional<Duration> offset;                 // wall minus monotonic
  std::optional<Duration> jumped = std::nullopt;  // what the system says it is now
  TimePoint jumped_since{};
};

// Call now and then; the time to schedule by is ScheduleNow(state, monotonic).
ScheduleClockState FollowWallClock(const ScheduleClockOptions& options, TimePoint monotonic,
                                   WallTime wall, ScheduleClockState state);
WallTime ScheduleNow(const ScheduleClockState& state, TimePoint monotonic);

}  // namespace mobi

#endif  // MOBI_SERVER_SCHEDULE_CLOCK_H_
