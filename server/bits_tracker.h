// The controller's inner loop: holds the bits that tokens use at the target by trimming the price.
// The checkpoint's table gives the price for calibration text; served text differs, and this loop
// learns by how much, and pays back within the second what noise took. A pure function of counters,
// so tests need no engine. One loop for tokens that choose for themselves, one for decodes that
// share a level.
#ifndef MOBI_SERVER_BITS_TRACKER_H_
#define MOBI_SERVER_BITS_TRACKER_H_

#include <chrono>
#include <cstdint>
#include <optional>

#include "engine/base/clock.h"

namespace mobi {

struct BitsTrackerOptions {
  // Measurements that the learned trim averages over; the first ones count more.
  double memory = 128;
  // The most that one look may move it: keeps the loop stable where the table's slope is wrong by
  // up to a factor of four.
  double most_per_look = 0.3;
  // The trim may be worth so many bits, no more: the anti-windup limit. Served text that is further
  // from calibration text than this is saturation.
  float max_shift_bits = 1.5f;
  // Bits above or below the target are a debt, forgotten over `debt_memory` and repaid over
  // `repayment`, or over so many looks where they are rare, by at most so many bits.
  Duration debt_memory = std::chrono::seconds(1);
  Duration repayment = std::chrono::milliseconds(300);
  double repayment_looks = 4;
  float max_repayment_bits = 0.5f;
};

// Counters of the engine that only grow: sums over `count` measurements of the bits that they used,
// and of the target and the trim that they were asked for.
struct BitsCounters {
  double bits_sum = 0;
  double target_sum = 0;
  double trim_sum = 0;
  uint64_t count = 0;
};

struct BitsTrackerState {
  float trim = 0;          // what the engine is to use: learned, and the repayment
  bool saturated = false;  // the learned part is at its limit
  // Inner state.
  double learned = 0;
  double seen = 0;          // measurements, up to options.memory
  double debt = 0;          // bits times measurements above the target
  double rate = 0;          // measurements per second
  double look_seconds = 0;  // between looks that had any
  BitsCounters from;
  std::optional<TimePoint> updated = std::nullopt;
  std::optional<TimePoint> measured = std::nullopt;
};

// `nats_per_bit`: fall of log(price) for one more bit at the target, > 0. Call at any interval.
BitsTrackerState TrackBits(const BitsTrackerOptions& options, float nats_per_bit,
                           const BitsCounters& counters, TimePoint now, BitsTrackerState state);

}  // namespace mobi

#endif  // MOBI_SERVER_BITS_TRACKER_H_
