#include "server/policy.h"

#include <algorithm>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr size_t kMaxClasses = 16;
constexpr size_t kMaxWindows = 64;
constexpr size_t kMaxSignals = 16;
constexpr size_t kMaxQueryBytes = 4096;
constexpr double kMaxObjectiveMs = 3600e3;
constexpr double kMaxReference = 1e12;
constexpr double kMaxDefaultPressure = 4;

absl::Status Problem(absl::string_view path, absl::string_view reason) {
  return absl::InvalidArgumentError(absl::StrFormat("%s: %s", path, reason));
}

absl::Status CheckRange(const std::string& path, double value, double low, double high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return Problem(path, absl::StrFormat("%g is out of range [%g, %g]", value, low, high));
}

absl::Status CheckPositive(const std::string& path, double value, double high) {
  if (value > 0 && value <= high) return absl::OkStatus();
  return Problem(path, absl::StrFormat("%g is out of range (0, %g]", value, high));
}

absl::Status CheckDuration(const std::string& path, Duration value, Duration low, Duration high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return Problem(path, absl::StrFormat("%g s is out of range [%g s, %g s]", ToSeconds(value),
                                       ToSeconds(low), ToSeconds(high)));
}

absl::Status CheckCount(const std::string& path, size_t count, size_t least, size_t most) {
  if (count >= least && count <= most) return absl::OkStatus();
  return Problem(path, absl::StrFormat("has %d entries, needs %d to %d", count, least, most));
}

// Names are labels of metrics and words of the API.
absl::Status CheckName(const std::string& path, const std::string& name,
                       std::set<std::string>& names) {
  const bool plain = !name.empty() && name.size() <= 64 && absl::ascii_isalnum(name[0]) &&
                     std::all_of(name.begin(), name.end(), [](char c) {
                       return absl::ascii_isalnum(c) || c == '_' || c == '-' || c == '.';
                     });
  if (!plain) {
    return Problem(path,
                   "a name is 1 to 64 letters, digits, '-', '_' and '.', letter or digit first");
  }
  if (names.insert(name).second) return absl::OkStatus();
  return Problem(path, absl::StrFormat("the name %s is taken", name));
}

absl::Status CheckClasses(const Policy& policy) {
  MOBI_RETURN_IF_ERROR(CheckCount("classes", policy.classes.size(), 1, kMaxClasses));
  std::set<std::string> names;
  for (const PriorityClass& priority_class : policy.classes) {
    const std::string path = "classes." + priority_class.name;
    MOBI_RETURN_IF_ERROR(CheckName(path, priority_class.name, names));
    MOBI_RETURN_IF_ERROR(
        CheckRange(path + ".floor_bits", priority_class.floor_bits, kLowestBits, kHighestBits));
  }
  if (policy.FindClass(kDefaultPriorityClass) != nullptr) return absl::OkStatus();
  return Problem("classes",
                 absl::StrFormat("needs the class %s, which requests that name none are in",
                                 kDefaultPriorityClass));
}

absl::Status CheckWindow(const std::string& path, const PolicyWindow& window, bool last) {
  MOBI_RETURN_IF_ERROR(
      CheckRange(path + ".floor_bits", window.floor_bits, kLowestBits, kHighestBits));
  MOBI_RETURN_IF_ERROR(
      CheckRange(path + ".ceiling_bits", window.ceiling_bits, kLowestBits, kHighestBits));
  if (window.floor_bits > window.ceiling_bits) {
    return Problem(path + ".floor_bits", absl::StrFormat("%g is above ceiling_bits, which is %g",
                                                         window.floor_bits, window.ceiling_bits));
  }
  if (window.floor_bits < kQualityCliffBits && !window.allow_below_3_bits) {
    return Problem(path + ".floor_bits",
                   absl::StrFormat("%g is below %g, where quality falls off a cliff; say "
                                   "allow_below_3_bits: true if it is meant",
                                   window.floor_bits, kQualityCliffBits));
  }
  if (last && window.schedule) {
    return Problem(path + ".cron",
                   "the last window must have no schedule, so that one always matches");
  }
  if (!last && !window.schedule) {
    return Problem(path,
                   "has no schedule, so the windows after it never match; it must be the last");
  }
  if (!window.schedule) return absl::OkStatus();
  return CheckDuration(path + ".duration", absl::ToChronoNanoseconds(window.schedule->duration()),
                       absl::ToChronoNanoseconds(Schedule::kMinDuration),
                       absl::ToChronoNanoseconds(Schedule::kMaxDuration));
}

absl::Status CheckWindows(const Policy& policy) {
  MOBI_RETURN_IF_ERROR(CheckCount("windows", policy.windows.size(), 1, kMaxWindows));
  const bool no_signals = policy.AllSignals().empty();
  std::set<std::string> names;
  for (size_t i = 0; i < policy.windows.size(); ++i) {
    const PolicyWindow& window = policy.windows[i];
    const std::string path = absl::StrFormat("windows[%d]", i);
    MOBI_RETURN_IF_ERROR(CheckName(path + ".name", window.name, names));
    MOBI_RETURN_IF_ERROR(CheckWindow(path, window, i + 1 == policy.windows.size()));
    if (no_signals && window.floor_bits < window.ceiling_bits) {
      return Problem(path + ".floor_bits",
                     "is below ceiling_bits, but there are no signals that would move the bits");
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPromql(const std::string& path, const PolicySignal& signal) {
  if (signal.query.empty() || signal.query.size() > kMaxQueryBytes) {
    return Problem(path + ".query", absl::StrFormat("has %d bytes, needs 1 to %d",
                                                    signal.query.size(), kMaxQueryBytes));
  }
  MOBI_RETURN_IF_ERROR(CheckDuration(path + ".timeout", signal.timeout,
                                     std::chrono::milliseconds(10), std::chrono::seconds(10)));
  MOBI_RETURN_IF_ERROR(CheckDuration(path + ".max_age", signal.max_age, std::chrono::seconds(1),
                                     std::chrono::hours(1)));
  if (signal.max_age < signal.timeout) {
    return Problem(path + ".max_age", "is shorter than timeout");
  }
  return CheckRange(path + ".default_pressure", signal.default_pressure, 0, kMaxDefaultPressure);
}

absl::Status CheckSignals(const Policy& policy) {
  MOBI_RETURN_IF_ERROR(CheckCount("signals", policy.signals.size(), 0, kMaxSignals));
  std::set<std::string> names;
  for (size_t i = 0; i < policy.signals.size(); ++i) {
    const PolicySignal& signal = policy.signals[i];
    const std::string path = absl::StrFormat("signals[%d]", i);
    MOBI_RETURN_IF_ERROR(CheckName(path + ".name", signal.name, names));
    const double most = signal.kind == SignalKind::kKvUsage ? 1 : kMaxReference;
    MOBI_RETURN_IF_ERROR(CheckPositive(path + ".reference", signal.reference, most));
    if (signal.kind == SignalKind::kPromql) MOBI_RETURN_IF_ERROR(CheckPromql(path, signal));
  }
  return absl::OkStatus();
}

}  // namespace

const PriorityClass* Policy::FindClass(const std::string& name) const {
  for (const PriorityClass& candidate : classes) {
    if (candidate.name == name) return &candidate;
  }
  return nullptr;
}

std::vector<PolicySignal> Policy::AllSignals() const {
  std::vector<PolicySignal> all = signals;
  for (const SignalKind kind :
       {SignalKind::kQueueWait, SignalKind::kTtftP95, SignalKind::kItlP95}) {
    const std::optional<double> reference = ReferenceOf(kind, slo);
    const std::string name = SignalKindName(kind);
    const bool listed = std::any_of(
        signals.begin(), signals.end(),
        [&](const PolicySignal& signal) { return signal.kind == kind || signal.name == name; });
    if (!listed && reference) all.push_back({.kind = kind, .name = name, .reference = *reference});
  }
  return all;
}

std::optional<double> ReferenceOf(SignalKind kind, const LatencyObjectives& slo) {
  constexpr double kPartForTheQueue = 1.0 / 3;
  if (kind == SignalKind::kTtftP95) return slo.ttft_p95_ms;
  if (kind == SignalKind::kItlP95) return slo.itl_p95_ms;
  if (kind == SignalKind::kQueueWait && slo.ttft_p95_ms) return kPartForTheQueue * *slo.ttft_p95_ms;
  return std::nullopt;
}

const char* SignalKindName(SignalKind kind) {
  switch (kind) {
    case SignalKind::kQueueDepth:
      return "queue_depth";
    case SignalKind::kQueuedPromptTokens:
      return "queued_prompt_tokens";
    case SignalKind::kQueueWait:
      return "queue_wait";
    case SignalKind::kKvUsage:
      return "kv_usage";
    case SignalKind::kTtftP95:
      return "ttft_p95";
    case SignalKind::kItlP95:
      return "itl_p95";
    case SignalKind::kPromql:
      return "promql";
  }
  return "";
}

Policy FixedPolicy(float bits) {
  Policy policy;
  policy.classes = {{.name = "premium", .priority = 1}, {.name = kDefaultPriorityClass}};
  policy.windows = {{.name = "fixed",
                     .floor_bits = bits,
                     .ceiling_bits = bits,
                     .allow_below_3_bits = bits < kQualityCliffBits}};
  return policy;
}

absl::Status CheckPolicy(const Policy& policy) {
  std::set<std::string> names;
  MOBI_RETURN_IF_ERROR(CheckName("model_class", policy.model_class, names));
  if (policy.slo.ttft_p95_ms) {
    MOBI_RETURN_IF_ERROR(
        CheckPositive("slo.ttft_p95_ms", *policy.slo.ttft_p95_ms, kMaxObjectiveMs));
  }
  if (policy.slo.itl_p95_ms) {
    MOBI_RETURN_IF_ERROR(CheckPositive("slo.itl_p95_ms", *policy.slo.itl_p95_ms, kMaxObjectiveMs));
  }
  MOBI_RETURN_IF_ERROR(CheckClasses(policy));
  MOBI_RETURN_IF_ERROR(CheckSignals(policy));
  MOBI_RETURN_IF_ERROR(CheckWindows(policy));
  return CheckRange("max_request_bits", policy.max_request_bits, kLowestBits, kHighestBits);
}

}  // namespace mobi
