#include "server/pressure_signals.h"

#include <utility>

namespace mobi {

void SignalReader::Add(TimePoint now, const LoadSample& sample) {
  time_to_first_token_.Add(now, sample.time_to_first_token);
  inter_token_latency_.Add(now, sample.inter_token_latency);
  // A new engine counts from zero.
  if (sample.stats.steps < stats_.steps) stats_ = EngineStats();
  if (const uint64_t steps = sample.stats.steps - stats_.steps; steps > 0) {
    step_tokens_ = static_cast<double>(sample.stats.effective_tokens - stats_.effective_tokens) /
                   static_cast<double>(steps);
  }
  stats_ = sample.stats;
}

std::vector<SignalReading> SignalReader::Read(absl::Span<const PolicySignal> signals,
                                              const std::map<std::string, double>& answers) const {
  std::vector<SignalReading> readings;
  for (const PolicySignal& signal : signals) {
    SignalReading reading{.name = signal.name,
                          .reference = signal.reference,
                          .default_pressure = signal.default_pressure};
    if (signal.kind != SignalKind::kPromql) {
      reading.value = Value(signal.kind);
    } else if (const auto answer = answers.find(signal.name); answer != answers.end()) {
      reading.value = answer->second;
    } else {
      reading.stale = true;
    }
    readings.push_back(std::move(reading));
  }
  return readings;
}

double SignalReader::ttft_p95_ms() const {
  return 1e3 * time_to_first_token_.QuantileSeconds(0.95, std::chrono::minutes(1)).value_or(0);
}

double SignalReader::itl_p95_ms() const {
  return 1e3 * inter_token_latency_.QuantileSeconds(0.95, std::chrono::minutes(1)).value_or(0);
}

double SignalReader::Value(SignalKind kind) const {
  const auto fresh_ms = [this](const LatencyWindow& window, uint64_t enough) {
    return 1e3 *
           window.FreshQuantileSeconds(0.95, enough, options_.least, options_.most).value_or(0);
  };
  switch (kind) {
    case SignalKind::kQueueDepth:
      return stats_.waiting_requests;
    case SignalKind::kQueuedPromptTokens:
      return static_cast<double>(stats_.waiting_tokens);
    case SignalKind::kQueueWait:
      return 1e3 * stats_.expected_wait_seconds;
    case SignalKind::kKvUsage:
      if (stats_.num_kv_blocks == 0) return 0;
      return 1 - static_cast<double>(stats_.free_kv_blocks) / stats_.num_kv_blocks;
    case SignalKind::kTtftP95:
      return fresh_ms(time_to_first_token_, options_.enough_requests);
    case SignalKind::kItlP95:
      return fresh_ms(inter_token_latency_, options_.enough_tokens);
    case SignalKind::kPromql:
      break;
  }
  return 0;
}

}  // namespace mobi
