// Time as a dependency: everything that measures or waits takes a Clock, so tests run on a fake
// one. Monotonic time for durations; wall time only where a policy speaks of hours of the day.
#ifndef MOBI_ENGINE_BASE_CLOCK_H_
#define MOBI_ENGINE_BASE_CLOCK_H_

#include <chrono>

namespace mobi {

using Duration = std::chrono::nanoseconds;
using TimePoint = std::chrono::steady_clock::time_point;

inline double ToSeconds(Duration duration) {
  return std::chrono::duration<double>(duration).count();
}
inline double ToMillis(Duration duration) { return ToSeconds(duration) * 1e3; }

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual TimePoint Now() const = 0;
  virtual std::chrono::system_clock::time_point WallNow() const = 0;
};

class RealClock final : public Clock {
 public:
  TimePoint Now() const override { return std::chrono::steady_clock::now(); }
  std::chrono::system_clock::time_point WallNow() const override {
    return std::chrono::system_clock::now();
  }
};

}  // namespace mobi

#endif  // MOBI_ENGINE_BASE_CLOCK_H_
