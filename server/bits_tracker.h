// The controller's inner loop: holds the bits that tokens use at the target by trimming the price.
// The checkpoint's table gives the price for calibration text; served text differs, and this
// integral loop learns by how much. A pure function of counters, so tests need no engine. One loop
// for tokens that choose for themselves, one for decodes that share a level.
#ifndef MOBI_SERVER_BITS_TRACKER_H_
#define MOBI_SERVER_BITS_TRACKER_H_

#include <cstdint>

namespace mobi {

struct BitsTrackerOptions {
  // Part of the error that one correction removes, if the table's slope is right. Below 1 it cannot
  // overshoot; small values average noise over more tokens.
  float gain = 0.5f;
  float max_trim = 3.0f;  // |log price correction|: the anti-windup limit
  // Measurements for a correction of full gain, and the fewest that are looked at.
  int full_count = 64;
  int min_count = 16;
  // Within this of 2 or 8 bits levels do not depend on the price: nothing to correct.
  float edge_bits = 0.01f;
};

// Counters of the engine that only grow.
struct BitsCounters {
  uint64_t steps = 0;
  double bits_sum = 0;  // over `count` measurements
  uint64_t count = 0;
};

struct BitsTrackerState {
  float trim = 0;
  bool saturated = false;  // the correction is at its limit
  // A step that began before the last change of target or trim used the old price; measurements
  // count from the first counters after such a step.
  bool settling = true;
  float target_bits = 0;
  BitsCounters from;
};

// `nats_per_bit`: fall of log(price) for one more bit at the target, > 0. Call at any interval.
BitsTrackerState TrackBits(const BitsTrackerOptions& options, float target_bits, float nats_per_bit,
                           const BitsCounters& counters, BitsTrackerState state);

}  // namespace mobi

#endif  // MOBI_SERVER_BITS_TRACKER_H_
