#include "server/policy_windows.h"

#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/policy_yaml.h"

namespace mobi {
namespace {

using testing::HasSubstr;

Policy Parse(const std::string& windows) {
  const auto policy = ParsePolicy("windows:\n" + windows, "p");
  EXPECT_TRUE(policy.ok()) << policy.status();
  return *policy;
}

absl::Time Utc(const std::string& text) {
  absl::Time time;
  std::string error;
  EXPECT_TRUE(absl::ParseTime("%Y-%m-%d %H:%M", text, &time, &error)) << error;
  return time;
}

constexpr char kThree[] =
    R"(- {name: launch, cron: "0 12 6 11 *", duration: 2h, time_zone: UTC, floor_bits: 3, ceiling_bits: 4}
- {name: peak, cron: "0 9 * * 1-5", duration: 9h, time_zone: America/New_York, floor_bits: 3, ceiling_bits: 5}
- {name: off-peak, floor_bits: 4, ceiling_bits: 8}
)";

TEST(WindowAt, TheFirstMatchWins) {
  const Policy policy = Parse(kThree);
  // Wednesday 6 November 2024; New York is at UTC-5.
  const auto at = [&](const std::string& time) {
    return policy.windows[WindowAt(policy, Utc(time)).window].name;
  };
  EXPECT_EQ(at("2024-11-06 11:59"), "off-peak");
  EXPECT_EQ(at("2024-11-06 12:00"), "launch");
  EXPECT_EQ(at("2024-11-06 13:59"), "launch");
  EXPECT_EQ(at("2024-11-06 14:00"), "peak");
  EXPECT_EQ(at("2024-11-06 22:59"), "peak");
  EXPECT_EQ(at("2024-11-06 23:00"), "off-peak");
  EXPECT_EQ(at("2024-11-09 15:00"), "off-peak");  // Saturday
}

TEST(WindowAt, SaysUntilWhenNothingChanges) {
  const Policy policy = Parse(kThree);
  EXPECT_EQ(WindowAt(policy, Utc("2024-11-06 03:00")).until, Utc("2024-11-06 12:00"));
  EXPECT_EQ(WindowAt(policy, Utc("2024-11-06 12:30")).until, Utc("2024-11-06 14:00"));
  EXPECT_EQ(WindowAt(policy, Utc("2024-11-06 14:30")).until, Utc("2024-11-06 23:00"));
  const Policy one = Parse("- {name: all}\n");
  EXPECT_EQ(WindowAt(one, Utc("2024-11-06 14:30")).until, absl::InfiniteFuture());
}

// Whatever the windows are, a week is covered without gap, in order, and each piece is the window
// that a look at any time in it gives.
TEST(WindowsBetween, CoversTheWeekAndAgreesWithLookingAtEachTime) {
  std::mt19937 rng(3);
  const char* zones[] = {"UTC", "America/New_York", "Europe/Berlin", "Australia/Lord_Howe"};
  for (int round = 0; round < 200; ++round) {
    std::string windows;
    const int scheduled = rng() % 4;
    for (int i = 0; i < scheduled; ++i) {
      absl::StrAppendFormat(
          &windows, "- {name: w%d, cron: '%d %d * * %d-6', duration: %dm, time_zone: %s}\n", i,
          rng() % 60, rng() % 24, rng() % 7, 1 + rng() % 2000, zones[rng() % 4]);
    }
    const Policy policy = Parse(windows + "- {name: rest}\n");
    const absl::Time from = Utc("2024-01-01 00:00") + absl::Minutes(rng() % 500000);
    const absl::Time to = from + absl::Hours(7 * 24);
    const std::vector<WindowSpan> spans = WindowsBetween(policy, from, to, 1000);
    ASSERT_FALSE(spans.empty());
    EXPECT_EQ(spans.front().span.start, from);
    EXPECT_EQ(spans.back().span.end, to);
    for (size_t i = 0; i < spans.size(); ++i) {
      ASSERT_LT(spans[i].span.start, spans[i].span.end);
      if (i == 0) continue;
      ASSERT_EQ(spans[i].span.start, spans[i - 1].span.end);
      ASSERT_NE(spans[i].window, spans[i - 1].window);
    }
    for (int i = 0; i < 200; ++i) {
      const absl::Time time = from + (to - from) * (rng() % 10000) / 10000;
      const auto holds = std::find_if(spans.begin(), spans.end(), [&](const WindowSpan& span) {
        return span.span.Contains(time);
      });
      ASSERT_NE(holds, spans.end());
      ASSERT_EQ(WindowAt(policy, time).window, holds->window);
    }
  }
}

TEST(DescribePolicy, ShowsTheComingWeekAsATable) {
  const std::string text = DescribePolicy(Parse(kThree), Utc("2024-11-04 10:00"));
  const std::vector<std::string> lines = absl::StrSplit(text, '\n');
  const auto header = std::find_if(lines.begin(), lines.end(), [](const std::string& line) {
    return absl::StrContains(line, "windows of the coming week");
  });
  ASSERT_NE(header, lines.end());
  EXPECT_EQ(*header, "windows of the coming week, in UTC:");
  const auto row = [&](int index) { return *(header + 2 + index); };
  EXPECT_EQ(row(0),
            "  Mon 2024-11-04 10:00 +0000 Mon 2024-11-04 14:00 +0000 4h         off-peak           "
            "  4 to 8");
  EXPECT_THAT(row(1), HasSubstr("9h         peak                 3 to 5"));
  EXPECT_THAT(row(2), HasSubstr("15h        off-peak"));
  EXPECT_THAT(text, HasSubstr("Wed 2024-11-06 12:00 +0000 Wed 2024-11-06 14:00 +0000 2h         "
                              "launch               3 to 4"));
  EXPECT_THAT(text, HasSubstr("queue_depth          8"));
  EXPECT_THAT(text, HasSubstr("standard             at least 2 bits"));
}

TEST(DescribePolicy, DenseSchedulesAreCut) {
  const Policy policy =
      Parse("- {name: odd, cron: '*/2 * * * *', duration: 1m, time_zone: UTC}\n- {name: rest}\n");
  const std::string text = DescribePolicy(policy, Utc("2024-11-04 10:00"));
  EXPECT_THAT(text, HasSubstr("the first 200 changes only"));
}

TEST(CheckPolicyFile, NamesTheFileThatIsNotThere) {
  const auto text = CheckPolicyFile("/nonexistent/policy.yaml", absl::Now());
  EXPECT_EQ(text.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(text.status().message()), HasSubstr("/nonexistent/policy.yaml"));
}

}  // namespace
}  // namespace mobi
