// The five fields of a cron expression as sets of civil times. Knows no time zone: that a civil
// time may happen twice or never is the schedule's business. Immutable, thread-safe. Source:
// crontab(5). Lists, ranges, steps, English three-letter names; no macros, no '?', L, W, #.
#ifndef MOBI_SERVER_SCHEDULE_CRON_H_
#define MOBI_SERVER_SCHEDULE_CRON_H_

#include <bitset>
#include <optional>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/civil_time.h"

namespace mobi {

class CronExpression {
 public:
  // "minute hour day-of-month month day-of-week". INVALID_ARGUMENT says which field is wrong and
  // how; also when the expression never happens (30 February).
  static absl::StatusOr<CronExpression> Parse(absl::string_view text);

  // The first matching minute that is not before `from`; nothing within a leap cycle never comes.
  std::optional<absl::CivilMinute> FirstNotBefore(absl::CivilMinute from) const;

  // The hour field is '*' or '*/n': the expression means every hour, not an hour of the day.
  bool any_hour() const { return any_hour_; }

 private:
  bool MatchesDay(absl::CivilDay day) const;

  std::bitset<60> minutes_;
  std::bitset<24> hours_;
  std::bitset<32> days_;     // 1..31
  std::bitset<13> months_;   // 1..12
  std::bitset<7> weekdays_;  // Sunday is 0
  bool any_hour_ = false;
  bool any_day_ = false;
  bool any_weekday_ = false;
};

}  // namespace mobi

#endif  // MOBI_SERVER_SCHEDULE_CRON_H_
