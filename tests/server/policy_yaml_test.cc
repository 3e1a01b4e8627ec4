#include "server/policy_yaml.h"

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/policy_document.h"

namespace mobi {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

constexpr char kExample[] = R"(model_class: default
slo: {ttft_p95_ms: 500, itl_p95_ms: 50}
classes:            # priority classes, lowest loses bits first
  premium: {floor_bits: 4.5}
  standard: {floor_bits: 3.0}
windows:            # first match wins; the last has no schedule
  - {name: peak, cron: "0 9 * * 1-5", duration: 9h, time_zone: America/New_York, floor_bits: 3.0, ceiling_bits: 5.0}
  - {name: off-peak, floor_bits: 4.0, ceiling_bits: 8.0}
signals:
  - {kind: queue_depth, reference: 8}
  - {kind: kv_usage, reference: 0.85}
  - {kind: promql, query: 'avg(DCGM_FI_DEV_GPU_UTIL)', reference: 90, timeout: 500ms, max_age: 30s}
)";

TEST(ParsePolicy, ReadsTheWholeSchema) {
  const auto parsed = ParsePolicy(kExample, "policy.yaml");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const Policy& policy = *parsed;
  EXPECT_EQ(policy.model_class, "default");
  EXPECT_EQ(policy.slo.ttft_p95_ms, 500);
  EXPECT_EQ(policy.slo.itl_p95_ms, 50);
  ASSERT_EQ(policy.classes.size(), 2u);
  EXPECT_EQ(policy.classes[0].name, "premium");
  EXPECT_GT(policy.classes[0].priority, policy.classes[1].priority);
  EXPECT_EQ(policy.FindClass("premium")->floor_bits, 4.5f);
  EXPECT_EQ(policy.FindClass("standard")->floor_bits, 3.0f);
  EXPECT_EQ(policy.FindClass("gold"), nullptr);
  ASSERT_EQ(policy.windows.size(), 2u);
  EXPECT_EQ(policy.windows[0].name, "peak");
  ASSERT_TRUE(policy.windows[0].schedule.has_value());
  EXPECT_EQ(policy.windows[0].schedule->cron_text(), "0 9 * * 1-5");
  EXPECT_EQ(policy.windows[0].schedule->duration(), absl::Hours(9));
  EXPECT_EQ(policy.windows[0].schedule->zone().name(), "America/New_York");
  EXPECT_EQ(policy.windows[0].ceiling_bits, 5.0f);
  EXPECT_FALSE(policy.windows[1].schedule.has_value());
  EXPECT_EQ(policy.windows[1].floor_bits, 4.0f);
  ASSERT_EQ(policy.signals.size(), 3u);
  EXPECT_EQ(policy.signals[2].query, "avg(DCGM_FI_DEV_GPU_UTIL)");
  EXPECT_EQ(policy.signals[2].timeout, std::chrono::milliseconds(500));
  EXPECT_EQ(policy.signals[2].max_age, std::chrono::seconds(30));
  // Objectives are signals too, and the first token's is foretold as well.
  const std::vector<PolicySignal> all = policy.AllSignals();
  ASSERT_EQ(all.size(), 6u);
  EXPECT_EQ(all[3].name, "queue_wait");
  EXPECT_DOUBLE_EQ(all[3].reference, 500.0 / 3);
  EXPECT_EQ(all[4].name, "ttft_p95");
  EXPECT_EQ(all[4].reference, 500);
  EXPECT_EQ(all[5].name, "itl_p95");
}

TEST(ParsePolicy, LeavesMostThingsOut) {
  const auto policy = ParsePolicy("windows: [{name: all}]", "p");
  ASSERT_TRUE(policy.ok()) << policy.status();
  EXPECT_EQ(policy->windows[0].floor_bits, 3.0f);
  EXPECT_EQ(policy->windows[0].ceiling_bits, 8.0f);
  EXPECT_NE(policy->FindClass(kDefaultPriorityClass), nullptr);
  EXPECT_FALSE(policy->AllSignals().empty());
  // Null reads as absent.
  EXPECT_TRUE(ParsePolicy("slo:\nclasses: {standard: }\nwindows: [{name: all}]\n", "p").ok());
}

TEST(ParsePolicy, ASignalOfItsOwnMayUndercutTheObjective) {
  const auto policy = ParsePolicy(
      "slo: {ttft_p95_ms: 500, itl_p95_ms: 50}\nwindows: [{name: all}]\n"
      "signals: [{kind: ttft_p95, reference: 300}, {kind: itl_p95},\n"
      "          {kind: queue_depth, name: queue_wait, reference: 2}]",
      "p");
  ASSERT_TRUE(policy.ok()) << policy.status();
  const std::vector<PolicySignal> all = policy->AllSignals();
  ASSERT_EQ(all.size(), 3u);  // no second one of the same name
  EXPECT_EQ(all[0].reference, 300);
  EXPECT_EQ(all[1].reference, 50);
  EXPECT_EQ(all[2].kind, SignalKind::kQueueDepth);
}

TEST(ParsePolicy, AForetoldWaitIsHeldAgainstAThirdOfTheObjective) {
  const auto reference = [](const std::string& signal) {
    const auto policy = ParsePolicy(
        "slo: {ttft_p95_ms: 600}\nwindows: [{name: all}]\n"
        "signals: [{kind: queue_wait" +
            signal + "}]",
        "p");
    EXPECT_TRUE(policy.ok()) << policy.status();
    EXPECT_EQ(policy->AllSignals().size(), 2u);
    return policy->signals[0].reference;
  };
  EXPECT_DOUBLE_EQ(reference(""), 200);
  EXPECT_EQ(reference(", reference: 100"), 100);
}

TEST(ParsePolicy, WindowsBelowThreeBitsMustBeMeant) {
  const std::string window = "windows:\n  - name: low\n    floor_bits: 2.5\n    ceiling_bits: 4\n";
  const auto refused = ParsePolicy(window, "p");
  EXPECT_EQ(refused.status().message(),
            "p:3: windows[0].floor_bits: 2.5 is below 3, where quality falls off a cliff; say "
            "allow_below_3_bits: true if it is meant");
  EXPECT_FALSE(ParsePolicy(window + "    allow_below_3_bits: false\n", "p").ok());
  const auto meant = ParsePolicy(window + "    allow_below_3_bits: true\n", "p");
  ASSERT_TRUE(meant.ok()) << meant.status();
  EXPECT_EQ(meant->windows[0].floor_bits, 2.5f);
}

struct BadCase {
  std::string yaml;
  std::string message;
};

TEST(ParsePolicy, BadPoliciesAreRefusedWithFileLineAndReason) {
  const std::string window = "windows: [{name: all, floor_bits: 4, ceiling_bits: 4}]\n";
  const auto scheduled = [](const std::string& fields) {
    return "windows:\n- {name: peak, " + fields + "}\n- {name: rest}\n";
  };
  const auto signal = [&](const std::string& fields) {
    return window + "signals:\n  - {" + fields + "}\n";
  };
  const BadCase cases[] = {
      {"", "p:1: is empty"},
      {"# nothing", "p:1: is empty"},
      {"a: [1", "p:1: end of sequence flow not found"},
      {"windows: [{name: all}]\n\tslo: 1", "p:2: end of map not found"},
      {"hello", "p:1: must be a map"},
      {"[1, 2]", "p:1: must be a map"},
      {"model_class: x", "p:1: windows: is missing"},
      {"windows:", "p:1: windows: is missing"},
      {"windows: []", "p:1: windows: has 0 entries, needs 1 to 64"},
      {"windows: {a: 1}", "p:1: windows: must be a list"},
      {"windows: [all]", "p:1: windows[0]: must be a map"},
      {window + "window: 1\n", "p:2: unknown key \"window\", the known ones are model_class, slo"},
      {"windows:\n  - name: all\n    floor_bit: 3\n", "p:3: windows[0]: unknown key \"floor_bit\""},
      {window + "slo:\n  ttft_ms: 1\n", "p:3: slo: unknown key \"ttft_ms\""},
      {window + "classes:\n  standard:\n    bits: 1\n", "p:4: classes.standard: unknown key"},
      {signal("kind: kv_usage, reference: 0.5, unit: x"), "p:3: signals[0]: unknown key \"unit\""},
      {window + window, "p:2: the key \"windows\" is there twice"},
      {"windows:\n- {name: a, name: b}", "p:2: the key \"name\" is there twice"},
      {"windows: [{floor_bits: 4}]", "p:1: windows[0].name: is missing"},
      {"windows: [{name: [a]}]", "p:1: windows[0].name: must be a single value"},
      {"windows: [{name: 'a b'}]", "p:1: windows[0].name: a name is"},
      {"windows: [{name: ''}]", "p:1: windows[0].name: a name is"},
      {scheduled("cron: '0 9 * * *', duration: 1h, time_zone: UTC") + "- {name: rest}\n",
       "p:3: windows[1]: has no schedule, so the windows after it never match"},
      {"windows:\n- {name: a, cron: '0 9 * * *', duration: 1h, time_zone: UTC}\n",
       "p:2: windows[0].cron: the last window must have no schedule"},
      {"windows:\n- {name: a, cron: '0 9 * * *', duration: 1h, time_zone: UTC}\n- {name: a}\n",
       "p:3: windows[1].name: the name a is taken"},
      {scheduled("cron: '0 9 * * *', duration: 1h"), "p:2: windows[0].time_zone: is missing"},
      {scheduled("cron: '0 9 * * *', time_zone: UTC"), "p:2: windows[0].duration: is missing"},
      {scheduled("duration: 1h, time_zone: UTC"), "p:2: windows[0].cron: is missing"},
      {scheduled("cron: '0 9 * * *', duration: 1h, time_zone: Mars/Olympus"),
       "p:2: windows[0].time_zone: \"Mars/Olympus\" is not in the time zone database"},
      {scheduled("cron: '0 25 * * *', duration: 1h, time_zone: UTC"),
       "p:2: windows[0].cron: hour \"25\": 25 is out of range [0, 23]"},
      {scheduled("cron: '0 0 30 2 *', duration: 1h, time_zone: UTC"),
       "p:2: windows[0].cron: never happens"},
      {scheduled("cron: '0 9 * * *', duration: 9, time_zone: UTC"),
       "p:2: windows[0].duration: must be a duration such as"},
      {scheduled("cron: '0 9 * * *', duration: -1h, time_zone: UTC"),
       "p:2: windows[0].duration: must be a duration such as"},
      {scheduled("cron: '0 9 * * *', duration: 0s, time_zone: UTC"),
       "p:2: windows[0].duration: 0 s is out of range [60 s, "},
      {scheduled("cron: '0 9 * * *', duration: 1000h, time_zone: UTC"),
       "p:2: windows[0].duration: 3.6e+06 s is out of range"},
      {"windows: [{name: a, floor_bits: 1.9}]", "p:1: windows[0].floor_bits: 1.9 is out of range"},
      {"windows: [{name: a, ceiling_bits: 9}]", "p:1: windows[0].ceiling_bits: 9 is out of range"},
      {"windows: [{name: a, floor_bits: .nan}]", "floor_bits: must be a number, not \".nan\""},
      {"windows: [{name: a, floor_bits: nan}]", "floor_bits: must be a number, not \"nan\""},
      {"windows: [{name: a, floor_bits: 1e999}]", "floor_bits: must be a number"},
      {"windows: [{name: a, floor_bits: '4'}]", "floor_bits: must be a number"},
      {"windows: [{name: a, floor_bits: 4 bits}]", "floor_bits: must be a number, not \"4 bits\""},
      {"windows: [{name: a, floor_bits: 6, ceiling_bits: 5}]",
       "p:1: windows[0].floor_bits: 6 is above ceiling_bits, which is 5"},
      {"windows: [{name: a, allow_below_3_bits: yes}]",
       "p:1: windows[0].allow_below_3_bits: must be true or false"},
      {"windows: [{name: a}]\nsignals: []", "p:1: windows[0].floor_bits: is below ceiling_bits"},
      {window + "classes: {premium: {floor_bits: 4}}", "p:2: classes: needs the class standard"},
      {window + "classes: [standard]", "p:2: classes: must be a map of classes"},
      {window + "classes:\n  standard: 4", "p:3: classes.standard: must be a map"},
      {window + "classes: {standard: {floor_bits: 8.5}}", "p:2: classes.standard.floor_bits: 8.5"},
      {window + "slo: {itl_p95_ms: 0}", "p:2: slo.itl_p95_ms: 0 is out of range (0, "},
      {window + "slo: {ttft_p95_ms: -5}", "p:2: slo.ttft_p95_ms: -5 is out of range"},
      {window + "max_request_bits: 9", "p:2: max_request_bits: 9 is out of range [2, 8]"},
      {window + "model_class: ''", "p:2: model_class: a name is"},
      {signal("reference: 1"), "p:3: signals[0].kind: is missing"},
      {signal("kind: gpu, reference: 1"), "p:3: signals[0].kind: must be one of queue_depth, "},
      {signal("kind: queue_depth"), "p:3: signals[0].reference: is missing"},
      {signal("kind: ttft_p95"), "p:3: signals[0].reference: is missing"},
      {signal("kind: queue_depth, reference: 0"), "p:3: signals[0].reference: 0 is out of range"},
      {signal("kind: kv_usage, reference: 85"), "signals[0].reference: 85 is out of range (0, 1]"},
      {signal("kind: kv_usage, reference: 0.5, query: up"),
       "p:3: signals[0].query: is for signals of kind promql only"},
      {signal("kind: promql, reference: 1"), "p:3: signals[0].query: is missing"},
      {signal("kind: promql, reference: 1, query: ''"), "p:3: signals[0].query: has 0 bytes"},
      {signal("kind: promql, reference: 1, query: up, timeout: 1m"),
       "signals[0].timeout: 60 s is out of range [0.01 s, 10 s]"},
      {signal("kind: promql, reference: 1, query: up, max_age: 2h"),
       "signals[0].max_age: 7200 s is out of range [1 s, 3600 s]"},
      {signal("kind: promql, reference: 1, query: up, timeout: 5s, max_age: 2s"),
       "signals[0].max_age: is shorter than timeout"},
      {signal("kind: promql, reference: 1, query: up, default_pressure: 5"),
       "signals[0].default_pressure: 5 is out of range [0, 4]"},
      {signal("kind: promql, reference: 1, query: up}\n  - {kind: promql, reference: 1, query: up"),
       "p:4: signals[1].name: the name promql is taken"},
      {"a: &x 1\nb: *x", "p:1: anchors are not allowed"},
      {"windows: !!set {a}", "p:1: tags are not allowed"},
      {"<<: {a: 1}", "p:1: unknown key \"<<\""},
      {"? [a]\n: 1", "p:1: a key must be a word"},
      {window + "---\n" + window, "p:3: a second document is not allowed"},
  };
  for (const BadCase& bad : cases) {
    const auto policy = ParsePolicy(bad.yaml, "p");
    ASSERT_FALSE(policy.ok()) << bad.yaml;
    EXPECT_EQ(policy.status().code(), absl::StatusCode::kInvalidArgument) << bad.yaml;
    const std::string message(policy.status().message());
    EXPECT_THAT(message, HasSubstr(bad.message)) << bad.yaml;
    EXPECT_THAT(message, StartsWith("p:")) << bad.yaml;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
}

TEST(ParsePolicy, HostileFilesAreBounded) {
  std::string bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n";
  for (char c = 'b'; c < 'k'; ++c) {
    absl::StrAppend(&bomb, std::string(1, c), ": &", std::string(1, c), " [");
    for (int i = 0; i < 9; ++i) absl::StrAppend(&bomb, "*", std::string(1, c - 1), ", ");
    bomb += "]\n";
  }
  std::string entries = "windows:\n", keys;
  for (int i = 0; i < 8000; ++i) {
    absl::StrAppend(&entries, "- {name: w", i, "}\n");
    absl::StrAppend(&keys, "k", i, ": ", i, "\n");
  }
  // Refused by the limit that bounds the work, whatever the machine takes for it.
  const std::pair<std::string, const char*> cases[] = {
      {bomb, "anchors are not allowed"},
      {entries, "more than 4096 keys and values"},
      {keys, "more than 4096 keys and values"},
      {std::string(300 << 10, ' '), "has 307200 bytes, at most 262144 are read"},
      {std::string(200 << 10, '['), "p:1: bad file"},
      {std::string(200 << 10, '{'), "p:1: bad file"},
      {std::string(100 << 10, '\n') + "a: b", "p:102401: unknown key"},
      {absl::StrReplaceAll(std::string(1000, 'x'), {{"x", "- "}}), "p:1: bad file"},
      {absl::StrReplaceAll(std::string(500, 'x'), {{"x", "? "}}), "p:1: bad file"},
      {absl::StrCat("windows: [{name: ", std::string(200 << 10, 'n'), "}]"),
       "windows[0].name: a name is 1 to 64"},
      {std::string("windows\0: 1", 11), "p:1: "},
      {"\xff\xfe\x00w", "p:1: is empty"},
      {"windows: [{name: \"\xc3\x28\"}]", "windows[0].name: a name is"},
      {"%YAML 9.9\n---\na: b", "p:1: "},
      {"%TAG ! !x\n---\n!y a", "p:3: tags are not allowed"},
  };
  for (const auto& [text, message] : cases) {
    const auto policy = ParsePolicy(text, "p");
    ASSERT_FALSE(policy.ok()) << text.substr(0, 40);
    EXPECT_THAT(std::string(policy.status().message()), HasSubstr(message)) << text.substr(0, 40);
    EXPECT_LT(policy.status().message().size(), 500u) << policy.status();
  }
}

TEST(ParsePolicy, MutatedFilesParseOrAreRefused) {
  std::mt19937 rng(11);
  const std::string example = kExample;
  const std::string alphabet = "{}[]:,-?&*!|>'\"%@`# \n\t0129abz.~\\\x80\xff";
  int accepted = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string text = example;
    for (int edits = 1 + rng() % 4; edits > 0; --edits) {
      const size_t at = rng() % text.size();
      const size_t length = std::min<size_t>(rng() % 20, text.size() - at);
      switch (rng() % 4) {
        case 0:
          text[at] = alphabet[rng() % alphabet.size()];
          break;
        case 1:
          text.insert(at, 1, alphabet[rng() % alphabet.size()]);
          break;
        case 2:
          text.erase(at, length);
          break;
        default:
          text.insert(at, text.substr(rng() % text.size(), length));
      }
      if (text.empty()) text = " ";
    }
    const auto policy = ParsePolicy(text, "p");
    if (policy.ok()) {
      ++accepted;
      EXPECT_TRUE(CheckPolicy(*policy).ok()) << text;
    } else {
      EXPECT_THAT(std::string(policy.status().message()), StartsWith("p:"));
    }
  }
  EXPECT_GT(accepted, 100);
  EXPECT_LT(accepted, 2900);
}

template <typename T>
T Pick(std::mt19937& rng, const std::vector<T>& from) {
  return from[rng() % from.size()];
}

PolicySignal RandomSignal(std::mt19937& rng, int index) {
  PolicySignal signal;
  signal.kind = static_cast<SignalKind>(rng() % 6);
  signal.name = absl::StrCat("s", index);
  signal.reference = std::ldexp(1.0 + rng() * 1e-10, -static_cast<int>(rng() % 9) - 1);
  if (signal.kind != SignalKind::kPromql) return signal;
  signal.query = Pick<std::string>(rng, {"up", "rate(x{a=\"b\\\\\"}[1m])", "a # b: 'c'", "\tx\n/ y",
                                         "größe", "{__name__=~\".\"}"});
  signal.timeout = std::chrono::milliseconds(10 + rng() % 990);
  signal.max_age = std::chrono::seconds(1 + rng() % 1000);
  signal.default_pressure = (rng() % 400) * 0.01;
  return signal;
}

Policy RandomPolicy(std::mt19937& rng) {
  const auto bits = [&] { return 3 + 5 * static_cast<float>(rng() % 1000) / 1000; };
  Policy policy = FixedPolicy(8);
  policy.model_class = Pick<std::string>(rng, {"default", "true", "8", "1e5", "llama-3.1"});
  if (rng() % 2) policy.slo.ttft_p95_ms = 1 + rng() % 1000 * 0.1;
  if (rng() % 2) policy.slo.itl_p95_ms = 1 + rng() % 1000 * 0.1;
  if (rng() % 2) policy.max_request_bits = bits();
  policy.classes.clear();
  const int num_classes = 1 + rng() % 3;
  for (int i = 0; i < num_classes; ++i) {
    policy.classes.push_back({.name = i == 0 ? kDefaultPriorityClass : absl::StrCat("c", i),
                              .priority = num_classes - 1 - i,
                              .floor_bits = bits()});
  }
  policy.windows.clear();
  const int num_windows = 1 + rng() % 4;
  for (int i = 0; i < num_windows; ++i) {
    PolicyWindow window{
        .name = Pick<std::string>(rng, {"null", "off-peak", "1"}) + "_" + std::to_string(i),
        .floor_bits = bits()};
    window.ceiling_bits = std::max(window.floor_bits, bits());
    window.allow_below_3_bits = rng() % 2;
    if (window.allow_below_3_bits) window.floor_bits -= 1;
    if (i + 1 < num_windows) {
      const auto zone = LoadIanaZone(Pick<std::string>(rng, {"UTC", "Asia/Tokyo", "Etc/GMT-3"}));
      window.schedule = *Schedule::Create(
          Pick<std::string>(rng, {"0 9 * * 1-5", "*/5 * 1,2 jan-mar *", "59 23 * * SUN"}),
          absl::Seconds(60 + rng() % 100000), *zone);
    }
    policy.windows.push_back(std::move(window));
  }
  const int num_signals = 1 + rng() % 5;
  for (int i = 0; i < num_signals; ++i) policy.signals.push_back(RandomSignal(rng, i));
  return policy;
}

TEST(FormatPolicy, ParsesBackToTheSamePolicy) {
  std::mt19937 rng(5);
  for (int round = 0; round < 500; ++round) {
    const Policy policy = RandomPolicy(rng);
    ASSERT_TRUE(CheckPolicy(policy).ok()) << CheckPolicy(policy);
    const std::string yaml = FormatPolicy(policy);
    const auto parsed = ParsePolicy(yaml, "p");
    ASSERT_TRUE(parsed.ok()) << parsed.status() << "\n" << yaml;
    // The text holds every field, so equal texts of different policies would be a bug of these.
    EXPECT_EQ(FormatPolicy(*parsed), yaml);
    ASSERT_EQ(parsed->windows.size(), policy.windows.size());
    for (size_t i = 0; i < policy.windows.size(); ++i) {
      const PolicyWindow &a = parsed->windows[i], &b = policy.windows[i];
      EXPECT_EQ(a.name, b.name);
      EXPECT_EQ(a.floor_bits, b.floor_bits);
      EXPECT_EQ(a.ceiling_bits, b.ceiling_bits);
      EXPECT_EQ(a.schedule.has_value(), b.schedule.has_value());
      if (!a.schedule || !b.schedule) continue;
      EXPECT_EQ(a.schedule->duration(), b.schedule->duration());
      EXPECT_EQ(a.schedule->cron_text(), b.schedule->cron_text());
    }
    ASSERT_EQ(parsed->signals.size(), policy.signals.size());
    for (size_t i = 0; i < policy.signals.size(); ++i) {
      EXPECT_EQ(parsed->signals[i].kind, policy.signals[i].kind);
      EXPECT_EQ(parsed->signals[i].query, policy.signals[i].query);
      EXPECT_EQ(parsed->signals[i].reference, policy.signals[i].reference);
      EXPECT_EQ(parsed->signals[i].max_age, policy.signals[i].max_age);
      EXPECT_EQ(parsed->signals[i].default_pressure, policy.signals[i].default_pressure);
    }
    ASSERT_EQ(parsed->classes.size(), policy.classes.size());
    for (size_t i = 0; i < policy.classes.size(); ++i) {
      EXPECT_EQ(parsed->classes[i].name, policy.classes[i].name);
      EXPECT_EQ(parsed->classes[i].floor_bits, policy.classes[i].floor_bits);
      EXPECT_EQ(parsed->classes[i].priority, policy.classes[i].priority);
    }
    EXPECT_EQ(parsed->slo.ttft_p95_ms, policy.slo.ttft_p95_ms);
    EXPECT_EQ(parsed->max_request_bits, policy.max_request_bits);
  }
  for (const float bits : {2.0f, 2.7f, 4.0f, 8.0f}) {
    EXPECT_TRUE(ParsePolicy(FormatPolicy(FixedPolicy(bits)), "p").ok());
  }
}

}  // namespace
}  // namespace mobi
