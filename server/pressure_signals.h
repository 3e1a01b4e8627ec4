// The policy's signals as numbers: what the engine's counters, the latency histograms and
// Prometheus say about load now. Remembers the recent past, so one object belongs to one control
// loop.
#ifndef MOBI_SERVER_PRESSURE_SIGNALS_H_
#define MOBI_SERVER_PRESSURE_SIGNALS_H_

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "engine/base/clock.h"
#include "engine/engine.h"
#include "server/latency_histogram.h"
#include "server/latency_window.h"
#include "server/policy.h"
#include "server/pressure.h"

namespace mobi {

struct LoadSample {
  EngineStats stats;
  LatencyCounts time_to_first_token = {};
  LatencyCounts inter_token_latency = {};
};

struct SignalReaderOptions {
  // Percentiles for control are of the last `least` to `most`, as many as hold `enough`
  // observations: old ones would keep pressure up after its cause has gone.
  Duration least = std::chrono::seconds(1);
  Duration most = std::chrono::seconds(10);
  uint64_t enough_requests = 10;
  uint64_t enough_tokens = 40;
};

class SignalReader {
 public:
  explicit SignalReader(const SignalReaderOptions& options = {}) : options_(options) {}

  // Call with every sample, in order.
  void Add(TimePoint now, const LoadSample& sample);

  // `answers`: what Prometheus says, by signal; one that is not there is stale. A latency signal
  // without recent observations is 0: nobody waits.
  std::vector<SignalReading> Read(absl::Span<const PolicySignal> signals,
                                  const std::map<std::string, double>& answers) const;

  // Tokens in a step, of the steps since the last sample that had any.
  double step_tokens() const { return step_tokens_; }
  // 95th percentiles of the last minute for people; 0 without observations.
  double ttft_p95_ms() const;
  double itl_p95_ms() const;

 private:
  double Value(SignalKind kind) const;

  const SignalReaderOptions options_;
  EngineStats stats_;
  LatencyWindow time_to_first_token_;
  LatencyWindow inter_token_latency_;
  double step_tokens_ = 0;
};

}  // namespace mobi

#endif  // MOBI_SERVER_PRESSURE_SIGNALS_H_
