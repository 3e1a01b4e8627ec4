#include "server/bits_tracker.h"

#include <algorithm>
#include <cmath>

#include "server/policy.h"

namespace mobi {
namespace {

void StartSample(const EngineStats& stats, BitsTrackerState& state) {
  state.steps = stats.steps;
  state.bits_sum = stats.tracked_bits_sum;
  state.tokens = stats.tracked_tokens;
}

}  // namespace

BitsTrackerState TrackBits(const BitsTrackerOptions& options, float target_bits, float nats_per_bit,
                           const EngineStats& stats, BitsTrackerState state) {
  if (target_bits != state.target_bits || stats.steps < state.steps) {
    // What the text taught stays; what was measured at another target goes.
    state.target_bits = target_bits;
    state.settling = true;
    StartSample(stats, state);
    return state;
  }
  if (state.settling) {
    if (stats.steps > state.steps) {
      state.settling = false;
      StartSample(stats, state);
    }
    return state;
  }
  const uint64_t tokens = stats.tracked_tokens - state.tokens;
  if (tokens < static_cast<uint64_t>(options.min_tokens)) return state;
  const bool at_edge = target_bits <= kLowestBits + options.edge_bits ||
                       target_bits >= kHighestBits - options.edge_bits;
  if (!at_edge) {
    const double measured = (stats.tracked_bits_sum - state.bits_sum) / static_cast<double>(tokens);
    const double weight = std::min(1.0, static_cast<double>(tokens) / options.full_tokens);
    const double step = options.gain * weight * (measured - target_bits) * nats_per_bit;
    const float wanted = state.trim + static_cast<float>(step);
    state.trim = std::clamp(wanted, -options.max_trim, options.max_trim);
    state.saturated = wanted != state.trim;
  } else {
    state.saturated = false;
  }
  state.settling = true;
  StartSample(stats, state);
  return state;
}

}  // namespace mobi
