#include "server/policy_windows.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "server/policy_file.h"

namespace mobi {
namespace {

constexpr size_t kMaxRows = 200;

std::string BitsText(const PolicyWindow& window) {
  if (window.floor_bits == window.ceiling_bits) return absl::StrFormat("%g", window.floor_bits);
  return absl::StrFormat("%g to %g", window.floor_bits, window.ceiling_bits);
}

// The zone that most of an operator's thinking is in.
absl::TimeZone TableZone(const Policy& policy) {
  for (const PolicyWindow& window : policy.windows) {
    if (window.schedule) return window.schedule->zone();
  }
  return absl::UTCTimeZone();
}

std::string DescribeClasses(const Policy& policy) {
  std::string text = "classes, highest priority first:\n";
  for (const PriorityClass& priority_class : policy.classes) {
    absl::StrAppendFormat(&text, "  %-20s at least %g bits\n", priority_class.name,
                          priority_class.floor_bits);
  }
  return text;
}

std::string DescribeSignals(const Policy& policy) {
  std::string text = "signals, and where each is under full pressure:\n";
  for (const PolicySignal& signal : policy.AllSignals()) {
    absl::StrAppendFormat(&text, "  %-20s %g", signal.name, signal.reference);
    if (signal.kind == SignalKind::kPromql) {
      absl::StrAppendFormat(&text, " = %s (after %s without an answer: pressure %g)", signal.query,
                            absl::FormatDuration(absl::FromChrono(signal.max_age)),
                            signal.default_pressure);
    }
    absl::StrAppend(&text, "\n");
  }
  return text;
}

}  // namespace

OpenWindow WindowAt(const Policy& policy, absl::Time time) {
  absl::Time until = absl::InfiniteFuture();
  for (size_t i = 0; i + 1 < policy.windows.size(); ++i) {
    const TimeSpan span = policy.windows[i].schedule->SpanAt(time);
    if (span.Contains(time)) return {i, std::min(until, span.end)};
    until = std::min(until, span.start);
  }
  return {policy.windows.size() - 1, until};
}

std::vector<WindowSpan> WindowsBetween(const Policy& policy, absl::Time from, absl::Time to,
                                       size_t max_spans) {
  std::vector<WindowSpan> spans;
  for (absl::Time time = from; time < to;) {
    const OpenWindow open = WindowAt(policy, time);
    const absl::Time end = std::min(open.until, to);
    if (!spans.empty() && spans.back().window == open.window) {
      spans.back().span.end = end;
    } else if (spans.size() == max_spans) {
      break;
    } else {
      spans.push_back({open.window, {time, end}});
    }
    time = end;
  }
  return spans;
}

std::string DescribePolicy(const Policy& policy, absl::Time now) {
  const absl::TimeZone zone = TableZone(policy);
  const absl::Time end = now + absl::Hours(7 * 24);
  std::string text = absl::StrFormat("policy for %s\n", policy.model_class);
  absl::StrAppend(&text, DescribeClasses(policy), DescribeSignals(policy));
  absl::StrAppendFormat(&text, "windows of the coming week, in %s:\n", zone.name());
  absl::StrAppendFormat(&text, "  %-26s %-26s %-10s %-20s %s\n", "from", "to", "length", "window",
                        "bits");
  const std::vector<WindowSpan> spans = WindowsBetween(policy, now, end, kMaxRows);
  for (const auto& [window, span] : spans) {
    const auto time_text = [&](absl::Time time) {
      return absl::FormatTime("%a %Y-%m-%d %H:%M %z", time, zone);
    };
    absl::StrAppendFormat(
        &text, "  %-26s %-26s %-10s %-20s %s\n", time_text(span.start), time_text(span.end),
        absl::FormatDuration(absl::Trunc(span.end - span.start, absl::Minutes(1))),
        policy.windows[window].name, BitsText(policy.windows[window]));
  }
  if (!spans.empty() && spans.back().span.end < end) {
    absl::StrAppendFormat(&text, "  ... the first %d changes only\n", kMaxRows);
  }
  return text;
}

absl::StatusOr<std::string> CheckPolicyFile(const std::string& path, absl::Time now) {
  MOBI_ASSIGN_OR_RETURN(const PolicyText file, ReadPolicyFile(path));
  return absl::StrCat(path, ": valid\n", DescribePolicy(file.policy, now));
}

}  // namespace mobi
