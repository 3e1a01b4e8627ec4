#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <numeric>
#include <random>
#include <set>

#include "absl/strings/str_cat.h"
#include "engine/base/mapped_file.h"
#include "server/loadgen/arrivals.h"
#include "server/loadgen/load_report.h"
#include "server/loadgen/prompts.h"
#include "server/loadgen/trace.h"
#include "tests/paths.h"

namespace mobi {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::SizeIs;

TEST(PoissonArrivals, HaveTheRateAndTheSpreadOfAPoissonProcess) {
  const std::vector<RatePhase> phases = {{50, seconds(400)}, {5, seconds(400)}};
  const auto arrivals = PoissonArrivals(phases, {10, 20}, {1, 3}, 7);
  std::vector<double> gaps;
  std::vector<int> per_phase(2);
  double tokens = 0;
  for (size_t i = 0; i < arrivals.size(); ++i) {
    const Arrival& a = arrivals[i];
    ASSERT_LT(a.at, seconds(800));
    ASSERT_EQ(a.phase, a.at < seconds(400) ? 0 : 1);
    ASSERT_TRUE(a.prompt_tokens >= 10 && a.prompt_tokens <= 20);
    ASSERT_TRUE(a.new_tokens >= 1 && a.new_tokens <= 3);
    tokens += a.prompt_tokens;
    ++per_phase[a.phase];
    if (i == 0) continue;
    ASSERT_GE(a.at, arrivals[i - 1].at);
    if (a.phase == 0) gaps.push_back(ToSeconds(a.at - arrivals[i - 1].at));
  }
  // Five standard deviations of a Poisson count.
  EXPECT_NEAR(per_phase[0], 20000, 5 * std::sqrt(20000));
  EXPECT_NEAR(per_phase[1], 2000, 5 * std::sqrt(2000));
  EXPECT_NEAR(tokens / static_cast<double>(arrivals.size()), 15, 0.2);
  // Exponential gaps: the standard deviation equals the mean, and 1 - 1/e of them are below it.
  const double mean = std::accumulate(gaps.begin(), gaps.end(), 0.0) / gaps.size();
  double squares = 0, below = 0;
  for (const double gap : gaps) {
    squares += (gap - mean) * (gap - mean);
    below += gap < mean ? 1 : 0;
  }
  EXPECT_NEAR(std::sqrt(squares / gaps.size()) / mean, 1, 0.03);
  EXPECT_NEAR(below / gaps.size(), 1 - std::exp(-1), 0.02);
}

TEST(PoissonArrivals, FollowFromTheSeed) {
  const std::vector<RatePhase> phases = {{20, seconds(10)}};
  const auto times = [&](uint64_t seed) {
    std::vector<Duration> at;
    for (const Arrival& a : PoissonArrivals(phases, {1, 9}, {1, 9}, seed)) at.push_back(a.at);
    return at;
  };
  EXPECT_EQ(times(3), times(3));
  EXPECT_NE(times(3), times(4));
}

TEST(ParsePhases, TakesRatesAndTimes) {
  const auto phases = ParsePhases("4,40:2.5", seconds(7));
  ASSERT_TRUE(phases.ok()) << phases.status();
  ASSERT_THAT(*phases, SizeIs(2));
  EXPECT_EQ((*phases)[0].duration, seconds(7));
  EXPECT_EQ((*phases)[1].requests_per_second, 40);
  EXPECT_EQ((*phases)[1].duration, milliseconds(2500));
  for (const char* bad : {"", ",", "4,", "x", "0", "-1", "nan", "inf", "1e9", "4:", "4:0", "4:-3",
                          "4:nan", "4:5:6"}) {
    EXPECT_EQ(ParsePhases(bad, seconds(1)).status().code(), absl::StatusCode::kInvalidArgument)
        << bad;
  }
}

TEST(ParseTokenRange, TakesOneNumberOrTwo) {
  EXPECT_EQ(ParseTokenRange("5")->max, 5);
  EXPECT_EQ(ParseTokenRange("5:9")->min, 5);
  EXPECT_EQ(ParseTokenRange("5:9")->max, 9);
  for (const char* bad : {"", "0", "-1", "9:5", "1:2:3", "x", "5:", ":5", "1.5", "99999999999"}) {
    EXPECT_FALSE(ParseTokenRange(bad).ok()) << bad;
  }
}

constexpr char kHeader[] = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n";

TEST(ParseTrace, ReadsTheAzureLayout) {
  const auto rows = ParseTrace(absl::StrCat(kHeader,
                                            "2023-11-16 23:59:59.5000000,374,44\r\n"
                                            "2023-11-17 00:00:01.2500000,396,109\r\n"
                                            "2023-11-17T01:00:00,1,0"),
                               "t.csv");
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_THAT(*rows, SizeIs(3));
  EXPECT_EQ((*rows)[0].seconds, 0);
  EXPECT_NEAR((*rows)[1].seconds, 1.75, 1e-6);
  EXPECT_NEAR((*rows)[2].seconds, 3600.5, 1e-6);
  EXPECT_EQ((*rows)[1].context_tokens, 396);
  EXPECT_EQ((*rows)[1].generated_tokens, 109);
}

TEST(ParseTrace, ColumnsMayComeInAnyOrder) {
  const auto rows = ParseTrace("GeneratedTokens,user,TIMESTAMP,ContextTokens\n5,x,0.5,7\n", "t");
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ((*rows)[0].context_tokens, 7);
  EXPECT_EQ((*rows)[0].generated_tokens, 5);
}

TEST(ParseTrace, RefusesWhatIsNotATraceByLine) {
  const struct {
    std::string text;
    const char* message;
  } cases[] = {
      {"", "t.csv: no requests"},
      {kHeader, "t.csv: no requests"},
      {"TIMESTAMP,ContextTokens\n1,2\n", "t.csv:1: no column GeneratedTokens"},
      {absl::StrCat(kHeader, "1,2\n"), "t.csv:2: 2 fields, the header has 3"},
      {absl::StrCat(kHeader, "1,2,3\n\n2,3,4,5\n"), "t.csv:4: 4 fields"},
      {absl::StrCat(kHeader, "2023-02-30 00:00:00,2,3\n"), "t.csv:2: TIMESTAMP is no time"},
      {absl::StrCat(kHeader, "2023-02-20 00:00:00.,2,3\n"), "t.csv:2: TIMESTAMP"},
      {absl::StrCat(kHeader, "2023-02-20 00:00:00.1e9,2,3\n"), "t.csv:2: TIMESTAMP"},
      {absl::StrCat(kHeader, "nan,2,3\n"), "t.csv:2: TIMESTAMP"},
      {absl::StrCat(kHeader, ",2,3\n"), "t.csv:2: TIMESTAMP"},
      {absl::StrCat(kHeader, "1,-2,3\n"), "t.csv:2: ContextTokens is not a whole number"},
      {absl::StrCat(kHeader, "1,2,99999999999\n"), "t.csv:2: GeneratedTokens"},
      {absl::StrCat(kHeader, "1,2.5,3\n"), "t.csv:2: ContextTokens"},
      {absl::StrCat(kHeader, "5,1,1\n4,1,1\n"), "t.csv:3: TIMESTAMP goes back"},
      {absl::StrCat(kHeader, std::string(5000, ','), "\n"), "t.csv:2: 5000 bytes in one line"},
      {std::string("\0\xff\n", 3), "t.csv:1: no column"},
  };
  for (const auto& c : cases) {
    const auto rows = ParseTrace(c.text, "t.csv");
    EXPECT_EQ(rows.status().code(), absl::StatusCode::kInvalidArgument) << c.text;
    EXPECT_THAT(std::string(rows.status().message()), HasSubstr(c.message));
  }
}

// Random damage to a good file is refused or read, never worse.
TEST(ParseTrace, SurvivesDamage) {
  std::string good = kHeader;
  for (int i = 0; i < 20; ++i) absl::StrAppend(&good, "2023-11-16 18:15:", 10 + i, ".5,1,2\r\n");
  std::mt19937_64 random(11);
  int refused = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string text = good;
    for (int i = 0; i < 3; ++i) text[random() % text.size()] = static_cast<char>(random());
    text.resize(random() % 4 == 0 ? random() % text.size() : text.size());
    const auto rows = ParseTrace(text, "t");
    if (!rows.ok()) {
      ++refused;
      continue;
    }
    for (const TraceRow& row : *rows) {
      ASSERT_GE(row.seconds, 0);
      ASSERT_GE(row.context_tokens, 0);
    }
  }
  EXPECT_GT(refused, 2500);
}

TEST(ParseTrace, ReadsTheProductionTrace) {
  const std::string path =
      std::string(MOBI_SOURCE_DIR) + "/../shared/data/traces/azure_llm_2023_conv.csv";
  if (!std::ifstream(path)) GTEST_SKIP() << "no " << path;
  const auto rows = ReadTrace(path);
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ(rows->size(), 19366u);
  EXPECT_NEAR(rows->back().seconds, 3501.722, 0.001);
}

TEST(TraceArrivals, AreCompressedScaledAndCutToTheContext) {
  const std::vector<TraceRow> rows = {{0, 100, 10}, {10, 1000, 400}, {20, 3, 1}, {30, 8000, 90}};
  TraceOptions options;
  options.begin = seconds(10);
  options.duration = seconds(21);
  options.time_compression = 4;
  options.token_scale = 0.1;
  options.max_model_len = 128;
  options.max_new_tokens = 16;
  const auto arrivals = TraceArrivals(rows, options);
  ASSERT_TRUE(arrivals.ok()) << arrivals.status();
  ASSERT_THAT(*arrivals, SizeIs(3));
  EXPECT_EQ((*arrivals)[0].at, Duration::zero());
  EXPECT_EQ((*arrivals)[0].prompt_tokens, 100);
  EXPECT_EQ((*arrivals)[0].new_tokens, 16);
  EXPECT_EQ((*arrivals)[1].at, milliseconds(2500));
  EXPECT_EQ((*arrivals)[1].prompt_tokens, 1);
  EXPECT_EQ((*arrivals)[1].new_tokens, 1);
  EXPECT_EQ((*arrivals)[2].at, milliseconds(5000));
  EXPECT_EQ((*arrivals)[2].prompt_tokens, 127);
  EXPECT_EQ((*arrivals)[2].new_tokens, 1);
  options.begin = seconds(100);
  EXPECT_FALSE(TraceArrivals(rows, options).ok());
}

TEST(Percentiles, AreThoseOfNumpy) {
  // numpy.percentile([15, 20, 35, 40, 50], [50, 90, 95, 99])
  const Percentiles p = PercentilesOf({50, 15, 40, 20, 35});
  EXPECT_EQ(p.count, 5);
  EXPECT_DOUBLE_EQ(p.mean, 32);
  EXPECT_DOUBLE_EQ(p.p50, 35);
  EXPECT_DOUBLE_EQ(p.p90, 46);
  EXPECT_DOUBLE_EQ(p.p95, 48);
  EXPECT_NEAR(p.p99, 49.6, 1e-9);
  EXPECT_DOUBLE_EQ(p.max, 50);
  EXPECT_EQ(PercentilesOf({}).count, 0);
  EXPECT_DOUBLE_EQ(PercentilesOf({7}).p99, 7);
}

Outcome Good(double at_s, double ttft_ms, double end_ms, int tokens) {
  Outcome outcome;
  outcome.arrival.at = std::chrono::duration_cast<Duration>(std::chrono::duration<double>(at_s));
  outcome.ttft = std::chrono::duration_cast<Duration>(std::chrono::duration<double>(ttft_ms / 1e3));
  outcome.end = std::chrono::duration_cast<Duration>(std::chrono::duration<double>(end_ms / 1e3));
  outcome.tokens = tokens;
  outcome.gaps_ms.assign(tokens - 1, static_cast<float>((end_ms - ttft_ms) / (tokens - 1)));
  outcome.prompt_tokens = 10;
  outcome.effective_bits = 4;
  return outcome;
}

TEST(LoadReport, CountsLatenciesByArrivalAndRatesByEnd) {
  std::vector<Outcome> outcomes;
  outcomes.push_back(Good(0.5, 50, 150, 11));   // 10 ms a token
  outcomes.push_back(Good(1.5, 300, 400, 11));  // the first token is late
  outcomes.push_back(Good(1.8, 50, 2050, 11));  // 200 ms a token; ends after the stretch
  outcomes.back().effective_bits = 8;
  Outcome refused;
  refused.arrival.at = milliseconds(1200);
  refused.status = absl::ResourceExhaustedError("full");
  refused.end = milliseconds(3);
  outcomes.push_back(refused);
  Slo slo;
  slo.ttft = milliseconds(100);
  slo.inter_token = milliseconds(50);
  const std::vector<BitsSample> samples = {{milliseconds(100), 3, true},
                                           {milliseconds(200), 8, false},
                                           {milliseconds(300), 5, true},
                                           {seconds(3), 2, true}};
  const LoadReport all = MakeReport(outcomes, samples, {"all", {}, seconds(2)}, slo);
  EXPECT_EQ(all.requests, 4);
  EXPECT_EQ(all.by_status.at("OK"), 3);
  EXPECT_EQ(all.by_status.at("RESOURCE_EXHAUSTED"), 1);
  EXPECT_DOUBLE_EQ(all.slo_attainment, 0.25);
  EXPECT_DOUBLE_EQ(all.offered_rps, 2);
  EXPECT_DOUBLE_EQ(all.completed_rps, 1);
  EXPECT_DOUBLE_EQ(all.goodput_rps, 0.5);
  EXPECT_DOUBLE_EQ(all.tokens_per_second, 11);
  EXPECT_DOUBLE_EQ(all.goodput_tokens_per_second, 5.5);
  EXPECT_DOUBLE_EQ(all.mean_effective_bits, 4);
  EXPECT_DOUBLE_EQ(*all.mean_loaded_bits, 4);
  EXPECT_NEAR(all.refusal_ms.max, 3, 1e-9);
  EXPECT_NEAR(all.time_per_token_ms.max, 200, 1e-3);
  const LoadReport late = MakeReport(outcomes, {}, {"late", seconds(1), seconds(4)}, slo);
  EXPECT_EQ(late.requests, 3);
  EXPECT_DOUBLE_EQ(late.completed_rps, 2.0 / 3);
  EXPECT_DOUBLE_EQ(late.mean_effective_bits, 6);
  EXPECT_FALSE(late.mean_loaded_bits.has_value());
  EXPECT_TRUE(ToJson(late)["mean_loaded_bits"].is_null());
  EXPECT_EQ(ToJson(all)["by_status"]["OK"], 3);
  EXPECT_THAT(ToTable(all), HasSubstr("SLO attainment         25.00 %"));
  const std::string csv = ToCsv(outcomes, slo);
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 5);
  EXPECT_THAT(csv, HasSubstr("RESOURCE_EXHAUSTED,0,"));
}

TEST(Prompts, AreAsLongAsAskedAndShareThePrefix) {
  const Prompts prompts({.vocab_size = 50, .shared_prefix_tokens = 20, .seed = 3});
  const auto a = prompts.Make(1, 64);
  const auto b = prompts.Make(2, 64);
  EXPECT_THAT(a, SizeIs(64));
  EXPECT_EQ(a, prompts.Make(1, 64));
  EXPECT_TRUE(std::equal(a.begin(), a.begin() + 20, b.begin()));
  EXPECT_NE(a, b);
  EXPECT_THAT(a, Each(testing::AllOf(testing::Ge(0), testing::Lt(50))));
  EXPECT_EQ(prompts.Make(3, 7), std::vector<int32_t>(a.begin(), a.begin() + 7));
}

TEST(Prompts, AreCutFromTheTextBehindItsFirstToken) {
  const Prompts prompts({.text = {9, 1, 2, 3, 4, 5}, .seed = 1});
  std::set<int32_t> begins;
  for (uint64_t i = 0; i < 50; ++i) {
    const auto prompt = prompts.Make(i, 12);
    ASSERT_THAT(prompt, SizeIs(12));
    ASSERT_EQ(prompt[0], 9);
    begins.insert(prompt[1]);
    for (size_t k = 2; k < prompt.size(); ++k) {
      ASSERT_EQ(prompt[k], prompt[k - 1] == 5 ? 1 : prompt[k - 1] + 1);
    }
  }
  EXPECT_THAT(begins, ElementsAre(1, 2, 3, 4, 5));
  EXPECT_EQ(Prompts({.text = {7}}).Make(0, 3), (std::vector<int32_t>{7, 7, 7}));
}

}  // namespace
}  // namespace mobi
