// The controller's inner loop: holds the bits that tokens use at the target by trimming the price.
// The checkpoint's table gives the price for calibration text; served text differs, and so do
// prompts and what the model writes after them. For each regime this loop learns by how much; what
// noise took it pays back within a few looks, with whichever tokens come next. A pure function of
// counters, so tests need no engine.
#ifndef MOBI_SERVER_BITS_TRACKER_H_
#define MOBI_SERVER_BITS_TRACKER_H_

#include <chrono>
#include <optional>

#include "engine/base/clock.h"
#include "engine/engine.h"

namespace mobi {

struct BitsTrackerOptions {
  // Measurements that a learned trim averages over; the first ones count more. A measurement is a
  // token, or a step whose decodes share levels: there tokens average out.
  double token_memory = 128;
  double step_memory = 16;
  // The most that one look may move it: keeps the loop stable where the table's slope is wrong by
  // up to a factor of four.
  double most_per_look = 0.3;
  // The trim may be worth so many bits, no more: the anti-windup limit. Served text that is further
  // from calibration text than this is saturation.
  float max_shift_bits = 1.5f;
  // Bits above or below the target are a debt, forgotten over `debt_memory` and repaid over
  // `repayment`, or over so many looks where they are rare, by at most so many bits.
  Duration debt_memory = std::chrono::seconds(1);
  Duration repayment = std::chrono::milliseconds(100);
  double repayment_looks = 4;
  float max_repayment_bits = 0.5f;
};

struct LearnedTrim {
  double trim = 0;
  bool saturated = false;  // at its limit
  double seen = 0;         // measurements, up to the memory
  BitsCounters from;
};

// Prompts and decodes that choose for themselves have one in common, since users see their average.
struct BitsDebt {
  double bits = 0;          // times measurements above the target
  double rate = 0;          // measurements per second
  double look_seconds = 0;  // between looks that had any
  std::optional<TimePoint> measured = std::nullopt;
};

struct BitsTrackerState {
  PerRegime<float> trim;  // what the engine is to use: learned, and the repayment
  bool saturated = false;
  // Inner state.
  PerRegime<LearnedTrim> learned;
  BitsDebt token_debt;
  BitsDebt step_debt;
  std::optional<TimePoint> updated = std::nullopt;
};

// `nats_per_bit`: fall of log(price) for one more bit at the target, > 0. Call at any interval.
BitsTrackerState TrackBits(const BitsTrackerOptions& options, const PerRegime<float>& nats_per_bit,
                           const PerRegime<BitsCounters>& counters, TimePoint now,
                           BitsTrackerState state);

}  // namespace mobi

#endif  // MOBI_SERVER_BITS_TRACKER_H_
