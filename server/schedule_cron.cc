#include "server/schedule_cron.h"

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/types/span.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

// A leap day and every pair of month and day come within eight years, even over a year such as 2100
// that is no leap year.
constexpr int kSearchDays = 8 * 366 + 1;

constexpr absl::string_view kMonthNames[] = {"jan", "feb", "mar", "apr", "may", "jun",
                                             "jul", "aug", "sep", "oct", "nov", "dec"};
constexpr absl::string_view kWeekdayNames[] = {"sun", "mon", "tue", "wed", "thu", "fri", "sat"};

struct FieldSpec {
  const char* name;
  int low;
  int high;
  absl::Span<const absl::string_view> words;  // of low, low + 1, ...
};

constexpr FieldSpec kFields[] = {{"minute", 0, 59, {}},
                                 {"hour", 0, 23, {}},
                                 {"day of month", 1, 31, {}},
                                 {"month", 1, 12, kMonthNames},
                                 {"day of week", 0, 7, kWeekdayNames}};

// The values that a field allows, as bits, and whether it starts with '*'.
struct FieldValues {
  uint64_t bits = 0;
  bool any = false;
};

absl::Status FieldProblem(const FieldSpec& spec, absl::string_view item, absl::string_view reason) {
  return absl::InvalidArgumentError(absl::StrFormat("%s \"%s\": %s", spec.name, item, reason));
}

absl::StatusOr<int> ParseValue(const FieldSpec& spec, absl::string_view text,
                               absl::string_view item) {
  const std::string lower = absl::AsciiStrToLower(text);
  for (size_t i = 0; i < spec.words.size(); ++i) {
    if (lower == spec.words[i]) return spec.low + static_cast<int>(i);
  }
  int value = 0;
  const bool digits = !text.empty() && text.size() <= 2 &&
                      text.find_first_not_of("0123456789") == absl::string_view::npos;
  if (!digits || !absl::SimpleAtoi(text, &value)) {
    return FieldProblem(spec, item, "must be '*', a number, a range or a list of them");
  }
  if (value < spec.low || value > spec.high) {
    return FieldProblem(spec, item,
                        absl::StrFormat("%d is out of range [%d, %d]", value, spec.low, spec.high));
  }
  return value;
}

absl::Status ParseItem(const FieldSpec& spec, absl::string_view item, FieldValues& values) {
  const std::pair<absl::string_view, absl::string_view> parts =
      absl::StrSplit(item, absl::MaxSplits('/', 1));
  const bool has_step = absl::StrContains(item, '/');
  int low = spec.low, high = spec.high, step = 1;
  if (parts.first == "*") {
    values.any = true;
  } else {
    const std::vector<absl::string_view> ends =
        absl::StrSplit(parts.first, absl::MaxSplits('-', 1));
    MOBI_ASSIGN_OR_RETURN(low, ParseValue(spec, ends[0], item));
    high = low;
    if (ends.size() == 2) {
      MOBI_ASSIGN_OR_RETURN(high, ParseValue(spec, ends[1], item));
    } else if (has_step) {
      return FieldProblem(spec, item, "a step needs '*' or a range before it");
    }
    if (low > high) return FieldProblem(spec, item, "the range runs backwards");
  }
  if (has_step && (!absl::SimpleAtoi(parts.second, &step) || step < 1 || step > spec.high)) {
    return FieldProblem(spec, item, absl::StrFormat("a step is 1 to %d", spec.high));
  }
  for (int value = low; value <= high; value += step) values.bits |= uint64_t{1} << value;
  return absl::OkStatus();
}

absl::StatusOr<FieldValues> ParseField(const FieldSpec& spec, absl::string_view text) {
  FieldValues values;
  for (absl::string_view item : absl::StrSplit(text, ',')) {
    MOBI_RETURN_IF_ERROR(ParseItem(spec, item, values));
  }
  return values;
}

}  // namespace

absl::StatusOr<CronExpression> CronExpression::Parse(absl::string_view text) {
  const std::vector<absl::string_view> fields =
      absl::StrSplit(text, absl::ByAnyChar(" \t"), absl::SkipEmpty());
  if (fields.size() != 5) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "has %d fields, needs 5: minute, hour, day of month, month, day of week", fields.size()));
  }
  std::array<FieldValues, 5> values;
  for (size_t i = 0; i < fields.size(); ++i) {
    MOBI_ASSIGN_OR_RETURN(values[i], ParseField(kFields[i], fields[i]));
  }
  CronExpression cron;
  cron.minutes_ = values[0].bits;
  cron.hours_ = values[1].bits;
  cron.days_ = values[2].bits;
  cron.months_ = values[3].bits;
  cron.weekdays_ = (values[4].bits | values[4].bits >> 7) & 0x7f;  // 7 is Sunday too
  cron.any_hour_ = values[1].any;
  cron.any_day_ = values[2].any;
  cron.any_weekday_ = values[4].any;
  // 2000 is a leap year, so what does not come after it never comes.
  if (!cron.FirstNotBefore(absl::CivilMinute(2000))) {
    return absl::InvalidArgumentError("never happens: no month has that day");
  }
  return cron;
}

std::optional<absl::CivilMinute> CronExpression::FirstNotBefore(absl::CivilMinute from) const {
  absl::CivilDay day(from);
  int hour = from.hour(), minute = from.minute();
  for (int i = 0; i < kSearchDays; ++i, ++day, hour = minute = 0) {
    if (!MatchesDay(day)) continue;
    for (; hour < 24; ++hour, minute = 0) {
      if (!hours_[hour]) continue;
      for (; minute < 60; ++minute) {
        if (minutes_[minute]) {
          return absl::CivilMinute(day.year(), day.month(), day.day(), hour, minute);
        }
      }
    }
  }
  return std::nullopt;
}

bool CronExpression::MatchesDay(absl::CivilDay day) const {
  if (!months_[day.month()]) return false;
  // absl counts from Monday.
  const int weekday = (static_cast<int>(absl::GetWeekday(day)) + 1) % 7;
  const bool by_day = days_[day.day()], by_weekday = weekdays_[weekday];
  // crontab(5): two restricted fields add up, one restricted field decides.
  return any_day_ || any_weekday_ ? by_day && by_weekday : by_day || by_weekday;
}

}  // namespace mobi
