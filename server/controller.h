// The control plane's loop: policy and override give a target, the inner loop holds it, and the
// status says what came of it. Reads the engine's stats, sets its precision target, touches no
// tensor. Tick runs on one thread (a PeriodicTask); everything else is thread-safe.
#ifndef MOBI_SERVER_CONTROLLER_H_
#define MOBI_SERVER_CONTROLLER_H_

#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/base/clock.h"
#include "engine/base/mutex.h"
#include "engine/checkpoint.h"
#include "engine/engine.h"
#include "server/bits_tracker.h"
#include "server/latency_histogram.h"
#include "server/policy.h"
#include "server/policy_windows.h"
#include "server/pressure.h"
#include "server/pressure_signals.h"
#include "server/pressure_surface.h"
#include "server/promql_poller.h"
#include "server/schedule_clock.h"

namespace mobi {

enum class ControlMode { kFixed, kPolicy, kOverride };

struct ControllerOptions {
  BitsTrackerOptions tracker;
  ScheduleClockOptions schedule_clock;
  PressureOptions pressure;
  SignalReaderOptions signals;
  std::optional<StepSurface> surface;  // of this machine and model, where it was measured
  Duration interval = std::chrono::milliseconds(20);  // of Tick
  Duration averaging = std::chrono::seconds(1);       // of the status
  Duration max_override = std::chrono::hours(24);
  float below_floor_margin = 0.05f;  // bits under the floor that do not count as below it
};

// A policy and where it came from.
struct LoadedPolicy {
  Policy policy;
  std::string yaml;
  std::string source;  // "flags", "admin" or a path
};

// FixedPolicy(bits), from flags.
LoadedPolicy PolicyFromFlags(float bits);

// A policy in force.
struct PolicyVersion {
  std::shared_ptr<const Policy> policy;
  std::string yaml;
  std::string source;
  uint64_t generation = 0;
  WallTime applied_at{};
};

// How loading the policy file went, over the life of the process.
struct PolicyReloads {
  uint64_t applied = 0;
  uint64_t refused = 0;
  absl::Status last;  // why the last one was refused
  WallTime last_applied{};
};

// Averages are over ControllerOptions::averaging, or over the last such time that had work; the
// deficit of a server without work is 0.
struct ControlStatus {
  WallTime time{};
  bool elastic = false;
  float target_bits = 0;
  float effective_bits = 0;
  float loaded_bits = 0;
  float decode_loaded_bits = 0;  // of steps without prompts
  float price = 0;
  PerRegime<float> log_price_trim = {};
  bool saturated = false;
  PolicyWindow window;
  std::optional<WallTime> window_until;  // when the schedule is looked at again; none: for ever
  uint64_t policy_generation = 0;
  PolicyReloads policy_reloads;
  ControlMode mode = ControlMode::kFixed;
  std::optional<WallTime> override_until;
  float bits_deficit = 0;
  double seconds_below_floor = 0;
  double tokens_per_second = 0;
  double prompt_tokens_per_second = 0;
  double step_seconds = 0;
  double ttft_p95_ms = 0;  // over the last minute; 0 without requests
  double itl_p95_ms = 0;
  double pressure = 0;  // the largest of the signals'
  std::vector<SignalPressure> signals;
  float kept_bits = 0;  // asked for by pressure, kept because fewer bits would not be faster
  std::map<std::string, PromqlCounts> promql;
  EngineStats engine;
};

// The checkpoint's tables of log(price) over bits, empty when it has none.
struct PriceTables {
  std::vector<PricePoint> token;
  std::vector<PricePoint> coherent;
};

// Fall of log(price) for one more bit around `bits`; 1 without a table. Always > 0.
float NatsPerBit(absl::Span<const PricePoint> price_table, float bits);

class Controller {
 public:
  // `prometheus`: answers the policy's promql signals; without it policies must have none.
  Controller(const ControllerOptions& options, LoadedPolicy policy, const Clock& clock,
             std::unique_ptr<PromqlPoller> prometheus = nullptr);

  // The histograms that latency signals are read from; they outlive the controller's last Tick.
  void WatchLatency(const LatencyHistogram& time_to_first_token,
                    const LatencyHistogram& inter_token_latency);

  // `engine` outlives the controller. Sets its target at once. `surface`, if there is one, counts
  // from now on instead of the options'.
  void Attach(Engine* engine, PriceTables prices,
              std::optional<StepSurface> surface = std::nullopt);

  // Reads stats, moves the target.
  void Tick();

  PolicyVersion policy() const;
  // What SetPolicy would say of it, generations aside.
  absl::Status Check(const Policy& policy) const;
  // INVALID_ARGUMENT: the policy is bad; FAILED_PRECONDITION: it needs what this server was not
  // started with; ABORTED: `expected_generation` is not the one in force.
  absl::Status SetPolicy(LoadedPolicy policy, std::optional<uint64_t> expected_generation);
  // Counts a reload of the policy file for metrics: OK, or why it was refused.
  void ReportReload(const absl::Status& status);
  // INVALID_ARGUMENT names the field. Takes effect before the engine's next step.
  absl::Status Override(float target_bits, Duration ttl);
  void ClearOverride();

  ControlStatus status() const;

 private:
  struct Sample {
    TimePoint time;
    EngineStats stats;
  };
  struct ActiveOverride {
    float target_bits;
    TimePoint until;
    WallTime until_wall;
  };

  void PutInForceLocked(LoadedPolicy policy) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  const PolicyWindow& WindowLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Reads load and moves what pressure makes of the window's bits.
  void FollowLoadLocked(TimePoint now, const EngineStats& stats)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Override, else pressure's target in the window.
  void ChooseTargetLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void TrackLocked(TimePoint now, const EngineStats& stats) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ApplyLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void AverageLocked(TimePoint now, const EngineStats& stats) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const ControllerOptions options_;
  const Clock& clock_;
  const std::unique_ptr<PromqlPoller> prometheus_;
  mutable Mutex mutex_;
  Engine* engine_ ABSL_GUARDED_BY(mutex_) = nullptr;
  PriceTables prices_ ABSL_GUARDED_BY(mutex_);
  std::optional<StepSurface> surface_ ABSL_GUARDED_BY(mutex_);
  PolicyVersion policy_ ABSL_GUARDED_BY(mutex_);
  ScheduleClockState schedule_clock_ ABSL_GUARDED_BY(mutex_);
  // Of policy_, good from open_since_ until open_.until.
  std::optional<OpenWindow> open_ ABSL_GUARDED_BY(mutex_);
  absl::Time open_since_ ABSL_GUARDED_BY(mutex_);
  std::optional<ActiveOverride> override_ ABSL_GUARDED_BY(mutex_);
  const LatencyHistogram* time_to_first_token_ ABSL_GUARDED_BY(mutex_) = nullptr;
  const LatencyHistogram* inter_token_latency_ ABSL_GUARDED_BY(mutex_) = nullptr;
  std::vector<PolicySignal> signals_ ABSL_GUARDED_BY(mutex_);  // of policy_
  SignalReader signal_reader_ ABSL_GUARDED_BY(mutex_);
  PressureState pressure_ ABSL_GUARDED_BY(mutex_);
  BitsTrackerState tracker_ ABSL_GUARDED_BY(mutex_);
  std::deque<Sample> samples_ ABSL_GUARDED_BY(mutex_);
  ControlStatus status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mobi

#endif  // MOBI_SERVER_CONTROLLER_H_
