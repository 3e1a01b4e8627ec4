#include "server/schedule.h"

#include <algorithm>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

// No clock is set by more than this at once (Samoa skipped a day).
constexpr absl::Duration kMaxShift = absl::Hours(25);

absl::CivilMinute CivilAt(const absl::TimeZone& zone, absl::Time time) {
  return absl::CivilMinute(absl::ToCivilMinute(time, zone));
}

}  // namespace

absl::StatusOr<Schedule> Schedule::Create(absl::string_view cron, absl::Duration duration,
                                          const absl::TimeZone& zone) {
  MOBI_ASSIGN_OR_RETURN(CronExpression expression, CronExpression::Parse(cron));
  return Schedule(expression, cron, duration, zone);
}

TimeSpan Schedule::SpanAt(absl::Time time) const {
  // Most schedules answer from the next two days, which keeps dense ones cheap.
  for (absl::Duration reach = absl::Hours(48);; reach = std::max(4 * reach, kHorizon + kMaxShift)) {
    std::vector<TimeSpan> spans = SpansBetween(time - duration_ - kMaxShift, time + reach);
    TimeSpan found{absl::InfiniteFuture(), absl::InfiniteFuture()};
    for (const TimeSpan& span : spans) {
      if (span.end <= time) continue;
      if (found.start == absl::InfiniteFuture()) found = span;
      if (span.start > found.end) break;
      found.end = std::max(found.end, span.end);
    }
    const bool complete = found.end + kMaxShift < time + reach;
    if (complete || (found.start != absl::InfiniteFuture() && reach >= kHorizon)) return found;
  }
}

std::vector<TimeSpan> Schedule::SpansBetween(absl::Time from, absl::Time to) const {
  std::vector<TimeSpan> spans;
  const absl::CivilMinute last = CivilAt(zone_, to);
  auto start = cron_.FirstNotBefore(CivilAt(zone_, from));
  while (start && *start <= last) {
    AddSpans(*start, spans);
    start = cron_.FirstNotBefore(*start + 1);
  }
  // Civil order is absolute order but for the clock's shifts.
  std::sort(spans.begin(), spans.end(),
            [](const TimeSpan& a, const TimeSpan& b) { return a.start < b.start; });
  return spans;
}

void Schedule::AddSpans(absl::CivilMinute start, std::vector<TimeSpan>& spans) const {
  const absl::TimeZone::TimeInfo info = zone_.At(absl::CivilSecond(start));
  switch (info.kind) {
    case absl::TimeZone::TimeInfo::UNIQUE:
      spans.push_back(SpanFrom(info.pre, start));
      break;
    case absl::TimeZone::TimeInfo::SKIPPED:
      if (!cron_.any_hour()) spans.push_back(SpanFrom(info.trans, start));
      break;
    case absl::TimeZone::TimeInfo::REPEATED:
      spans.push_back(SpanFrom(info.pre, start));
      if (cron_.any_hour()) spans.push_back(SpanFrom(info.post, start));
      break;
  }
}

TimeSpan Schedule::SpanFrom(absl::Time start, absl::CivilMinute civil_start) const {
  const absl::CivilSecond civil_end =
      absl::CivilSecond(civil_start) + absl::ToInt64Seconds(duration_);
  const absl::TimeZone::TimeInfo info = zone_.At(civil_end);
  absl::Time end = info.pre;
  if (info.kind == absl::TimeZone::TimeInfo::SKIPPED) end = info.trans;
  // The second showing, when the first was before the start.
  if (end <= start) end = info.post;
  // Start and end were skipped together: the window moves as a whole.
  if (end <= start) end = start + duration_;
  return {start, end};
}

absl::StatusOr<absl::TimeZone> LoadIanaZone(const std::string& name) {
  const bool plain =
      !name.empty() && name.size() <= 64 && absl::ascii_isalpha(name[0]) &&
      !absl::StrContains(name, "..") && std::all_of(name.begin(), name.end(), [](char c) {
        return absl::ascii_isalnum(c) || c == '/' || c == '_' || c == '-' || c == '+';
      });
  absl::TimeZone zone;
  // What is relative to the machine or no IANA zone would load as well.
  if (!plain || name == "localtime" || absl::StartsWith(name, "posix") ||
      absl::StartsWith(name, "right") || absl::StartsWith(name, "Fixed/") ||
      !absl::LoadTimeZone(name, &zone)) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "\"%s\" is not in the time zone database (an IANA name such as Europe/Berlin)",
        name.substr(0, 64)));
  }
  return zone;
}

}  // namespace mobi
