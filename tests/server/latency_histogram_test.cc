#include "server/latency_histogram.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace mobi {
namespace {

Duration Seconds(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

TEST(LatencyHistogram, EmptyIsZero) {
  EXPECT_EQ(LatencyHistogram().counts().total(), 0u);
  EXPECT_EQ(LatencyHistogram().counts().QuantileSeconds(0.95), 0);
}

TEST(LatencyHistogram, BoundsBelongToTheirBucket) {
  LatencyHistogram histogram;
  histogram.Observe(Seconds(0.001));
  histogram.Observe(Seconds(0.0010001));
  histogram.Observe(Seconds(100000));
  const LatencyCounts counts = histogram.counts();
  EXPECT_EQ(counts.buckets[0], 1u);
  EXPECT_EQ(counts.buckets[1], 1u);
  EXPECT_EQ(counts.buckets.back(), 1u);
  EXPECT_NEAR(counts.sum_seconds, 100000.0020001, 1e-6);
  EXPECT_EQ(counts.QuantileSeconds(1), kLatencyBounds.back());
}

// The quantile lies in the bucket of the true one.
TEST(LatencyHistogram, QuantilesAreWithinABucket) {
  std::mt19937 random(2);
  for (int round = 0; round < 100; ++round) {
    LatencyHistogram histogram;
    std::lognormal_distribution<double> latency(-3, 1 + round % 3);
    std::vector<double> values;
    for (int i = 0; i < 500; ++i) {
      values.push_back(std::min(latency(random), 600.0));
      histogram.Observe(Seconds(values.back()));
    }
    std::sort(values.begin(), values.end());
    for (const double q : {0.1, 0.5, 0.95, 0.99}) {
      const double truth = values[static_cast<size_t>(std::ceil(q * 500)) - 1];
      const auto bound = std::lower_bound(kLatencyBounds.begin(), kLatencyBounds.end(), truth);
      const double low = bound == kLatencyBounds.begin() ? 0 : *(bound - 1);
      const double estimate = histogram.counts().QuantileSeconds(q);
      EXPECT_GE(estimate, low - 1e-9);
      EXPECT_LE(estimate, *bound + 1e-9);
    }
  }
}

TEST(LatencyHistogram, SinceIsADifference) {
  LatencyHistogram histogram;
  histogram.Observe(Seconds(0.5));
  const LatencyCounts before = histogram.counts();
  histogram.Observe(Seconds(0.01));
  const LatencyCounts after = histogram.counts().Since(before);
  EXPECT_EQ(after.total(), 1u);
  EXPECT_LE(after.QuantileSeconds(0.99), 0.01);
}

}  // namespace
}  // namespace mobi
