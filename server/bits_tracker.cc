#include "server/bits_tracker.h"

#include <algorithm>
#include <cmath>

namespace mobi {
namespace {

// Of measurements per second and of the time between looks.
constexpr double kRateMemorySeconds = 1;

double Decay(double seconds, double time_constant) { return std::exp(-seconds / time_constant); }

// How often there is news, in measurements and in looks.
void MeasureRate(TimePoint now, double count, BitsTrackerState& state) {
  const double seconds = state.measured ? ToSeconds(now - *state.measured) : 0;
  state.measured = now;
  if (seconds <= 0 || seconds > kRateMemorySeconds) return;  // the first, or after a gap
  const double keep = state.rate > 0 ? Decay(seconds, kRateMemorySeconds) : 0;
  state.rate = std::lerp(count / seconds, state.rate, keep);
  state.look_seconds = std::lerp(seconds, state.look_seconds, keep);
}

// What the trim would have had to be for the bits that were asked for, if the slope is right. It
// says what trim was used, so news that is late misleads nobody.
void Learn(const BitsTrackerOptions& options, double nats_per_bit, double needed, double count,
           BitsTrackerState& state) {
  state.seen = std::min(state.seen + count, options.memory);
  const double part = std::min(options.most_per_look, count / state.seen);
  const double limit = options.max_shift_bits * nats_per_bit;
  const double wanted = std::lerp(state.learned, needed, part);
  state.learned = std::clamp(wanted, -limit, limit);
  state.saturated = wanted != state.learned;
}

double RepaymentBits(const BitsTrackerOptions& options, const BitsTrackerState& state) {
  const double seconds =
      std::max(ToSeconds(options.repayment), options.repayment_looks * state.look_seconds);
  const double measurements = std::max(1.0, state.rate * seconds);
  return std::clamp(state.debt / measurements, -double{options.max_repayment_bits},
                    double{options.max_repayment_bits});
}

}  // namespace

BitsTrackerState TrackBits(const BitsTrackerOptions& options, float nats_per_bit,
                           const BitsCounters& counters, TimePoint now, BitsTrackerState state) {
  if (counters.count < state.from.count) state.from = BitsCounters();  // a new engine
  if (state.updated) {
    state.debt *= Decay(ToSeconds(now - *state.updated), ToSeconds(options.debt_memory));
  }
  state.updated = now;
  if (counters.count > state.from.count) {
    const auto count = static_cast<double>(counters.count - state.from.count);
    const double excess =
        (counters.bits_sum - state.from.bits_sum) - (counters.target_sum - state.from.target_sum);
    const double used = (counters.trim_sum - state.from.trim_sum) / count;
    state.from = counters;
    MeasureRate(now, count, state);
    Learn(options, nats_per_bit, used + excess / count * nats_per_bit, count, state);
    state.debt += excess;
  }
  state.trim = static_cast<float>(state.learned + RepaymentBits(options, state) * nats_per_bit);
  return state;
}

}  // namespace mobi
