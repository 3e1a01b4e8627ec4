// Counts of durations in fixed buckets, for Prometheus and for the controller's percentiles.
// Observe is lock-free and takes nanoseconds, so the engine's thread may call it. Thread-safe.
#ifndef MOBI_SERVER_LATENCY_HISTOGRAM_H_
#define MOBI_SERVER_LATENCY_HISTOGRAM_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "engine/base/clock.h"

namespace mobi {

// Upper bounds in seconds; the last bucket has none. Those of vLLM's latency metrics, with more of
// them below 100 ms.
inline constexpr std::array<double, 26> kLatencyBounds = {
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.5,   0.75,  1,     1.5,  2.5,  5,    7.5,  10,   20,    40,  80,   160, 640};

struct LatencyCounts {
  std::array<uint64_t, kLatencyBounds.size() + 1> buckets{};  // not cumulative
  double sum_seconds = 0;

  uint64_t total() const;
  // Interpolated within its bucket; the largest bound above it; 0 without observations. q in [0,
  // 1].
  double QuantileSeconds(double q) const;
  LatencyCounts Since(const LatencyCounts& earlier) const;
};

class LatencyHistogram {
 public:
  void Observe(Duration duration);
  // Observations made meanwhile may be in it in part.
  LatencyCounts counts() const;

 private:
  std::array<std::atomic<uint64_t>, kLatencyBounds.size() + 1> buckets_{};
  std::atomic<int64_t> sum_ns_{0};
};

}  // namespace mobi

#endif  // MOBI_SERVER_LATENCY_HISTOGRAM_H_
