#include "server/policy_yaml.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "engine/base/status_macros.h"
#include "server/policy_document.h"

namespace mobi {
namespace {

constexpr SignalKind kSignalKinds[] = {SignalKind::kQueueDepth, SignalKind::kQueuedPromptTokens,
                                       SignalKind::kQueueWait,  SignalKind::kKvUsage,
                                       SignalKind::kTtftP95,    SignalKind::kItlP95,
                                       SignalKind::kPromql};

// What policies that name no signals react to.
std::vector<PolicySignal> DefaultSignals() {
  return {{.kind = SignalKind::kQueueDepth, .name = "queue_depth", .reference = 8},
          {.kind = SignalKind::kKvUsage, .name = "kv_usage", .reference = 0.9}};
}

absl::StatusOr<LatencyObjectives> ParseObjectives(const YamlMap& root, const std::string& file) {
  LatencyObjectives slo;
  const YamlNode* node = root.Find("slo");
  if (node == nullptr) return slo;
  MOBI_ASSIGN_OR_RETURN(YamlMap map,
                        YamlMap::Of(*node, file, "slo", {"ttft_p95_ms", "itl_p95_ms"}));
  if (map.Has("ttft_p95_ms")) {
    MOBI_ASSIGN_OR_RETURN(slo.ttft_p95_ms, map.Number("ttft_p95_ms"));
  }
  if (map.Has("itl_p95_ms")) {
    MOBI_ASSIGN_OR_RETURN(slo.itl_p95_ms, map.Number("itl_p95_ms"));
  }
  return slo;
}

absl::StatusOr<std::vector<PriorityClass>> ParseClasses(const YamlMap& root,
                                                        const std::string& file) {
  const YamlNode* node = root.Find("classes");
  if (node == nullptr) return FixedPolicy(kHighestBits).classes;
  if (node->kind != YamlNode::Kind::kMap) return root.Error("classes", "must be a map of classes");
  std::vector<PriorityClass> classes;
  int priority = static_cast<int>(node->fields.size());
  for (const auto& [name, value] : node->fields) {
    PriorityClass priority_class{.name = name, .priority = --priority};
    if (value.kind != YamlNode::Kind::kNull) {
      MOBI_ASSIGN_OR_RETURN(YamlMap map,
                            YamlMap::Of(value, file, "classes." + name, {"floor_bits"}));
      MOBI_ASSIGN_OR_RETURN(priority_class.floor_bits, map.NumberOr("floor_bits", kLowestBits));
    }
    classes.push_back(std::move(priority_class));
  }
  return classes;
}

absl::StatusOr<Schedule> ParseSchedule(const YamlMap& map) {
  MOBI_ASSIGN_OR_RETURN(const std::string cron, map.String("cron"));
  MOBI_ASSIGN_OR_RETURN(const Duration duration, map.DurationOf("duration"));
  MOBI_ASSIGN_OR_RETURN(const std::string zone_name, map.String("time_zone"));
  const auto zone = LoadIanaZone(zone_name);
  if (!zone.ok()) return map.Error("time_zone", zone.status().message());
  auto schedule = Schedule::Create(cron, absl::FromChrono(duration), *zone);
  if (!schedule.ok()) return map.Error("cron", schedule.status().message());
  return schedule;
}

absl::StatusOr<PolicyWindow> ParseWindow(const YamlNode& node, const std::string& file,
                                         const std::string& path) {
  MOBI_ASSIGN_OR_RETURN(YamlMap map,
                        YamlMap::Of(node, file, path,
                                    {"name", "cron", "duration", "time_zone", "floor_bits",
                                     "ceiling_bits", "allow_below_3_bits"}));
  PolicyWindow window;
  MOBI_ASSIGN_OR_RETURN(window.name, map.String("name"));
  MOBI_ASSIGN_OR_RETURN(window.floor_bits, map.NumberOr("floor_bits", kQualityCliffBits));
  MOBI_ASSIGN_OR_RETURN(window.ceiling_bits, map.NumberOr("ceiling_bits", kHighestBits));
  MOBI_ASSIGN_OR_RETURN(window.allow_below_3_bits, map.BoolOr("allow_below_3_bits", false));
  if (map.Has("cron") || map.Has("duration") || map.Has("time_zone")) {
    MOBI_ASSIGN_OR_RETURN(window.schedule, ParseSchedule(map));
  }
  return window;
}

absl::StatusOr<SignalKind> ParseKind(const YamlMap& map) {
  MOBI_ASSIGN_OR_RETURN(const std::string text, map.String("kind"));
  std::string known;
  for (const SignalKind kind : kSignalKinds) {
    if (text == SignalKindName(kind)) return kind;
    absl::StrAppend(&known, known.empty() ? "" : ", ", SignalKindName(kind));
  }
  return map.Error("kind", "must be one of " + known);
}

absl::StatusOr<PolicySignal> ParseSignal(const YamlNode& node, const std::string& file,
                                         const std::string& path, const LatencyObjectives& slo) {
  MOBI_ASSIGN_OR_RETURN(YamlMap map, YamlMap::Of(node, file, path,
                                                 {"kind", "name", "reference", "query", "timeout",
                                                  "max_age", "default_pressure"}));
  PolicySignal signal;
  MOBI_ASSIGN_OR_RETURN(signal.kind, ParseKind(map));
  MOBI_ASSIGN_OR_RETURN(signal.name, map.StringOr("name", SignalKindName(signal.kind)));
  const std::optional<double> reference = ReferenceOf(signal.kind, slo);
  if (map.Has("reference") || !reference) {
    MOBI_ASSIGN_OR_RETURN(signal.reference, map.Number("reference"));
  } else {
    signal.reference = *reference;
  }
  if (signal.kind != SignalKind::kPromql) {
    for (const char* key : {"query", "timeout", "max_age", "default_pressure"}) {
      if (map.Has(key)) return map.Error(key, "is for signals of kind promql only");
    }
    return signal;
  }
  MOBI_ASSIGN_OR_RETURN(signal.query, map.String("query"));
  MOBI_ASSIGN_OR_RETURN(signal.timeout, map.DurationOr("timeout", signal.timeout));
  MOBI_ASSIGN_OR_RETURN(signal.max_age, map.DurationOr("max_age", signal.max_age));
  MOBI_ASSIGN_OR_RETURN(signal.default_pressure,
                        map.NumberOr("default_pressure", signal.default_pressure));
  return signal;
}

absl::StatusOr<Policy> ReadPolicy(const YamlNode& document, const std::string& file) {
  MOBI_ASSIGN_OR_RETURN(YamlMap root, YamlMap::Of(document, file, "",
                                                  {"model_class", "slo", "classes", "windows",
                                                   "signals", "max_request_bits"}));
  Policy policy;
  MOBI_ASSIGN_OR_RETURN(policy.model_class, root.StringOr("model_class", policy.model_class));
  MOBI_ASSIGN_OR_RETURN(policy.slo, ParseObjectives(root, file));
  MOBI_ASSIGN_OR_RETURN(policy.classes, ParseClasses(root, file));
  MOBI_ASSIGN_OR_RETURN(policy.max_request_bits, root.NumberOr("max_request_bits", kHighestBits));
  MOBI_ASSIGN_OR_RETURN(const auto* windows, root.List("windows"));
  for (size_t i = 0; i < windows->size(); ++i) {
    MOBI_ASSIGN_OR_RETURN(PolicyWindow window,
                          ParseWindow((*windows)[i], file, absl::StrFormat("windows[%d]", i)));
    policy.windows.push_back(std::move(window));
  }
  if (!root.Has("signals")) {
    policy.signals = DefaultSignals();
    return policy;
  }
  MOBI_ASSIGN_OR_RETURN(const auto* signals, root.List("signals"));
  for (size_t i = 0; i < signals->size(); ++i) {
    MOBI_ASSIGN_OR_RETURN(
        PolicySignal signal,
        ParseSignal((*signals)[i], file, absl::StrFormat("signals[%d]", i), policy.slo));
    policy.signals.push_back(std::move(signal));
  }
  return policy;
}

// A double-quoted YAML scalar.
std::string Quoted(absl::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      absl::StrAppend(&quoted, "\\", std::string(1, c));
    } else if (static_cast<unsigned char>(c) < 0x20) {
      absl::StrAppendFormat(&quoted, "\\x%02x", static_cast<int>(c));
    } else {
      quoted.push_back(c);
    }
  }
  return quoted + "\"";
}

// The shortest decimal that reads as the same number.
template <typename Number>
std::string Decimal(Number value) {
  std::string text;
  for (int digits = 6; digits <= 17; ++digits) {
    text = absl::StrFormat("%.*g", digits, value);
    double parsed = 0;
    if (absl::SimpleAtod(text, &parsed) && static_cast<Number>(parsed) == value) break;
  }
  return text;
}

std::string FormatSignal(const PolicySignal& signal) {
  std::string text = absl::StrCat("{kind: ", SignalKindName(signal.kind), ", name: \"", signal.name,
                                  "\", reference: ", Decimal(signal.reference));
  if (signal.kind == SignalKind::kPromql) {
    absl::StrAppend(&text, ", query: ", Quoted(signal.query),
                    ", timeout: ", FormatDuration(signal.timeout),
                    ", max_age: ", FormatDuration(signal.max_age),
                    ", default_pressure: ", Decimal(signal.default_pressure));
  }
  return text + "}";
}

std::string FormatWindow(const PolicyWindow& window) {
  std::string text = absl::StrCat("{name: \"", window.name, "\"");
  if (window.schedule) {
    absl::StrAppend(&text, ", cron: \"", window.schedule->cron_text(),
                    "\", duration: ", absl::FormatDuration(window.schedule->duration()),
                    ", time_zone: ", window.schedule->zone().name());
  }
  absl::StrAppend(&text, ", floor_bits: ", Decimal(window.floor_bits),
                  ", ceiling_bits: ", Decimal(window.ceiling_bits));
  if (window.allow_below_3_bits) absl::StrAppend(&text, ", allow_below_3_bits: true");
  return text + "}";
}

}  // namespace

absl::StatusOr<Policy> ParsePolicy(const std::string& yaml, const std::string& file) {
  MOBI_ASSIGN_OR_RETURN(const YamlNode document,
                        ParseYaml(yaml, file, {.max_bytes = kMaxPolicyBytes}));
  MOBI_ASSIGN_OR_RETURN(Policy policy, ReadPolicy(document, file));
  if (const absl::Status status = CheckPolicy(policy); !status.ok()) {
    const absl::string_view message = status.message();
    return absl::InvalidArgumentError(absl::StrCat(
        file, ":", LineOf(document, message.substr(0, message.find(':'))), ": ", message));
  }
  return policy;
}

std::string FormatPolicy(const Policy& policy) {
  std::string yaml = absl::StrCat("model_class: \"", policy.model_class, "\"\n");
  if (policy.slo.ttft_p95_ms || policy.slo.itl_p95_ms) {
    absl::StrAppend(&yaml, "slo:\n");
    if (policy.slo.ttft_p95_ms) {
      absl::StrAppend(&yaml, "  ttft_p95_ms: ", Decimal(*policy.slo.ttft_p95_ms), "\n");
    }
    if (policy.slo.itl_p95_ms) {
      absl::StrAppend(&yaml, "  itl_p95_ms: ", Decimal(*policy.slo.itl_p95_ms), "\n");
    }
  }
  absl::StrAppend(&yaml, "classes:  # highest priority first\n");
  for (const PriorityClass& priority_class : policy.classes) {
    absl::StrAppend(&yaml, "  \"", priority_class.name,
                    "\": {floor_bits: ", Decimal(priority_class.floor_bits), "}\n");
  }
  absl::StrAppend(&yaml, "windows:  # first match wins\n");
  for (const PolicyWindow& window : policy.windows) {
    absl::StrAppend(&yaml, "  - ", FormatWindow(window), "\n");
  }
  absl::StrAppend(&yaml, policy.signals.empty() ? "signals: []\n" : "signals:\n");
  for (const PolicySignal& signal : policy.signals) {
    absl::StrAppend(&yaml, "  - ", FormatSignal(signal), "\n");
  }
  absl::StrAppend(&yaml, "max_request_bits: ", Decimal(policy.max_request_bits), "\n");
  return yaml;
}

}  // namespace mobi
