// From the wire to the engine: checks every field of a request against its limit and tokenizes the
// prompt. Nothing is allocated for a request that fails here. Pure functions, safe from any thread.
#ifndef MOBI_SERVER_GENERATE_REQUEST_H_
#define MOBI_SERVER_GENERATE_REQUEST_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "mobi/v1/inference.pb.h"
#include "server/limits.h"
#include "server/policy.h"
#include "server/served_model.h"

namespace mobi {

struct ParsedRequest {
  // Complete but for deadline and tenant; the seed is set when the client gave one.
  GenerationRequest engine;
  bool has_seed = false;
  std::string request_id;  // empty: to be drawn
  std::vector<std::string> stops;
  bool logprobs = false;
};

// INVALID_ARGUMENT names every bad field; FAILED_PRECONDITION when policy or model forbid the
// precision.
absl::StatusOr<ParsedRequest> ParseGenerateRequest(const v1::GenerateRequest& request,
                                                   const ServedModel& model,
                                                   const RequestLimits& limits,
                                                   const Policy& policy,
                                                   std::chrono::system_clock::time_point now);

// The ids that a prompt of text or chat is read as.
absl::StatusOr<std::vector<int32_t>> EncodeText(const std::string& text, bool add_special_tokens,
                                                const ServedModel& model,
                                                const RequestLimits& limits);
absl::StatusOr<std::vector<int32_t>> EncodeChat(const v1::Chat& chat, const ServedModel& model,
                                                const RequestLimits& limits,
                                                std::chrono::system_clock::time_point now);

}  // namespace mobi

#endif  // MOBI_SERVER_GENERATE_REQUEST_H_
