#include "server/schedule.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace mobi {
namespace {

using testing::HasSubstr;

absl::TimeZone Zone(const std::string& name) {
  auto zone = LoadIanaZone(name);
  EXPECT_TRUE(zone.ok()) << zone.status();
  return zone.ok() ? *zone : absl::UTCTimeZone();
}

Schedule Make(const std::string& cron, absl::Duration duration, const std::string& zone) {
  auto schedule = Schedule::Create(cron, duration, Zone(zone));
  EXPECT_TRUE(schedule.ok()) << schedule.status();
  return *std::move(schedule);
}

absl::Time Utc(const std::string& text) {
  absl::Time time;
  std::string error;
  EXPECT_TRUE(absl::ParseTime("%Y-%m-%d %H:%M", text, &time, &error)) << error;
  return time;
}

std::string Text(absl::Time time) {
  return absl::FormatTime("%Y-%m-%d %H:%M", time, absl::UTCTimeZone());
}

// The open times of [from, to) as "start..end" in UTC.
std::vector<std::string> Spans(const Schedule& schedule, const std::string& from,
                               const std::string& to) {
  std::vector<std::string> spans;
  for (absl::Time time = Utc(from); time < Utc(to);) {
    const TimeSpan span = schedule.SpanAt(time);
    if (span.start >= Utc(to)) break;
    spans.push_back(Text(span.start) + ".." + Text(span.end));
    time = span.end;
  }
  return spans;
}

TEST(Schedule, WorkingHoursFollowTheCityOverBothChanges) {
  // New York is at UTC-5, from 10 March to 3 November 2024 at UTC-4.
  const Schedule peak = Make("0 9 * * 1-5", absl::Hours(9), "America/New_York");
  EXPECT_THAT(Spans(peak, "2024-03-08 00:00", "2024-03-13 00:00"),
              testing::ElementsAre("2024-03-08 14:00..2024-03-08 23:00",
                                   "2024-03-11 13:00..2024-03-11 22:00",
                                   "2024-03-12 13:00..2024-03-12 22:00"));
  EXPECT_THAT(Spans(peak, "2024-11-01 00:00", "2024-11-05 00:00"),
              testing::ElementsAre("2024-11-01 13:00..2024-11-01 22:00",
                                   "2024-11-04 14:00..2024-11-04 23:00"));
}

TEST(Schedule, AWindowOverTheChangeEndsWhenTheWallClockSaysSo) {
  const Schedule night = Make("0 22 * * *", absl::Hours(10), "America/New_York");
  // Nine hours and eleven hours long.
  EXPECT_THAT(Spans(night, "2024-03-09 14:00", "2024-03-10 23:00"),
              testing::ElementsAre("2024-03-10 03:00..2024-03-10 12:00"));
  EXPECT_THAT(Spans(night, "2024-11-02 14:00", "2024-11-03 23:00"),
              testing::ElementsAre("2024-11-03 02:00..2024-11-03 13:00"));
}

TEST(Schedule, WholeDaysLeaveNoGap) {
  const Schedule sunday = Make("0 0 * * 0", absl::Hours(24), "Europe/Berlin");
  EXPECT_THAT(Spans(sunday, "2024-10-26 00:00", "2024-10-29 00:00"),
              testing::ElementsAre("2024-10-26 22:00..2024-10-27 23:00"));
  EXPECT_THAT(Spans(sunday, "2024-03-30 12:00", "2024-04-02 00:00"),
              testing::ElementsAre("2024-03-30 23:00..2024-03-31 22:00"));
  const Schedule daily = Make("0 0 * * *", absl::Hours(24), "Europe/Berlin");
  const absl::Time time = Utc("2024-10-26 12:00");
  EXPECT_GE(daily.SpanAt(time).end, time + Schedule::kHorizon);
}

TEST(Schedule, AStartThatTheClockSkipsComesWhenItHasJumped) {
  // 02:00 to 03:00 is missing on 10 March 2024.
  const Schedule long_one = Make("30 2 * * *", absl::Hours(2), "America/New_York");
  EXPECT_THAT(Spans(long_one, "2024-03-09 12:00", "2024-03-10 12:00"),
              testing::ElementsAre("2024-03-10 07:00..2024-03-10 08:30"));
  const Schedule short_one = Make("15 2 * * *", absl::Minutes(30), "America/New_York");
  EXPECT_THAT(Spans(short_one, "2024-03-09 12:00", "2024-03-10 12:00"),
              testing::ElementsAre("2024-03-10 07:00..2024-03-10 07:30"));
}

TEST(Schedule, AStartThatTheClockShowsTwiceComesOnce) {
  // 01:00 to 02:00 comes twice on 3 November 2024.
  const Schedule once = Make("30 1 * * *", absl::Minutes(20), "America/New_York");
  EXPECT_THAT(Spans(once, "2024-11-03 00:00", "2024-11-03 12:00"),
              testing::ElementsAre("2024-11-03 05:30..2024-11-03 05:50"));
  // It ends at the first 01:30, not an hour later.
  const Schedule before = Make("30 0 * * *", absl::Hours(1), "America/New_York");
  EXPECT_THAT(Spans(before, "2024-11-03 00:00", "2024-11-03 12:00"),
              testing::ElementsAre("2024-11-03 04:30..2024-11-03 05:30"));
}

TEST(Schedule, EveryHourMeansEveryHourThatPasses) {
  const Schedule hourly = Make("0 * * * *", absl::Minutes(10), "America/New_York");
  EXPECT_THAT(Spans(hourly, "2024-11-03 04:30", "2024-11-03 07:30"),
              testing::ElementsAre("2024-11-03 05:00..2024-11-03 05:10",
                                   "2024-11-03 06:00..2024-11-03 06:10",
                                   "2024-11-03 07:00..2024-11-03 07:10"));
  EXPECT_THAT(Spans(hourly, "2024-03-10 05:30", "2024-03-10 08:30"),
              testing::ElementsAre("2024-03-10 06:00..2024-03-10 06:10",
                                   "2024-03-10 07:00..2024-03-10 07:10",
                                   "2024-03-10 08:00..2024-03-10 08:10"));
  // Inside the repeated hour the two passes interleave in civil order.
  const Schedule halves = Make("*/30 * * * *", absl::Minutes(10), "America/New_York");
  EXPECT_THAT(Spans(halves, "2024-11-03 05:20", "2024-11-03 06:40"),
              testing::ElementsAre("2024-11-03 05:30..2024-11-03 05:40",
                                   "2024-11-03 06:00..2024-11-03 06:10",
                                   "2024-11-03 06:30..2024-11-03 06:40"));
}

TEST(Schedule, ZonesThatShiftByHalfAnHourOrADay) {
  // Lord Howe goes from UTC+10:30 to UTC+11 on 6 October 2024 at 02:00.
  const Schedule howe = Make("0 1 * * *", absl::Hours(2), "Australia/Lord_Howe");
  EXPECT_THAT(Spans(howe, "2024-10-05 12:00", "2024-10-06 00:00"),
              testing::ElementsAre("2024-10-05 14:30..2024-10-05 16:00"));
  // Samoa had no 30 December 2011; the clock went from UTC-10 to UTC+14 at its midnight.
  const Schedule apia = Make("0 12 30 12 *", absl::Hours(1), "Pacific/Apia");
  EXPECT_THAT(Spans(apia, "2011-12-29 00:00", "2012-01-02 00:00"),
              testing::ElementsAre("2011-12-30 10:00..2011-12-30 11:00"));
}

TEST(Schedule, LeapDays) {
  const Schedule leap = Make("0 0 29 2 *", absl::Hours(24), "UTC");
  EXPECT_THAT(Spans(leap, "2023-01-01 00:00", "2029-01-01 00:00"),
              testing::ElementsAre("2024-02-29 00:00..2024-03-01 00:00",
                                   "2028-02-29 00:00..2028-03-01 00:00"));
  // 2100 is no leap year.
  EXPECT_THAT(Spans(leap, "2097-01-01 00:00", "2105-01-01 00:00"),
              testing::ElementsAre("2104-02-29 00:00..2104-03-01 00:00"));
  const Schedule daily = Make("0 23 * * *", absl::Hours(2), "UTC");
  EXPECT_THAT(Spans(daily, "2024-02-28 12:00", "2024-03-01 12:00"),
              testing::ElementsAre("2024-02-28 23:00..2024-02-29 01:00",
                                   "2024-02-29 23:00..2024-03-01 01:00"));
}

TEST(Schedule, OverlappingOccurrencesAreOneSpan) {
  const Schedule overlap = Make("0 8,9 * * *", absl::Hours(3), "UTC");
  EXPECT_THAT(Spans(overlap, "2024-06-01 00:00", "2024-06-02 00:00"),
              testing::ElementsAre("2024-06-01 08:00..2024-06-01 12:00"));
}

TEST(Schedule, RestrictedDayAndWeekdayAddUp) {
  // crontab(5): the 13th and every Friday.
  const Schedule either = Make("0 0 13 * 5", absl::Hours(1), "UTC");
  EXPECT_THAT(Spans(either, "2024-06-10 00:00", "2024-06-20 00:00"),
              testing::ElementsAre("2024-06-13 00:00..2024-06-13 01:00",
                                   "2024-06-14 00:00..2024-06-14 01:00"));
}

// Minute by minute from what crontab(5) says, without the code under test.
class BruteForce {
 public:
  explicit BruteForce(std::mt19937& rng) {
    for (auto [set, size] : {std::pair{&minutes_, 60}, {&hours_, 24}, {&weekdays_, 7}}) {
      set->assign(size, true);
      if (rng() % 3 == 0) continue;
      for (int i = 0; i < size; ++i) (*set)[i] = rng() % (size / 3) == 0;
      (*set)[rng() % size] = true;
    }
  }
  std::string cron() const {
    return List(minutes_) + " " + List(hours_) + " * * " + List(weekdays_);
  }
  bool StartsAt(absl::Time time) const {
    const absl::CivilMinute civil = absl::ToCivilMinute(time, absl::UTCTimeZone());
    const int weekday = (static_cast<int>(absl::GetWeekday(civil)) + 1) % 7;
    return minutes_[civil.minute()] && hours_[civil.hour()] && weekdays_[weekday];
  }

 private:
  static std::string List(const std::vector<bool>& set) {
    if (std::count(set.begin(), set.end(), false) == 0) return "*";
    std::string list;
    for (size_t i = 0; i < set.size(); ++i) {
      if (set[i]) list += (list.empty() ? "" : ",") + std::to_string(i);
    }
    return list;
  }
  std::vector<bool> minutes_, hours_, weekdays_;
};

TEST(Schedule, AgreesWithCountingMinutes) {
  std::mt19937 rng(6);
  for (int round = 0; round < 60; ++round) {
    const BruteForce oracle(rng);
    const int minutes = 1 + rng() % (round % 2 ? 90 : 3000);
    const Schedule schedule = Make(oracle.cron(), absl::Minutes(minutes), "UTC");
    const absl::Time begin = Utc("2024-01-01 00:00") + absl::Minutes(rng() % 500000);
    int open = 0;
    for (int i = -minutes + 1; i < 0; ++i) {
      if (oracle.StartsAt(begin + absl::Minutes(i))) open = minutes + i;
    }
    TimeSpan span = schedule.SpanAt(begin);
    for (int i = 0; i < 3 * 1440; ++i) {
      const absl::Time time = begin + absl::Minutes(i);
      if (oracle.StartsAt(time)) open = minutes;
      if (time >= span.end) span = schedule.SpanAt(time);
      ASSERT_EQ(span.Contains(time), open > 0)
          << oracle.cron() << " for " << minutes << " min at " << Text(time);
      open = std::max(open - 1, 0);
    }
  }
}

TEST(Schedule, ASpanIsTheSameSeenFromAnyTimeInIt) {
  std::mt19937 rng(7);
  for (const char* name : {"America/New_York", "Europe/Berlin", "Australia/Lord_Howe", "UTC"}) {
    for (int round = 0; round < 40; ++round) {
      const Schedule schedule =
          Make(absl::StrFormat("%d %d * * %d", rng() % 60, rng() % 24, rng() % 7),
               absl::Minutes(1 + rng() % 2000), name);
      const absl::Time from = Utc("2024-01-01 00:00") + absl::Minutes(rng() % 500000);
      const TimeSpan span = schedule.SpanAt(from);
      ASSERT_LT(span.start, span.end);
      ASSERT_GT(span.end, from);
      for (int i = 0; i < 10; ++i) {
        const absl::Time inside = span.start + (span.end - span.start) * (rng() % 1000) / 1000;
        const TimeSpan again = schedule.SpanAt(inside);
        ASSERT_EQ(again.start, span.start);
        ASSERT_EQ(again.end, span.end);
      }
    }
  }
}

TEST(CronExpression, BadOnesSayWhatIsWrong) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "has 0 fields, needs 5"},
      {"0 9 * *", "has 4 fields, needs 5"},
      {"0 9 * * 1 2024", "has 6 fields"},
      {"@daily", "has 1 fields"},
      {"60 9 * * *", "minute \"60\": 60 is out of range [0, 59]"},
      {"0 24 * * *", "hour \"24\""},
      {"0 9 0 * *", "day of month \"0\""},
      {"0 9 * 13 *", "month \"13\""},
      {"0 9 * * 8", "day of week \"8\": 8 is out of range [0, 7]"},
      {"0 9 * * mo", "day of week \"mo\""},
      {"0 9 * * mon-", "day of week \"mon-\""},
      {"0 9 * * fri-mon", "runs backwards"},
      {"0 22-2 * * *", "runs backwards"},
      {"*/0 9 * * *", "a step is 1 to 59"},
      {"*/61 9 * * *", "a step is 1 to 59"},
      {"5/10 9 * * *", "a step needs '*' or a range"},
      {"1,,2 9 * * *", "minute \"\""},
      {"-1 9 * * *", "minute \"-1\""},
      {"1e1 9 * * *", "minute \"1e1\""},
      {"0 9 ? * *", "day of month \"?\""},
      {"0 9 L * *", "day of month \"L\""},
      {"0 9 30 2 *", "never happens"},
      {"0 9 31 4,6,9,11 *", "never happens"},
  };
  for (const auto& [cron, reason] : cases) {
    const auto parsed = CronExpression::Parse(cron);
    ASSERT_FALSE(parsed.ok()) << cron;
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(parsed.status().message()), HasSubstr(reason)) << cron;
  }
}

TEST(CronExpression, NamesListsRangesAndSteps) {
  const auto starts = [](const std::string& cron, const std::string& from, int count) {
    std::vector<std::string> texts;
    const auto parsed = CronExpression::Parse(cron);
    EXPECT_TRUE(parsed.ok()) << parsed.status();
    absl::CivilMinute at = absl::ToCivilMinute(Utc(from), absl::UTCTimeZone());
    for (int i = 0; i < count; ++i) {
      at = *parsed->FirstNotBefore(at);
      texts.push_back(absl::FormatCivilTime(at));
      at += 1;
    }
    return texts;
  };
  EXPECT_THAT(starts("10-20/5,50 6 * JAN,jul Sun", "2024-06-01 00:00", 5),
              testing::ElementsAre("2024-07-07T06:10", "2024-07-07T06:15", "2024-07-07T06:20",
                                   "2024-07-07T06:50", "2024-07-14T06:10"));
  EXPECT_EQ(starts("0 0 * * 7", "2024-06-01 00:00", 3), starts("0 0 * * 0", "2024-06-01 00:00", 3));
  EXPECT_THAT(starts("0 0 * * 6-7", "2024-06-03 00:00", 2),
              testing::ElementsAre("2024-06-08T00:00", "2024-06-09T00:00"));
  EXPECT_THAT(starts("59 23 31 12 *", "2024-12-31 23:59", 2),
              testing::ElementsAre("2024-12-31T23:59", "2025-12-31T23:59"));
}

TEST(LoadIanaZone, TakesNamesAndNoPaths) {
  for (const char* name : {"UTC", "Europe/Berlin", "America/Argentina/Buenos_Aires", "Etc/GMT+5"}) {
    EXPECT_TRUE(LoadIanaZone(name).ok()) << name;
  }
  for (const char* name : {"", "Mars/Olympus", "/etc/localtime", "../../etc/localtime", "localtime",
                           "libc:localtime", "Fixed/UTC+01:00:00", "Europe/../UTC", "utc+1"}) {
    const auto zone = LoadIanaZone(name);
    EXPECT_EQ(zone.status().code(), absl::StatusCode::kInvalidArgument) << name;
  }
}

}  // namespace
}  // namespace mobi
