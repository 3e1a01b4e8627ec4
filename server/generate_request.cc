#include "server/generate_request.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "server/field_checks.h"
#include "server/rpc_status.h"

namespace mobi {
namespace {

// A proto3 optional as std::optional.
#define MOBI_OPTIONAL(message, field) \
  ((message).has_##field() ? std::optional((message).field()) : std::nullopt)

void ParseSampling(const v1::Sampling& sampling, int vocab_size, const RequestLimits& limits,
                   FieldChecks& checks, SamplingParams& out) {
  out.temperature =
      checks.Float("sampling.temperature", MOBI_OPTIONAL(sampling, temperature), 1, 0, 2);
  out.top_p = checks.Float("sampling.top_p", MOBI_OPTIONAL(sampling, top_p), 1, 0, 1, Lower::kOpen);
  out.top_k = checks.Int("sampling.top_k", MOBI_OPTIONAL(sampling, top_k), 0, 0, vocab_size);
  out.min_p = checks.Float("sampling.min_p", MOBI_OPTIONAL(sampling, min_p), 0, 0, 1);
  out.repetition_penalty =
      checks.Float("sampling.repetition_penalty", MOBI_OPTIONAL(sampling, repetition_penalty), 1, 0,
                   2, Lower::kOpen);
  out.presence_penalty = checks.Float("sampling.presence_penalty",
                                      MOBI_OPTIONAL(sampling, presence_penalty), 0, -2, 2);
  out.frequency_penalty = checks.Float("sampling.frequency_penalty",
                                       MOBI_OPTIONAL(sampling, frequency_penalty), 0, -2, 2);
  checks.Size("sampling.logit_bias", sampling.logit_bias_size(), limits.max_logit_bias, "entries");
  for (const auto& [token, bias] : sampling.logit_bias()) {
    const std::string field = absl::StrCat("sampling.logit_bias[", token, "]");
    checks.Int(field, token, 0, 0, vocab_size - 1);
    out.logit_bias.emplace_back(token, checks.Float(field, bias, 0, -100, 100));
    if (!checks.ok()) return;
  }
  // A map's order is arbitrary; floats must be added in one order.
  std::sort(out.logit_bias.begin(), out.logit_bias.end());
}

void ParseStops(const v1::GenerateRequest& request, int vocab_size, const RequestLimits& limits,
                FieldChecks& checks, ParsedRequest& out) {
  checks.Size("stop", request.stop_size(), limits.max_stop_strings, "strings");
  for (int i = 0; i < request.stop_size() && checks.ok(); ++i) {
    const std::string field = absl::StrCat("stop[", i, "]");
    if (request.stop(i).empty()) checks.Violation(field, "is empty");
    checks.Size(field, static_cast<int64_t>(request.stop(i).size()), limits.max_stop_bytes,
                "bytes");
  }
  checks.Size("stop_ids", request.stop_ids_size(), limits.max_stop_ids, "ids");
  for (int i = 0; i < request.stop_ids_size() && checks.ok(); ++i) {
    checks.Int(absl::StrCat("stop_ids[", i, "]"), request.stop_ids(i), 0, 0, vocab_size - 1);
  }
  if (!checks.ok()) return;
  out.stops.assign(request.stop().begin(), request.stop().end());
  out.engine.stop_ids.assign(request.stop_ids().begin(), request.stop_ids().end());
}

void ParseNames(const v1::GenerateRequest& request, const ModelInfo& info,
                const RequestLimits& limits, FieldChecks& checks, ParsedRequest& out) {
  if (!request.model().empty() && request.model() != info.name) {
    checks.Violation("model",
                     absl::StrFormat("\"%s\" is unknown, this server has \"%s\"",
                                     absl::CHexEscape(request.model().substr(0, 64)), info.name));
  }
  checks.Size("request_id", static_cast<int64_t>(request.request_id().size()),
              limits.max_request_id_bytes, "bytes");
  if (!std::all_of(request.request_id().begin(), request.request_id().end(),
                   [](char c) { return absl::ascii_isgraph(c); })) {
    checks.Violation("request_id", "has characters that are not printable ASCII");
  }
  checks.Size("cache_salt", static_cast<int64_t>(request.cache_salt().size()),
              limits.max_cache_salt_bytes, "bytes");
  out.request_id = request.request_id();
  out.engine.cache_salt = request.cache_salt();
}

void ParseLengths(const v1::GenerateRequest& request, const RequestLimits& limits,
                  FieldChecks& checks, ParsedRequest& out) {
  out.engine.max_new_tokens = checks.Int("max_new_tokens", MOBI_OPTIONAL(request, max_new_tokens),
                                         limits.default_max_new_tokens, 0, limits.max_new_tokens);
  out.engine.n = checks.Int("n", MOBI_OPTIONAL(request, n), 1, 1, limits.max_n);
  out.engine.ignore_eos = request.ignore_eos();
  out.engine.top_logprobs =
      checks.Int("logprobs", MOBI_OPTIONAL(request, logprobs), 0, 0, limits.max_logprobs);
  out.logprobs = request.has_logprobs();
  out.engine.prompt_top_logprobs = checks.Int(
      "prompt_logprobs", MOBI_OPTIONAL(request, prompt_logprobs), 0, 0, limits.max_prompt_logprobs);
  out.engine.prompt_logprobs = request.has_prompt_logprobs();
}

void ParsePrecision(const v1::PrecisionBand& band, FieldChecks& checks, PrecisionBand& out) {
  const auto bits = [&](const char* field, std::optional<float> value, float absent) {
    return checks.Float(field, value, absent, kLowestBits, kHighestBits);
  };
  out.min_bits = bits("precision.min_bits", MOBI_OPTIONAL(band, min_bits), kLowestBits);
  out.max_bits = bits("precision.max_bits", MOBI_OPTIONAL(band, max_bits), kHighestBits);
  if (band.has_pinned_bits()) {
    if (band.has_min_bits() || band.has_max_bits()) {
      checks.Violation("precision.pinned_bits", "excludes min_bits and max_bits");
    }
    out.min_bits = out.max_bits =
        bits("precision.pinned_bits", MOBI_OPTIONAL(band, pinned_bits), kHighestBits);
  }
  if (out.min_bits > out.max_bits) {
    checks.Violation("precision.min_bits", absl::StrFormat("%g is above max_bits, which is %g",
                                                           out.min_bits, out.max_bits));
  }
}

// What the policy makes of the band that was asked for.
absl::Status ApplyPolicy(const v1::GenerateRequest& request, const ModelInfo& info,
                         const PriorityClass& priority_class, const Policy& policy,
                         PrecisionBand& band) {
  if (!info.elastic) {
    if (!request.has_precision()) return absl::OkStatus();
    return PreconditionError("MODEL", "precision",
                             "this model has one precision, so none can be asked for");
  }
  if (band.min_bits > policy.max_request_bits) {
    return PreconditionError(
        "POLICY",
        request.precision().has_pinned_bits() ? "precision.pinned_bits" : "precision.min_bits",
        absl::StrFormat("%g is more than the policy grants, which is %g", band.min_bits,
                        policy.max_request_bits));
  }
  // A client may ask for less than its class's floor, not be given less.
  if (!band.pinned()) {
    band.min_bits = std::max(band.min_bits, std::min(priority_class.floor_bits, band.max_bits));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> ParsePrompt(const v1::GenerateRequest& request,
                                                 const ServedModel& model,
                                                 const RequestLimits& limits,
                                                 std::chrono::system_clock::time_point now) {
  switch (request.prompt_case()) {
    case v1::GenerateRequest::kText:
      return EncodeText(request.text(), /*add_special_tokens=*/true, model, limits);
    case v1::GenerateRequest::kChat:
      return EncodeChat(request.chat(), model, limits, now);
    case v1::GenerateRequest::kTokenIds: {
      const auto& ids = request.token_ids().ids();
      if (ids.empty()) return FieldError("token_ids", "is empty");
      const int vocab_size = model.info.config.vocab_size;
      FieldChecks checks;
      for (int i = 0; i < ids.size() && checks.ok(); ++i) {
        checks.Int(absl::StrCat("token_ids.ids[", i, "]"), ids[i], 0, 0, vocab_size - 1);
      }
      MOBI_RETURN_IF_ERROR(checks.status());
      return std::vector<int32_t>(ids.begin(), ids.end());
    }
    case v1::GenerateRequest::PROMPT_NOT_SET:
      break;
  }
  return FieldError("prompt", "needs one of text, chat and token_ids");
}

const char* PromptField(const v1::GenerateRequest& request) {
  return request.has_text() ? "text" : request.has_chat() ? "chat" : "token_ids";
}

// Scores of the prompt come in one message, so their number has a limit of its own.
absl::Status CheckPromptScores(const GenerationRequest& parsed, const RequestLimits& limits) {
  if (!parsed.prompt_logprobs) return absl::OkStatus();
  const int64_t per_token = 1 + parsed.prompt_top_logprobs;
  const int64_t scores = static_cast<int64_t>(parsed.prompt.size()) * per_token;
  if (scores <= limits.max_prompt_scores) return absl::OkStatus();
  return FieldError("prompt_logprobs",
                    absl::StrFormat("%d for each of %d prompt tokens, at most %d in all are sent",
                                    per_token, parsed.prompt.size(), limits.max_prompt_scores));
}

// Prompt and completion share the context.
absl::Status FitContext(const v1::GenerateRequest& request, int max_model_len,
                        GenerationRequest& out) {
  const int64_t prompt = static_cast<int64_t>(out.prompt.size());
  const int64_t room = max_model_len - prompt;
  const bool scoring = request.has_max_new_tokens() && request.max_new_tokens() == 0;
  if (room < (scoring ? 0 : 1)) {
    return FieldError(PromptField(request),
                      absl::StrFormat("%d tokens, at most %d fit the model's context", prompt,
                                      max_model_len - (scoring ? 0 : 1)));
  }
  if (out.max_new_tokens <= room) return absl::OkStatus();
  if (request.has_max_new_tokens()) {
    return FieldError("max_new_tokens",
                      absl::StrFormat("%d, but after the prompt's %d tokens the context of %d has "
                                      "room for %d",
                                      out.max_new_tokens, prompt, max_model_len, room));
  }
  out.max_new_tokens = static_cast<int>(room);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<int32_t>> EncodeText(const std::string& text, bool add_special_tokens,
                                                const ServedModel& model,
                                                const RequestLimits& limits) {
  if (text.empty()) return FieldError("text", "is empty");
  FieldChecks checks;
  checks.Size("text", static_cast<int64_t>(text.size()), limits.max_prompt_bytes, "bytes");
  MOBI_RETURN_IF_ERROR(checks.status());
  auto ids = model.tokenizer->Encode(text, {.add_special_tokens = add_special_tokens});
  if (!ids.ok()) return FieldError("text", std::string(ids.status().message()));
  return ids;
}

absl::StatusOr<std::vector<int32_t>> EncodeChat(const v1::Chat& chat, const ServedModel& model,
                                                const RequestLimits& limits,
                                                std::chrono::system_clock::time_point now) {
  if (!model.chat_template.ok()) {
    return FieldError("chat", std::string(model.chat_template.status().message()));
  }
  if (chat.messages().empty()) return FieldError("chat.messages", "is empty");
  FieldChecks checks;
  checks.Size("chat.messages", chat.messages_size(), limits.max_chat_messages, "messages");
  std::vector<ChatMessage> messages;
  int64_t bytes = 0;
  for (const v1::ChatMessage& message : chat.messages()) {
    bytes += static_cast<int64_t>(message.role().size() + message.content().size());
    messages.push_back({message.role(), message.content()});
  }
  checks.Size("chat", bytes, limits.max_prompt_bytes, "bytes");
  MOBI_RETURN_IF_ERROR(checks.status());
  auto ids = model.chat_template->Encode(messages, {.now = now});
  if (!ids.ok()) return FieldError("chat", std::string(ids.status().message()));
  return ids;
}

absl::StatusOr<ParsedRequest> ParseGenerateRequest(const v1::GenerateRequest& request,
                                                   const ServedModel& model,
                                                   const RequestLimits& limits,
                                                   const Policy& policy,
                                                   std::chrono::system_clock::time_point now) {
  ParsedRequest out;
  FieldChecks checks;
  const int vocab_size = model.info.config.vocab_size;
  ParseNames(request, model.info, limits, checks, out);
  ParseLengths(request, limits, checks, out);
  ParseSampling(request.sampling(), vocab_size, limits, checks, out.engine.sampling);
  ParseStops(request, vocab_size, limits, checks, out);
  ParsePrecision(request.precision(), checks, out.engine.precision);
  out.has_seed = request.sampling().has_seed();
  out.engine.sampling.seed = request.sampling().seed();
  const std::string& class_name =
      request.priority_class().empty() ? kDefaultPriorityClass : request.priority_class();
  const PriorityClass* priority_class = policy.FindClass(class_name);
  if (priority_class == nullptr) {
    checks.Violation("priority_class", absl::StrFormat("the policy has no class \"%s\"",
                                                       absl::CHexEscape(class_name)));
  }
  MOBI_RETURN_IF_ERROR(checks.status());
  out.engine.priority = priority_class->priority;
  MOBI_RETURN_IF_ERROR(
      ApplyPolicy(request, model.info, *priority_class, policy, out.engine.precision));
  // Last, because it is the part that costs.
  MOBI_ASSIGN_OR_RETURN(out.engine.prompt, ParsePrompt(request, model, limits, now));
  MOBI_RETURN_IF_ERROR(CheckPromptScores(out.engine, limits));
  MOBI_RETURN_IF_ERROR(FitContext(request, model.engine->max_model_len(), out.engine));
  return out;
}

#undef MOBI_OPTIONAL

}  // namespace mobi
