// Arrivals recorded from production, as the Azure LLM inference traces publish them: a CSV with the
// columns TIMESTAMP, ContextTokens and GeneratedTokens. Replays can be compressed in time and
// scaled in tokens, so that a small machine meets the same shape of load. Pure functions; files are
// hostile until proven otherwise.
#ifndef MOBI_SERVER_LOADGEN_TRACE_H_
#define MOBI_SERVER_LOADGEN_TRACE_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/loadgen/arrivals.h"

namespace mobi {

struct TraceRow {
  double seconds = 0;  // after the first row
  int context_tokens = 0;
  int generated_tokens = 0;
};

// Columns in any order, others are ignored; LF or CRLF; timestamps "2023-11-16 18:15:46.6805900"
// (or with a T) or plain seconds, not descending. INVALID_ARGUMENT "FILE:LINE: reason".
absl::StatusOr<std::vector<TraceRow>> ParseTrace(std::string_view text, const std::string& file);
absl::StatusOr<std::vector<TraceRow>> ReadTrace(const std::string& path);

struct TraceOptions {
  // The part of the trace to replay, in the trace's own time; zero duration: to the end.
  Duration begin{};
  Duration duration{};
  double time_compression = 1;  // 10: an hour in six minutes
  double token_scale = 1;       // of prompts and completions
  // What the server takes: longer requests are cut, completions first giving way to 1 token.
  int max_model_len = 1 << 20;
  int max_new_tokens = 1 << 20;
};

// INVALID_ARGUMENT when the part is empty.
absl::StatusOr<std::vector<Arrival>> TraceArrivals(absl::Span<const TraceRow> rows,
                                                   const TraceOptions& options);

}  // namespace mobi

#endif  // MOBI_SERVER_LOADGEN_TRACE_H_
