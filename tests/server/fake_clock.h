// A clock that tests move.
#ifndef MOBI_TESTS_SERVER_FAKE_CLOCK_H_
#define MOBI_TESTS_SERVER_FAKE_CLOCK_H_

#include "engine/base/clock.h"

namespace mobi {

class FakeClock final : public Clock {
 public:
  TimePoint Now() const override { return now_; }
  std::chrono::system_clock::time_point WallNow() const override { return wall_; }
  void Advance(Duration duration) {
    now_ += duration;
    wall_ += std::chrono::duration_cast<std::chrono::system_clock::duration>(duration);
  }

 private:
  TimePoint now_{std::chrono::hours(100)};
  std::chrono::system_clock::time_point wall_{std::chrono::hours(24 * 365 * 50)};
};

}  // namespace mobi

#endif  // MOBI_TESTS_SERVER_FAKE_CLOCK_H_
