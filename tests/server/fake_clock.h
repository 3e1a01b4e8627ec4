// A clock that one thread of a test moves and any thread reads.
#ifndef MOBI_TESTS_SERVER_FAKE_CLOCK_H_
#define MOBI_TESTS_SERVER_FAKE_CLOCK_H_

#include <atomic>

#include "engine/base/clock.h"
#include "server/schedule_clock.h"

namespace mobi {

class FakeClock final : public Clock {
 public:
  TimePoint Now() const override { return now_; }
  WallTime WallNow() const override { return wall_; }
  void Advance(Duration duration) {
    now_ = now_.load() + duration;
    SetWallForward(duration);
  }
  // Somebody sets the system's clock; time goes on as before.
  void SetWallForward(Duration duration) {
    wall_ = wall_.load() + std::chrono::duration_cast<WallTime::duration>(duration);
  }

 private:
  std::atomic<TimePoint> now_{TimePoint(std::chrono::hours(100))};
  std::atomic<WallTime> wall_{WallTime(std::chrono::hours(24 * 365 * 50))};
};

}  // namespace mobi

#endif  // MOBI_TESTS_SERVER_FAKE_CLOCK_H_
