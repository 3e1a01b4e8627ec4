#include "server/schedule_clock.h"

namespace mobi {
namespace {

bool Near(Duration a, Duration b, Duration tolerance) {
  return a - b <= tolerance && b - a <= tolerance;
}

}  // namespace

ScheduleClockState FollowWallClock(const ScheduleClockOptions& options, TimePoint monotonic,
                                   WallTime wall, ScheduleClockState state) {
  const Duration offset = wall.time_since_epoch() - monotonic.time_since_epoch();
  if (!state.offset || Near(offset, *state.offset, options.tolerance)) {
    return {.offset = offset};
  }
  if (!state.jumped || !Near(offset, *state.jumped, options.tolerance)) {
    state.jumped_since = monotonic;
  } else if (monotonic - state.jumped_since >= options.patience) {
    return {.offset = offset};
  }
  state.jumped = offset;
  return state;
}

WallTime ScheduleNow(const ScheduleClockState& state, TimePoint monotonic) {
  const Duration since_epoch =
      monotonic.time_since_epoch() + state.offset.value_or(Duration::zero());
  return WallTime(std::chrono::duration_cast<WallTime::duration>(since_epoch));
}

}  // namespace mobi
