#include "server/loadgen/recording.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/base/json.h"
#include "engine/base/status_macros.h"
#include "server/client.h"

namespace mobi {
namespace {

constexpr size_t kMaxLineBytes = 1 << 20;
constexpr float kReferenceBits = 8;
// A pinned request takes the price of the checkpoint's table as it is, while the bits that were
// recorded had the tracking loop's correction; so the replay corrects by what it got.
constexpr int kTries = 3;
constexpr double kBitsTolerance = 0.03;

absl::StatusOr<std::vector<int32_t>> ReadIds(const JsonObject& object, std::string_view key) {
  MOBI_ASSIGN_OR_RETURN(const nlohmann::json* array, object.Array(key));
  std::vector<int32_t> ids;
  for (const nlohmann::json& id : *array) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > std::numeric_limits<int32_t>::max()) {
      return object.Error(key, absl::StrCat("has ", JsonExcerpt(id), ", which is no token id"));
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

absl::StatusOr<RecordedRequest> ParseLine(std::string_view line, const std::string& where) {
  MOBI_ASSIGN_OR_RETURN(const nlohmann::json json,
                        ParseJson(line, where, {.max_bytes = kMaxLineBytes}));
  MOBI_ASSIGN_OR_RETURN(const JsonObject object, JsonObject::Of(json, where));
  RecordedRequest request;
  MOBI_ASSIGN_OR_RETURN(request.prompt, ReadIds(object, "prompt"));
  MOBI_ASSIGN_OR_RETURN(request.completion, ReadIds(object, "completion"));
  MOBI_ASSIGN_OR_RETURN(request.text, ReadIds(object, "text"));
  MOBI_ASSIGN_OR_RETURN(request.bits, object.Number("bits", 0, 16));
  if (request.prompt.empty()) return object.Error("prompt", "is empty");
  if (request.completion.empty()) return object.Error("completion", "is empty");
  if (!request.text.empty() && request.text.size() != request.completion.size()) {
    return object.Error("text", "is not as long as completion");
  }
  return request;
}

struct Score {
  double loss = 0;  // -log p of the continuation, summed
  double bits = 0;
};

absl::StatusOr<Score> ScoreAt(v1::Inference::StubInterface& stub,
                              const std::vector<int32_t>& prompt,
                              const std::vector<int32_t>& continuation, double bits) {
  v1::GenerateRequest request;
  auto& ids = *request.mutable_token_ids()->mutable_ids();
  ids.Add(prompt.begin(), prompt.end());
  ids.Add(continuation.begin(), continuation.end());
  request.set_max_new_tokens(0);
  request.set_prompt_logprobs(0);
  request.mutable_precision()->set_pinned_bits(static_cast<float>(std::clamp(bits, 2.0, 8.0)));
  std::vector<float> logprobs;
  const auto summary =
      Generate(stub, request, Duration::zero(), [&](const v1::GenerateResponse& message) {
        for (const auto& token : message.prompt().logprobs()) logprobs.push_back(token.logprob());
      });
  if (!summary.ok()) return summary.status();
  if (logprobs.size() + 1 != prompt.size() + continuation.size()) {
    return absl::DataLossError(absl::StrCat("the server scored ", logprobs.size(), " of ",
                                            prompt.size() + continuation.size() - 1, " tokens"));
  }
  Score score{.bits = summary->mean_effective_bits()};
  for (size_t i = prompt.size() - 1; i < logprobs.size(); ++i) score.loss -= logprobs[i];
  return score;
}

absl::StatusOr<Score> ScoreText(v1::Inference::StubInterface& stub,
                                const RecordedRequest& request) {
  double asked = request.bits;
  Score best;
  for (int i = 0; i < kTries; ++i) {
    MOBI_ASSIGN_OR_RETURN(const Score score, ScoreAt(stub, request.prompt, request.text, asked));
    const bool nearer = std::abs(score.bits - request.bits) < std::abs(best.bits - request.bits);
    if (i == 0 || nearer) best = score;
    if (std::abs(best.bits - request.bits) < kBitsTolerance) break;
    asked = std::clamp(asked + request.bits - score.bits, 2.0, 8.0);
  }
  return best;
}

}  // namespace

std::vector<RecordedRequest> RecordingOf(absl::Span<const Outcome> outcomes,
                                         const Prompts& prompts) {
  std::vector<RecordedRequest> requests;
  for (size_t i = 0; i < outcomes.size(); ++i) {
    const Outcome& outcome = outcomes[i];
    if (!outcome.status.ok() || outcome.token_ids.empty()) continue;
    RecordedRequest request{.completion = outcome.token_ids, .bits = outcome.effective_bits};
    const int prompt_tokens = outcome.arrival.prompt_tokens;
    // A longer prompt begins like the shorter one.
    request.prompt = prompts.Make(i, prompt_tokens + static_cast<int>(request.completion.size()));
    if (prompts.from_text()) {
      request.text.assign(request.prompt.begin() + prompt_tokens, request.prompt.end());
    }
    request.prompt.resize(static_cast<size_t>(prompt_tokens));
    requests.push_back(std::move(request));
  }
  return requests;
}

std::string FormatRecording(absl::Span<const RecordedRequest> requests) {
  std::string lines;
  for (const RecordedRequest& request : requests) {
    const nlohmann::json json = {{"prompt", request.prompt},
                                 {"completion", request.completion},
                                 {"text", request.text},
                                 {"bits", request.bits}};
    absl::StrAppend(&lines, json.dump(), "\n");
  }
  return lines;
}

absl::StatusOr<std::vector<RecordedRequest>> ParseRecording(std::string_view text,
                                                            const std::string& file) {
  std::vector<RecordedRequest> requests;
  for (int number = 1; !text.empty(); ++number) {
    const size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.empty()) continue;
    MOBI_ASSIGN_OR_RETURN(RecordedRequest request,
                          ParseLine(line, absl::StrCat(file, ":", number)));
    requests.push_back(std::move(request));
  }
  if (requests.empty()) return absl::InvalidArgumentError(absl::StrCat(file, ": no requests"));
  return requests;
}

absl::StatusOr<RecordingScore> ScoreRecording(v1::Inference::StubInterface& stub,
                                              absl::Span<const RecordedRequest> requests,
                                              int most) {
  const size_t count = std::min(requests.size(), static_cast<size_t>(most));
  RecordingScore score;
  double text_loss = 0, served_loss = 0;
  int64_t text_tokens = 0;
  for (size_t i = 0; i < count; ++i) {
    const RecordedRequest& request = requests[i * requests.size() / count];
    const auto tokens = static_cast<int64_t>(request.completion.size());
    MOBI_ASSIGN_OR_RETURN(const Score served,
                          ScoreAt(stub, request.prompt, request.completion, kReferenceBits));
    served_loss += served.loss;
    ++score.requests;
    score.tokens += tokens;
    score.bits += request.bits * static_cast<double>(tokens);
    if (request.text.empty()) continue;
    MOBI_ASSIGN_OR_RETURN(const Score text, ScoreText(stub, request));
    text_loss += text.loss;
    text_tokens += tokens;
    score.replayed_bits += text.bits * static_cast<double>(tokens);
  }
  if (score.tokens == 0) return absl::InvalidArgumentError("nothing to score");
  score.bits /= static_cast<double>(score.tokens);
  score.served_perplexity = std::exp(served_loss / static_cast<double>(score.tokens));
  if (text_tokens > 0) {
    score.replayed_bits /= static_cast<double>(text_tokens);
    score.text_perplexity = std::exp(text_loss / static_cast<double>(text_tokens));
  }
  return score;
}

}  // namespace mobi
