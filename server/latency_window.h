// Percentiles of the recent past, from snapshots of a histogram that only grows. One thread.
#ifndef MOBI_SERVER_LATENCY_WINDOW_H_
#define MOBI_SERVER_LATENCY_WINDOW_H_

#include <chrono>
#include <cstdint>
#include <deque>
#include <optional>

#include "engine/base/clock.h"
#include "server/latency_histogram.h"

namespace mobi {

struct LatencyWindowOptions {
  Duration spacing = std::chrono::milliseconds(250);  // of snapshots
  Duration longest = std::chrono::minutes(1);
};

class LatencyWindow {
 public:
  explicit LatencyWindow(const LatencyWindowOptions& options = {}) : options_(options) {}

  // `now` never goes back.
  void Add(TimePoint now, const LatencyCounts& counts);

  // Over the last `span`, as far as snapshots go; nothing without observations.
  std::optional<double> QuantileSeconds(double q, Duration span) const;
  // Over the shortest time in [least, most] with `enough` observations, or over `most`: as fresh as
  // the traffic allows.
  std::optional<double> FreshQuantileSeconds(double q, uint64_t enough, Duration least,
                                             Duration most) const;

 private:
  struct Snapshot {
    TimePoint time;
    LatencyCounts counts;
  };

  const LatencyWindowOptions options_;
  std::deque<Snapshot> snapshots_;
  Snapshot latest_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_LATENCY_WINDOW_H_
