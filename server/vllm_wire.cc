#include "server/vllm_wire.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/rpc_status.h"

namespace mobi {
namespace {

// Too large for us is out of every range, and stays so.
int32_t Clamped(uint32_t value) {
  return static_cast<int32_t>(std::min<uint32_t>(value, std::numeric_limits<int32_t>::max()));
}

// Fields of theirs that would change the answer if they were ignored.
absl::Status CheckOffered(const vllm_pb::SamplingParams& params) {
  if (params.min_tokens() > 0) {
    return FieldError("sampling_params.min_tokens", "is not offered by this server");
  }
  if (params.has_truncate_prompt_tokens()) {
    return FieldError("sampling_params.truncate_prompt_tokens", "is not offered by this server");
  }
  if (params.constraint_case() != vllm_pb::SamplingParams::CONSTRAINT_NOT_SET) {
    return FieldError("sampling_params.constraint",
                      "structured output is not offered by this server");
  }
  return absl::OkStatus();
}

// The contract's extensions: KV transfer (6, 8) and multimodal inputs (7).
absl::Status CheckExtensions(const vllm_pb::GenerateRequest& request) {
  const auto& unknown = request.GetReflection()->GetUnknownFields(request);
  for (int i = 0; i < unknown.field_count(); ++i) {
    const int number = unknown.field(i).number();
    if (number < 6 || number > 8) continue;
    return FieldError(number == 7 ? "mm_inputs" : "kv_transfer_params",
                      "is not offered by this server");
  }
  return absl::OkStatus();
}

void FillSampling(const vllm_pb::SamplingParams& params, v1::Sampling& out) {
  if (params.has_temperature()) out.set_temperature(params.temperature());
  // Not `> 0`, so that a NaN is seen.
  if (params.top_p() != 0) out.set_top_p(params.top_p());
  if (params.top_k() != 0) out.set_top_k(Clamped(params.top_k()));
  if (params.min_p() != 0) out.set_min_p(params.min_p());
  if (params.frequency_penalty() != 0) out.set_frequency_penalty(params.frequency_penalty());
  if (params.presence_penalty() != 0) out.set_presence_penalty(params.presence_penalty());
  if (params.repetition_penalty() != 0) out.set_repetition_penalty(params.repetition_penalty());
  if (params.has_seed()) out.set_seed(static_cast<uint64_t>(int64_t{params.seed()}));
  *out.mutable_logit_bias() = params.logit_bias();
}

void FillParams(const vllm_pb::SamplingParams& params, v1::GenerateRequest& out) {
  FillSampling(params, *out.mutable_sampling());
  if (params.has_max_tokens()) out.set_max_new_tokens(Clamped(params.max_tokens()));
  if (params.n() != 0) out.set_n(Clamped(params.n()));
  *out.mutable_stop() = params.stop();
  for (const uint32_t id : params.stop_token_ids()) out.add_stop_ids(Clamped(id));
  out.set_ignore_eos(params.ignore_eos());
  if (params.has_logprobs()) out.set_logprobs(params.logprobs());
  if (params.has_prompt_logprobs()) out.set_prompt_logprobs(params.prompt_logprobs());
}

std::optional<std::string> ValueOf(const ClientMetadata& metadata, const char* key) {
  const auto found = metadata.find(key);
  if (found == metadata.end()) return std::nullopt;
  return std::string(found->second.data(), found->second.size());
}

absl::StatusOr<std::optional<float>> BitsOf(const ClientMetadata& metadata, const char* key) {
  const auto value = ValueOf(metadata, key);
  if (!value) return std::nullopt;
  float bits = 0;
  // What it says may be anything and is not repeated.
  if (!absl::SimpleAtof(*value, &bits)) return FieldError(key, "is not a number");
  return bits;
}

absl::Status FillFromMetadata(const ClientMetadata& metadata, v1::GenerateRequest& out) {
  MOBI_ASSIGN_OR_RETURN(const auto min_bits, BitsOf(metadata, "mobi-min-bits"));
  MOBI_ASSIGN_OR_RETURN(const auto max_bits, BitsOf(metadata, "mobi-max-bits"));
  MOBI_ASSIGN_OR_RETURN(const auto pinned_bits, BitsOf(metadata, "mobi-pinned-bits"));
  if (min_bits) out.mutable_precision()->set_min_bits(*min_bits);
  if (max_bits) out.mutable_precision()->set_max_bits(*max_bits);
  if (pinned_bits) out.mutable_precision()->set_pinned_bits(*pinned_bits);
  out.set_priority_class(ValueOf(metadata, "mobi-priority-class").value_or(""));
  out.set_cache_salt(ValueOf(metadata, "mobi-cache-salt").value_or(""));
  return absl::OkStatus();
}

std::string VllmName(const std::string& field) {
  // Prefixes, the longer of two first; whole names end here or go on with '[' or '.'.
  constexpr std::pair<const char*, const char*> kNames[] = {
      {"token_ids.ids", "tokenized.input_ids"},
      {"token_ids", "tokenized.input_ids"},
      {"sampling", "sampling_params"},
      {"max_new_tokens", "sampling_params.max_tokens"},
      {"stop_ids", "sampling_params.stop_token_ids"},
      {"stop", "sampling_params.stop"},
      {"n", "sampling_params.n"},
      {"logprobs", "sampling_params.logprobs"},
      {"prompt_logprobs", "sampling_params.prompt_logprobs"},
      {"precision.min_bits", "mobi-min-bits"},
      {"precision.max_bits", "mobi-max-bits"},
      {"precision.pinned_bits", "mobi-pinned-bits"},
      {"priority_class", "mobi-priority-class"},
      {"cache_salt", "mobi-cache-salt"},
      {"prompt", "input"},
  };
  for (const auto& [ours, theirs] : kNames) {
    if (!absl::StartsWith(field, ours)) continue;
    const std::string rest = field.substr(std::string_view(ours).size());
    if (rest.empty() || rest[0] == '[' || rest[0] == '.') return theirs + rest;
  }
  return field;
}

void AddTop(const v1::TokenLogprob& logprob, vllm_pb::TopLogProbs& out) {
  for (const auto& alternative : logprob.top()) {
    out.add_values(alternative.logprob());
    out.add_token_ids(static_cast<uint32_t>(alternative.token_id()));
  }
}

void AddOutput(const v1::TokenLogprob& logprob, vllm_pb::OutputLogProbs& out) {
  out.add_token_logprobs(logprob.logprob());
  out.add_token_ids(static_cast<uint32_t>(logprob.token_id()));
  if (logprob.top_size() > 0) AddTop(logprob, *out.add_top_logprobs());
}

// Their list has an entry for the first token, which nothing precedes.
vllm_pb::InputLogProbs InputOf(const v1::Prompt& prompt) {
  vllm_pb::InputLogProbs out;
  const bool has_top = prompt.logprobs_size() > 0 && prompt.logprobs(0).top_size() > 0;
  for (int i = 0; i < prompt.token_ids_size(); ++i) {
    out.add_token_ids(static_cast<uint32_t>(prompt.token_ids(i)));
    auto& entry = *out.add_token_logprobs();
    if (i > 0) entry.set_value(prompt.logprobs(i - 1).logprob());
    if (!has_top) continue;
    auto& top = *out.add_top_logprobs();
    if (i > 0) AddTop(prompt.logprobs(i - 1), top);
  }
  return out;
}

}  // namespace

absl::StatusOr<v1::GenerateRequest> FromVllm(const vllm_pb::GenerateRequest& request,
                                             const ClientMetadata& metadata) {
  MOBI_RETURN_IF_ERROR(CheckExtensions(request));
  MOBI_RETURN_IF_ERROR(CheckOffered(request.sampling_params()));
  v1::GenerateRequest out;
  out.set_request_id(request.request_id());
  if (request.has_text()) out.set_text(request.text());
  if (request.has_tokenized()) {
    auto& ids = *out.mutable_token_ids();
    for (const uint32_t id : request.tokenized().input_ids()) ids.add_ids(Clamped(id));
  }
  FillParams(request.sampling_params(), out);
  MOBI_RETURN_IF_ERROR(FillFromMetadata(metadata, out));
  return out;
}

absl::Status InVllmNames(const absl::Status& status) {
  auto detail = DetailOf<google::rpc::BadRequest>(status);
  if (!detail) return status;
  for (auto& violation : *detail->mutable_field_violations()) {
    violation.set_field(VllmName(violation.field()));
  }
  return BadRequestError(*detail);
}

VllmResponses::Completion& VllmResponses::CompletionAt(int index) {
  while (static_cast<int>(completions_.size()) <= index) {
    completions_.emplace_back().complete.set_index(static_cast<uint32_t>(completions_.size() - 1));
  }
  return completions_[index];
}

std::vector<vllm_pb::GenerateResponse> VllmResponses::From(v1::GenerateResponse& message,
                                                           int prompt_tokens) {
  std::vector<vllm_pb::GenerateResponse> out;
  if (message.has_prompt()) {
    prompt_ = InputOf(message.prompt());
    has_prompt_ = true;
  }
  for (v1::Chunk& chunk : *message.mutable_chunks()) Add(chunk, prompt_tokens, out);
  if (!message.has_summary()) return out;
  const v1::Usage& usage = message.summary().usage();
  for (Completion& completion : completions_) {
    vllm_pb::GenerateComplete& complete = *out.emplace_back().mutable_complete();
    complete = std::move(completion.complete);
    complete.set_prompt_tokens(static_cast<uint32_t>(usage.prompt_tokens()));
    complete.set_cached_tokens(static_cast<uint32_t>(usage.cached_tokens()));
    complete.set_completion_tokens(static_cast<uint32_t>(complete.output_ids_size()));
    if (has_prompt_ && !stream_) *complete.mutable_input_logprobs() = prompt_;
  }
  return out;
}

void VllmResponses::Add(v1::Chunk& chunk, int prompt_tokens,
                        std::vector<vllm_pb::GenerateResponse>& out) {
  Completion& completion = CompletionAt(chunk.index());
  vllm_pb::GenerateComplete& complete = completion.complete;
  for (const int32_t id : chunk.token_ids()) complete.add_output_ids(static_cast<uint32_t>(id));
  if (!stream_) {
    for (const auto& logprob : chunk.logprobs()) {
      AddOutput(logprob, *complete.mutable_output_logprobs());
    }
  } else if (chunk.token_ids_size() > 0) {
    vllm_pb::GenerateStreamChunk& delta = *out.emplace_back().mutable_chunk();
    delta.set_index(static_cast<uint32_t>(chunk.index()));
    delta.set_prompt_tokens(static_cast<uint32_t>(prompt_tokens));
    delta.set_completion_tokens(static_cast<uint32_t>(chunk.token_ids_size()));
    for (const int32_t id : chunk.token_ids()) delta.add_token_ids(static_cast<uint32_t>(id));
    for (const auto& logprob : chunk.logprobs()) {
      AddOutput(logprob, *delta.mutable_output_logprobs());
    }
    if (!std::exchange(completion.started, true) && has_prompt_) {
      *delta.mutable_input_logprobs() = prompt_;
    }
  }
  if (chunk.finish_reason() == v1::FINISH_REASON_UNSPECIFIED) return;
  complete.set_finish_reason(chunk.finish_reason() == v1::FINISH_REASON_LENGTH ? "length" : "stop");
  if (chunk.has_stop()) complete.set_matched_stop_str(chunk.stop());
  if (chunk.has_stop_id()) {
    complete.set_matched_token_id(static_cast<uint32_t>(chunk.stop_id()));
  }
}

}  // namespace mobi
