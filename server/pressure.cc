#include "server/pressure.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace mobi {
namespace {

constexpr double kMaxStepSeconds = 1;

// What is left of an old value after `seconds`.
double Decay(double seconds, Duration time_constant) {
  return std::exp(-seconds / ToSeconds(time_constant));
}

double PressureOf(const PressureOptions& options, const SignalReading& reading) {
  const double pressure =
      reading.stale ? reading.default_pressure : reading.value / reading.reference;
  return pressure > 0 ? std::min(pressure, options.max_pressure) : 0;  // NaN is 0
}

void MeasurePressure(const PressureOptions& options, absl::Span<const SignalReading> readings,
                     double seconds, PressureState& state) {
  const double keep = Decay(seconds, options.smoothing);
  std::vector<SignalPressure> signals;
  state.pressure = 0;
  for (const SignalReading& reading : readings) {
    double pressure = PressureOf(options, reading);
    const auto before =
        std::find_if(state.signals.begin(), state.signals.end(),
                     [&](const SignalPressure& signal) { return signal.name == reading.name; });
    if (before != state.signals.end()) pressure = std::lerp(pressure, before->pressure, keep);
    state.pressure = std::max(state.pressure, pressure);
    signals.push_back({reading.name, reading.value, reading.reference, pressure, reading.stale});
  }
  state.signals = std::move(signals);
}

// Relief that pressure asks for.
double WantedRelief(const PressureOptions& options, double seconds, PressureState& state) {
  const double error = state.pressure - options.setpoint;
  double drift = 0;
  if (error < 0) {
    drift = std::max(error, -1.0) * options.integral_below_setpoint;
  } else if (error > options.hysteresis) {
    const double above_one = std::clamp(state.pressure - 1, 0.0, 1.0);
    drift = std::min(error, 1.0) * options.integral + above_one * options.integral_above_one;
  }
  state.integral = std::clamp(state.integral + seconds * drift, 0.0, 1.0);
  state.gain = std::min(1.0, state.gain + seconds / ToSeconds(options.gain_recovery));
  return std::clamp(state.integral + state.gain * options.proportional * error, 0.0, 1.0);
}

// Raises `wanted` as far as that costs no latency worth having.
float KeepFreeBits(const PressureOptions& options, const PressureInput& input, float wanted,
                   double seconds, PressureState& state) {
  const double keep = state.updated ? Decay(seconds, options.tokens_smoothing) : 0;
  state.step_tokens = std::lerp(input.step_tokens, state.step_tokens, keep);
  if (input.surface == nullptr) {
    state.kept_bits = 0;
    return wanted;
  }
  const double tolerance = options.least_gain_in_latency * (state.kept_bits > 0 ? 2 : 1);
  const float free =
      input.surface->FreeBits(wanted, input.ceiling_bits, state.step_tokens, tolerance);
  state.kept_bits = free - wanted;
  return free;
}

// Dwell and slew.
void Move(const PressureOptions& options, float wanted, TimePoint now, double seconds,
          PressureState& state) {
  float& moving = state.moving_bits;
  if (wanted < moving) {
    moving = std::max(wanted, moving - static_cast<float>(seconds * options.max_fall));
    state.last_fall = now;
  } else if (now - state.last_fall >= options.dwell) {
    moving = std::min(wanted, moving + static_cast<float>(seconds * options.max_rise));
  }
}

void CountTurns(const PressureOptions& options, double relief, TimePoint now,
                PressureState& state) {
  state.extreme = state.rising ? std::max(state.extreme, relief) : std::min(state.extreme, relief);
  if (std::abs(relief - state.extreme) <= options.swing) return;
  const bool soon = state.turned && now - *state.turned < options.swing_time;
  if (soon) state.gain = std::max(options.least_gain, state.gain * options.swing_factor);
  state.turned = now;
  state.rising = !state.rising;
  state.extreme = relief;
}

}  // namespace

PressureState UpdatePressure(const PressureOptions& options, const PressureInput& input,
                             TimePoint now, PressureState state) {
  const double seconds =
      state.updated ? std::clamp(ToSeconds(now - *state.updated), 0.0, kMaxStepSeconds) : 0;
  const float span = input.ceiling_bits - input.floor_bits;
  MeasurePressure(options, input.readings, seconds, state);
  const auto relief = static_cast<float>(WantedRelief(options, seconds, state));
  const float wanted =
      KeepFreeBits(options, input, input.ceiling_bits - relief * span, seconds, state);
  if (!state.updated) state.moving_bits = state.target_bits = wanted;
  state.updated = now;
  Move(options, wanted, now, seconds, state);
  float& moving = state.moving_bits;
  moving = std::clamp(moving, input.floor_bits, input.ceiling_bits);
  if (span > 0) CountTurns(options, (input.ceiling_bits - moving) / span, now, state);

  const bool at_end = moving == input.floor_bits || moving == input.ceiling_bits;
  if (at_end || std::abs(moving - state.target_bits) >= options.min_change) {
    state.target_bits = moving;
  }
  state.target_bits = std::clamp(state.target_bits, input.floor_bits, input.ceiling_bits);
  return state;
}

}  // namespace mobi
