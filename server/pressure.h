// The controller's outer loop: from load to target bits. Pressure is the largest of the signals'
// value / reference. As it rises the target comes down from the window's ceiling to its floor, at
// once and in proportion; a slow integral then finds the bits at which pressure rests below 1. Back
// up it goes later and slower. Pure functions of readings and time, so simulations need no server.
// Source: PI control with clamped integral (Astrom and Murray, Feedback Systems, chapter 11).
#ifndef MOBI_SERVER_PRESSURE_H_
#define MOBI_SERVER_PRESSURE_H_

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "engine/base/clock.h"
#include "server/pressure_surface.h"

namespace mobi {

// "Relief" is how far the target is below the ceiling, as a part of the way to the floor.
struct PressureOptions {
  double max_pressure = 4;  // a signal counts for no more
  Duration smoothing = std::chrono::milliseconds(50);
  double setpoint = 0.7;  // the pressure to rest at: below 1, so that there is room for noise
  // Relief at once per unit of pressure above the setpoint.
  double proportional = 0.5;
  // Relief per second and unit; above a pressure of 1 there is a hurry. Within the hysteresis
  // around the setpoint it rests.
  double integral = 0.05;
  double integral_below_setpoint = 0.1;
  double integral_above_one = 0.3;
  double hysteresis = 0.1;
  // The target swings when it turns by more than `swing` relief within `swing_time` of turning
  // before. Every time the proportional gain shrinks by the factor; quiet restores it. So a plant
  // that answers faster than this loop sees it does not drive it into a limit cycle.
  double swing = 0.1;
  Duration swing_time = std::chrono::seconds(5);
  double swing_factor = 0.7;
  double least_gain = 0.1;
  Duration gain_recovery = std::chrono::seconds(60);
  // Bits per second that the target may move, and how long it stays down at least.
  double max_fall = 40;
  double max_rise = 1;
  Duration dwell = std::chrono::seconds(1);
  // Changes smaller than this are not worth telling the engine.
  float min_change = 0.05f;
  // Fewer bits must buy this part of the step's latency, or they are not given up; twice as much
  // to begin giving them up.
  double least_gain_in_latency = 0.005;
  Duration tokens_smoothing = std::chrono::seconds(2);
};

struct SignalReading {
  std::string name;
  double value = 0;
  double reference = 1;
  bool stale = false;           // there is no value, and so
  double default_pressure = 0;  // this is assumed
};

struct PressureInput {
  float floor_bits = 0;
  float ceiling_bits = 0;
  absl::Span<const SignalReading> readings;
  const StepSurface* surface = nullptr;  // none: fewer bits are taken to be faster
  double step_tokens = 0;                // tokens in a step now
};

struct SignalPressure {
  std::string name;
  double value = 0;
  double reference = 1;
  double pressure = 0;  // smoothed
  bool stale = false;
};

struct PressureState {
  std::optional<TimePoint> updated = std::nullopt;
  std::vector<SignalPressure> signals = {};
  double pressure = 0;    // the largest
  float target_bits = 0;  // in [floor, ceiling]
  // Bits that pressure asked for and the surface kept.
  float kept_bits = 0;

  // Inner state.
  double integral = 0;    // relief, [0, 1]
  double gain = 1;        // part of the proportional gain in use
  float moving_bits = 0;  // target before min_change
  TimePoint last_fall{};
  bool rising = false;  // of relief, as turns are counted
  double extreme = 0;   // relief at its farthest since the last turn
  std::optional<TimePoint> turned = std::nullopt;
  double step_tokens = 0;  // smoothed
};

// Call at any interval; what is above one second counts as one. A signal that was not there at the
// last call starts at its value.
PressureState UpdatePressure(const PressureOptions& options, const PressureInput& input,
                             TimePoint now, PressureState state);

}  // namespace mobi

#endif  // MOBI_SERVER_PRESSURE_H_
