#include "server/bits_tracker.h"

#include <algorithm>

#include "server/policy.h"

namespace mobi {

BitsTrackerState TrackBits(const BitsTrackerOptions& options, float target_bits, float nats_per_bit,
                           const BitsCounters& counters, BitsTrackerState state) {
  if (target_bits != state.target_bits || counters.steps < state.from.steps) {
    // What the text taught stays; what was measured at another target goes.
    state.target_bits = target_bits;
    state.settling = true;
    state.from = counters;
    return state;
  }
  if (state.settling) {
    if (counters.steps > state.from.steps) {
      state.settling = false;
      state.from = counters;
    }
    return state;
  }
  const uint64_t count = counters.count - state.from.count;
  if (count < static_cast<uint64_t>(options.min_count)) return state;
  const bool at_edge = target_bits <= kLowestBits + options.edge_bits ||
                       target_bits >= kHighestBits - options.edge_bits;
  state.saturated = false;
  if (!at_edge) {
    const double measured = (counters.bits_sum - state.from.bits_sum) / static_cast<double>(count);
    const double weight = std::min(1.0, static_cast<double>(count) / options.full_count);
    const double step = options.gain * weight * (measured - target_bits) * nats_per_bit;
    const float wanted = state.trim + static_cast<float>(step);
    state.trim = std::clamp(wanted, -options.max_trim, options.max_trim);
    state.saturated = wanted != state.trim;
  }
  state.settling = true;
  state.from = counters;
  return state;
}

}  // namespace mobi
