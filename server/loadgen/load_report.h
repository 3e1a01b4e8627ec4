// What a load test found: one Outcome a request, and the figures drawn from them. Latencies count
// from the moment a request was meant to be sent, so a generator or a server that falls behind
// shows in them (no coordinated omission). Pure functions.
#ifndef MOBI_SERVER_LOADGEN_LOAD_REPORT_H_
#define MOBI_SERVER_LOADGEN_LOAD_REPORT_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/base/clock.h"
#include "nlohmann/json.hpp"
#include "server/loadgen/arrivals.h"

namespace mobi {

struct Outcome {
  Arrival arrival;
  std::string priority_class;
  absl::Status status;
  Duration lateness{};  // sent so much after it was meant to be
  Duration ttft{};      // to the first message with tokens; zero without one
  Duration end{};       // to the status
  // Between messages with tokens. A message may bring several tokens when the reader is slow.
  std::vector<float> gaps_ms;
  int tokens = 0;
  std::vector<int32_t> token_ids;
  // From the Summary; only of requests that ended well.
  int prompt_tokens = 0;
  int cached_tokens = 0;
  double effective_bits = 0;
  double queue_ms = 0;

  // Mean time per token after the first.
  double MeanGapMs() const;
};

// Zero: no objective.
struct Slo {
  Duration ttft{};
  Duration inter_token{};  // the request's mean
  Duration end_to_end{};
};
// Ended well and within every objective.
bool Meets(const Outcome& outcome, const Slo& slo);

struct Percentiles {
  int64_t count = 0;
  double mean = 0, p50 = 0, p90 = 0, p95 = 0, p99 = 0, max = 0;
};
// Interpolated between ranks as numpy does by default. Zeros without values.
Percentiles PercentilesOf(std::vector<double> values);

// A stretch of the test. Latencies, statuses and attainment are of the requests that were to be
// sent in it; rates count what ended in it, whenever that was sent.
struct LoadReport {
  std::string name;
  double seconds = 0;
  int requests = 0;
  std::map<std::string, int> by_status;
  Percentiles ttft_ms, inter_token_ms, time_per_token_ms, end_to_end_ms, queue_ms;
  Percentiles refusal_ms;  // to a status other than OK, of requests that got no token
  Percentiles lateness_ms;
  double slo_attainment = 0;  // of all requests, refused ones included
  double offered_rps = 0;
  double completed_rps = 0;
  double goodput_rps = 0;  // ended within the SLO
  double goodput_tokens_per_second = 0;
  double tokens_per_second = 0;
  double prompt_tokens_per_second = 0;
  double cached_fraction = 0;                // of prompt tokens
  double mean_effective_bits = 0;            // over tokens computed, prompt and completion
  std::optional<double> mean_loaded_bits{};  // over time with work; needs the admin port
};

// [begin, end) of a report.
struct Stretch {
  std::string name;
  Duration begin{};
  Duration end{};
};

// What the server said of itself now and then.
struct BitsSample {
  Duration at{};
  double loaded_bits = 0;
  bool working = false;
};

LoadReport MakeReport(absl::Span<const Outcome> outcomes, absl::Span<const BitsSample> samples,
                      const Stretch& stretch, const Slo& slo);

nlohmann::json ToJson(const LoadReport& report);
std::string ToTable(const LoadReport& report);
// A header and a line per request.
std::string ToCsv(absl::Span<const Outcome> outcomes, const Slo& slo);

}  // namespace mobi

#endif  // MOBI_SERVER_LOADGEN_LOAD_REPORT_H_
