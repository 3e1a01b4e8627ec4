// An operator's precision policy as data: windows of bits, priority classes, latency objectives,
// load signals. Control plane only; the engine never sees it. Immutable once built and shared by
// pointer, so a reader keeps the version it started with.
#ifndef MOBI_SERVER_POLICY_H_
#define MOBI_SERVER_POLICY_H_

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/base/clock.h"
#include "server/schedule.h"

namespace mobi {

inline constexpr float kLowestBits = 2.0f;
inline constexpr float kHighestBits = 8.0f;
// Below this quality falls off a cliff, so a window goes there only when it is said explicitly.
inline constexpr float kQualityCliffBits = 3.0f;
inline constexpr char kDefaultPriorityClass[] = "standard";

// Who waits first and who keeps how many bits. A class's floor holds in every window, above the
// ceiling too.
struct PriorityClass {
  std::string name;
  int priority = 0;  // higher goes first
  float floor_bits = kLowestBits;
};

// 95th percentiles that the operator promises; absent ones are not promised.
struct LatencyObjectives {
  std::optional<double> ttft_p95_ms;
  std::optional<double> itl_p95_ms;
};

// What the target may be while the window lasts; a floor that equals the ceiling fixes it.
struct PolicyWindow {
  std::string name;
  std::optional<Schedule> schedule = std::nullopt;  // none: always open
  float floor_bits = kQualityCliffBits;
  float ceiling_bits = kHighestBits;
  bool allow_below_3_bits = false;
};

enum class SignalKind {
  kQueueDepth,          // requests waiting
  kQueuedPromptTokens,  // prompt tokens waiting
  kQueueWait,           // ms that a request which came now would wait, as foretold
  kKvUsage,             // KV blocks in use, 1 is all
  kTtftP95,             // ms
  kItlP95,              // ms
  kPromql,              // whatever the query gives
};

// A measure of load. Its pressure is value / reference: 1 is as much as should be.
struct PolicySignal {
  SignalKind kind = SignalKind::kQueueDepth;
  std::string name;  // label of metrics
  double reference = 1;
  // Of kPromql.
  std::string query = "";
  Duration timeout = std::chrono::milliseconds(500);
  Duration max_age = std::chrono::seconds(30);  // an older answer is none
  double default_pressure = 0;                  // while there is no answer
};

struct Policy {
  std::string model_class = "default";  // what the operator calls the models that this is for
  LatencyObjectives slo;
  std::vector<PriorityClass> classes;     // highest priority first; has kDefaultPriorityClass
  std::vector<PolicyWindow> windows;      // first match wins; the last one always matches
  std::vector<PolicySignal> signals;      // an objective without a signal of its own is one too
  float max_request_bits = kHighestBits;  // a request may not ask for a higher min_bits

  const PriorityClass* FindClass(const std::string& name) const;
  // `signals` and those that follow from the objectives.
  std::vector<PolicySignal> AllSignals() const;
};

// What a signal without a reference of its own is held against: its objective. Foretold waits are
// held against a third of the time promised for the first token: the prompt and the time that fewer
// bits need to shorten a queue must fit too, so that bits come down before a promise is broken.
std::optional<double> ReferenceOf(SignalKind kind, const LatencyObjectives& slo);

// "queue_depth" and so on, as in policy files.
const char* SignalKindName(SignalKind kind);

// Classes premium and standard, one window fixed at `bits`, below 3 too.
Policy FixedPolicy(float bits);

// INVALID_ARGUMENT "path: reason", path as in windows[0].floor_bits; FixedPolicy's are valid for
// bits in [2, 8].
absl::Status CheckPolicy(const Policy& policy);

}  // namespace mobi

#endif  // MOBI_SERVER_POLICY_H_
