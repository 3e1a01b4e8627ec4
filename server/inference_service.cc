#include "server/inference_service.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "engine/precision.h"
#include "server/field_checks.h"
#include "server/rpc_status.h"
#include "server/version.h"

namespace mobi {
namespace {

void Describe(const ModelConfig& config, int64_t num_parameters, v1::Architecture& out) {
  out.set_vocab_size(config.vocab_size);
  out.set_hidden_size(config.hidden_size);
  out.set_intermediate_size(config.intermediate_size);
  out.set_num_hidden_layers(config.num_hidden_layers);
  out.set_num_attention_heads(config.num_attention_heads);
  out.set_num_key_value_heads(config.num_key_value_heads);
  out.set_num_parameters(num_parameters);
}

void Describe(const RequestLimits& limits, int max_model_len, v1::Limits& out) {
  out.set_max_model_len(max_model_len);
  out.set_max_new_tokens(limits.max_new_tokens);
  out.set_max_prompt_bytes(limits.max_prompt_bytes);
  out.set_max_n(limits.max_n);
  out.set_max_logprobs(limits.max_logprobs);
  out.set_max_prompt_logprobs(limits.max_prompt_logprobs);
  out.set_max_stop_strings(limits.max_stop_strings);
  out.set_max_stop_bytes(limits.max_stop_bytes);
  out.set_max_stop_ids(limits.max_stop_ids);
  out.set_max_logit_bias(limits.max_logit_bias);
  out.set_max_deadline_seconds(static_cast<int>(ToSeconds(limits.max_deadline)));
}

// A GenerateCall whose messages go out as they are.
class InferenceCall final : public GenerateCall,
                            public grpc::ServerWriteReactor<v1::GenerateResponse> {
 public:
  InferenceCall(const CallServices& services, grpc::CallbackServerContext* context)
      : GenerateCall(services, context) {}

  void OnWriteDone(bool ok) override { Written(ok); }
  void OnCancel() override { Cancelled(); }
  using GenerateCall::OnDone;  // the engine's, beside gRPC's
  void OnDone() override { Gone(); }

 protected:
  bool Write(v1::GenerateResponse& message) override {
    StartWrite(&message);
    return true;
  }
  void WriteAndFinish(v1::GenerateResponse& message, const grpc::Status& status) override {
    StartWriteAndFinish(&message, grpc::WriteOptions(), status);
  }
  void Finish(const grpc::Status& status) override { ServerWriteReactor::Finish(status); }
};

}  // namespace

grpc::ServerWriteReactor<v1::GenerateResponse>* InferenceService::Generate(
    grpc::CallbackServerContext* context, const v1::GenerateRequest* request) {
  auto* call = new InferenceCall(services_, context);  // Gone deletes it
  call->Start(*request);
  return call;
}

grpc::ServerUnaryReactor* InferenceService::Tokenize(grpc::CallbackServerContext* context,
                                                     const v1::TokenizeRequest* request,
                                                     v1::TokenizeResponse* response) {
  return Answer(context, Method::kTokenize, [&] { return DoTokenize(*request, *response); });
}

grpc::ServerUnaryReactor* InferenceService::Detokenize(grpc::CallbackServerContext* context,
                                                       const v1::DetokenizeRequest* request,
                                                       v1::DetokenizeResponse* response) {
  return Answer(context, Method::kDetokenize, [&] { return DoDetokenize(*request, *response); });
}

grpc::ServerUnaryReactor* InferenceService::GetModel(grpc::CallbackServerContext* context,
                                                     const v1::GetModelRequest*,
                                                     v1::GetModelResponse* response) {
  return Answer(context, Method::kGetModel, [&] { return DoGetModel(*response); });
}

absl::Status InferenceService::DoTokenize(const v1::TokenizeRequest& request,
                                          v1::TokenizeResponse& response) const {
  MOBI_ASSIGN_OR_RETURN(const ServedModel* model, services_.state.model());
  std::vector<int32_t> ids;
  switch (request.input_case()) {
    case v1::TokenizeRequest::kText: {
      const bool special = !request.has_add_special_tokens() || request.add_special_tokens();
      MOBI_ASSIGN_OR_RETURN(ids, EncodeText(request.text(), special, *model, services_.limits));
      break;
    }
    case v1::TokenizeRequest::kChat: {
      MOBI_ASSIGN_OR_RETURN(
          ids, EncodeChat(request.chat(), *model, services_.limits, services_.clock.WallNow()));
      break;
    }
    case v1::TokenizeRequest::INPUT_NOT_SET:
      return FieldError("input", "needs one of text and chat");
  }
  response.mutable_ids()->Assign(ids.begin(), ids.end());
  if (!request.with_pieces()) return absl::OkStatus();
  for (const int32_t id : ids) response.add_pieces(std::string(model->tokenizer->TokenBytes(id)));
  return absl::OkStatus();
}

absl::Status InferenceService::DoDetokenize(const v1::DetokenizeRequest& request,
                                            v1::DetokenizeResponse& response) const {
  MOBI_ASSIGN_OR_RETURN(const ServedModel* model, services_.state.model());
  FieldChecks checks;
  checks.Size("ids", request.ids_size(), services_.limits.max_prompt_bytes, "ids");
  const int vocab_size = model->info.config.vocab_size;
  for (int i = 0; i < request.ids_size() && checks.ok(); ++i) {
    checks.Int(absl::StrCat("ids[", i, "]"), request.ids(i), 0, 0, vocab_size - 1);
  }
  MOBI_RETURN_IF_ERROR(checks.status());
  const bool skip = !request.has_skip_special_tokens() || request.skip_special_tokens();
  response.set_text(
      model->tokenizer->Decode(absl::MakeSpan(request.ids().data(), request.ids_size()), skip));
  return absl::OkStatus();
}

absl::Status InferenceService::DoGetModel(v1::GetModelResponse& response) const {
  MOBI_ASSIGN_OR_RETURN(const ServedModel* model, services_.state.model());
  const ModelInfo& info = model->info;
  response.set_name(info.name);
  response.set_server_version(kServerVersion);
  response.set_backend(info.backend);
  response.set_device(info.device);
  response.set_elastic(info.elastic);
  response.set_min_bits(info.elastic ? kLowestBits : kFloatBits);
  response.set_max_bits(info.elastic ? kHighestBits : kFloatBits);
  Describe(info.config, info.num_parameters, *response.mutable_architecture());
  Describe(services_.limits, model->engine->max_model_len(), *response.mutable_limits());
  response.set_has_chat_template(model->chat_template.ok());
  response.mutable_eos_token_ids()->Assign(info.config.eos_token_ids.begin(),
                                           info.config.eos_token_ids.end());
  for (const PriorityClass& priority_class : services_.controller.policy().policy->classes) {
    response.add_priority_classes(priority_class.name);
  }
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* InferenceService::Answer(grpc::CallbackServerContext* context,
                                                   Method method,
                                                   absl::FunctionRef<absl::Status()> work) const {
  absl::Status status = services_.access.Check(*context, Scope::kGenerate);
  if (status.ok()) status = work();
  services_.metrics.RequestEnded(method, status.code());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(WithRetry(status, services_.stream_limits.retry_after_unavailable)));
  return reactor;
}

}  // namespace mobi
