// When a policy's window is open: a cron expression for its starts, a duration, a time zone. Pure
// functions of an absolute time; immutable, thread-safe.
// Daylight saving: a window lasts by the wall clock (09:00 for 9h ends when the clock shows 18:00,
// a day of 24h is that day, however long). A start that the clock skips comes when it has jumped; a
// start that it shows twice comes at the first, unless the expression means every hour.
#ifndef MOBI_SERVER_SCHEDULE_H_
#define MOBI_SERVER_SCHEDULE_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/schedule_cron.h"

namespace mobi {

// From start up to, not with, end.
struct TimeSpan {
  absl::Time start;
  absl::Time end;
  bool Contains(absl::Time time) const { return start <= time && time < end; }
};

class Schedule {
 public:
  // INVALID_ARGUMENT says what is wrong with the expression.
  static absl::StatusOr<Schedule> Create(absl::string_view cron, absl::Duration duration,
                                         const absl::TimeZone& zone);

  // The open time that contains `time`, or else the next one. Open times that touch or overlap are
  // one, looked at for kHorizon: an end at or after time + kHorizon means "at least until".
  TimeSpan SpanAt(absl::Time time) const;

  const std::string& cron_text() const { return cron_text_; }
  absl::Duration duration() const { return duration_; }
  const absl::TimeZone& zone() const { return zone_; }

  static constexpr absl::Duration kMinDuration = absl::Minutes(1);
  static constexpr absl::Duration kMaxDuration = absl::Hours(31 * 24);
  static constexpr absl::Duration kHorizon = absl::Hours(8 * 24);

 private:
  Schedule(CronExpression cron, absl::string_view cron_text, absl::Duration duration,
           const absl::TimeZone& zone)
      : cron_(cron), cron_text_(cron_text), duration_(duration), zone_(zone) {}

  // Every open time that starts between the two, by start.
  std::vector<TimeSpan> SpansBetween(absl::Time from, absl::Time to) const;
  // Adds the open times that start at this civil time: one, or two when the clock shows it twice.
  void AddSpans(absl::CivilMinute start, std::vector<TimeSpan>& spans) const;
  TimeSpan SpanFrom(absl::Time start, absl::CivilMinute civil_start) const;

  CronExpression cron_;
  std::string cron_text_;
  absl::Duration duration_;
  absl::TimeZone zone_;
};

// An IANA name such as Europe/Berlin, or UTC; never a path or the machine's own zone.
// INVALID_ARGUMENT when the time zone database has no such zone.
absl::StatusOr<absl::TimeZone> LoadIanaZone(const std::string& name);

}  // namespace mobi

#endif  // MOBI_SERVER_SCHEDULE_H_
