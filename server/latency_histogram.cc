#include "server/latency_histogram.h"

#include <algorithm>

namespace mobi {

uint64_t LatencyCounts::total() const {
  uint64_t total = 0;
  for (uint64_t count : buckets) total += count;
  return total;
}

double LatencyCounts::QuantileSeconds(double q) const {
  const auto rank = q * static_cast<double>(total());
  if (total() == 0) return 0;
  double below = 0;
  for (size_t i = 0; i < kLatencyBounds.size(); ++i) {
    const auto count = static_cast<double>(buckets[i]);
    if (count > 0 && below + count >= rank) {
      const double lower = i == 0 ? 0 : kLatencyBounds[i - 1];
      return lower + (kLatencyBounds[i] - lower) * (rank - below) / count;
    }
    below += count;
  }
  return kLatencyBounds.back();
}

LatencyCounts LatencyCounts::Since(const LatencyCounts& earlier) const {
  LatencyCounts difference;
  for (size_t i = 0; i < buckets.size(); ++i) {
    difference.buckets[i] = buckets[i] - earlier.buckets[i];
  }
  difference.sum_seconds = sum_seconds - earlier.sum_seconds;
  return difference;
}

void LatencyHistogram::Observe(Duration duration) {
  const auto bound =
      std::lower_bound(kLatencyBounds.begin(), kLatencyBounds.end(), ToSeconds(duration));
  buckets_[bound - kLatencyBounds.begin()].fetch_add(1, std::memory_order_relaxed);
  sum_ns_.fetch_add(duration.count(), std::memory_order_relaxed);
}

LatencyCounts LatencyHistogram::counts() const {
  LatencyCounts counts;
  for (size_t i = 0; i < buckets_.size(); ++i) {
    counts.buckets[i] = buckets_[i].load(std::memory_order_relaxed);
  }
  counts.sum_seconds = static_cast<double>(sum_ns_.load(std::memory_order_relaxed)) * 1e-9;
  return counts;
}

}  // namespace mobi
