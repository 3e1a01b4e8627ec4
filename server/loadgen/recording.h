// What a load test served, and how good it was: a recorded request is its prompt, what was sent
// back, how the text that the prompt was cut from goes on, and the bits that were used. Scoring
// forces texts through a model again at those bits (teacher forcing), so load and quality are
// measured apart. Blocking; not thread-safe.
#ifndef MOBI_SERVER_LOADGEN_RECORDING_H_
#define MOBI_SERVER_LOADGEN_RECORDING_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "mobi/v1/inference.grpc.pb.h"
#include "server/loadgen/load_report.h"
#include "server/loadgen/prompts.h"

namespace mobi {

struct RecordedRequest {
  std::vector<int32_t> prompt{};
  std::vector<int32_t> completion{};
  std::vector<int32_t> text{};  // as long as the completion; empty: the prompt is not from a text
  double bits = 0;              // mean effective bits
};

// Of the requests that ended well with a token at least.
std::vector<RecordedRequest> RecordingOf(absl::Span<const Outcome> outcomes,
                                         const Prompts& prompts);

// One JSON object a line.
std::string FormatRecording(absl::Span<const RecordedRequest> requests);
// INVALID_ARGUMENT "FILE:LINE: field: reason".
absl::StatusOr<std::vector<RecordedRequest>> ParseRecording(std::string_view text,
                                                            const std::string& file);

struct RecordingScore {
  int requests = 0;
  int64_t tokens = 0;
  double bits = 0;           // of the recording, over tokens
  double replayed_bits = 0;  // that the text's replay used
  // Of the text's own continuation at each request's recorded bits; 0: there is none.
  double text_perplexity = 0;
  // Of the tokens that were served, as the model sees them at 8 bits.
  double served_perplexity = 0;
};

// At most `most` requests, spread over the recording. The server's policy must grant 8 bits.
absl::StatusOr<RecordingScore> ScoreRecording(v1::Inference::StubInterface& stub,
                                              absl::Span<const RecordedRequest> requests, int most);

}  // namespace mobi

#endif  // MOBI_SERVER_LOADGEN_RECORDING_H_
