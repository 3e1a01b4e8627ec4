#include "server/vllm_service.h"

#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "server/rpc_status.h"
#include "server/vllm_wire.h"

namespace mobi {
namespace {

RequestLimits VllmLimits(RequestLimits limits) {
  limits.default_max_new_tokens = limits.max_new_tokens;
  return limits;
}

CallServices WithLimits(const CallServices& services, const RequestLimits& limits) {
  return {services.access,     limits,         services.stream_limits, services.state,
          services.controller, services.clock, services.metrics,       services.registry,
          services.pump,       services.seeds};
}

// A GenerateCall whose messages become any number of the contract's.
class VllmCall final : public GenerateCall,
                       public grpc::ServerWriteReactor<vllm_pb::GenerateResponse> {
 public:
  VllmCall(const CallServices& services, grpc::CallbackServerContext* context,
           const vllm_pb::GenerateRequest& request)
      : GenerateCall(services, context),
        public_id_(request.request_id()),
        responses_(request.stream()) {}

  std::string_view public_id() const override { return public_id_; }

  void OnWriteDone(bool ok) override {
    if (ok && next_ < pending_.size()) {
      StartNext();
    } else {
      Written(ok);
    }
  }
  void OnCancel() override { Cancelled(); }
  using GenerateCall::OnDone;  // the engine's, beside gRPC's
  void OnDone() override { Gone(); }

 protected:
  bool Write(v1::GenerateResponse& message) override {
    Take(message);
    if (pending_.empty()) return false;
    StartNext();
    return true;
  }
  void WriteAndFinish(v1::GenerateResponse& message, const grpc::Status& status) override {
    Take(message);
    if (pending_.empty()) return Finish(status);
    finish_ = status;
    StartNext();
  }
  void Finish(const grpc::Status& status) override { ServerWriteReactor::Finish(status); }
  absl::Status OnThisWire(absl::Status status) const override { return InVllmNames(status); }

 private:
  void Take(v1::GenerateResponse& message) {
    if (message.has_summary()) SetTrailers(message.summary());
    pending_ = responses_.From(message, prompt_tokens());
    next_ = 0;
  }
  void StartNext() {
    const vllm_pb::GenerateResponse& response = pending_[next_++];
    // The last statement: afterwards the call may be gone.
    if (finish_ && next_ == pending_.size()) {
      StartWriteAndFinish(&response, grpc::WriteOptions(), *finish_);
    } else {
      StartWrite(&response);
    }
  }
  void SetTrailers(const v1::Summary& summary) {
    const v1::Timings& timings = summary.timings();
    for (const auto& [key, value] :
         {std::pair{"mobi-effective-bits", summary.mean_effective_bits()},
          std::pair{"mobi-queue-ms", timings.queue_ms()},
          std::pair{"mobi-prefill-ms", timings.prefill_ms()},
          std::pair{"mobi-decode-ms", timings.decode_ms()}}) {
      context().AddTrailingMetadata(key, absl::StrFormat("%.6g", value));
    }
  }

  const std::string public_id_;
  // Of the write side's owner.
  VllmResponses responses_;
  std::vector<vllm_pb::GenerateResponse> pending_;
  size_t next_ = 0;
  std::optional<grpc::Status> finish_;  // with the last of pending_
};

}  // namespace

VllmService::VllmService(const CallServices& services)
    : limits_(VllmLimits(services.limits)),
      services_(WithLimits(services, limits_)),
      start_(services.clock.Now()) {}

grpc::ServerWriteReactor<vllm_pb::GenerateResponse>* VllmService::Generate(
    grpc::CallbackServerContext* context, const vllm_pb::GenerateRequest* request) {
  const auto now = services_.clock.WallNow().time_since_epoch();
  last_receive_.store(std::chrono::duration<double>(now).count(), std::memory_order_relaxed);
  auto* call = new VllmCall(services_, context, *request);  // Gone deletes it
  call->Start(FromVllm(*request, context->client_metadata()));
  return call;
}

grpc::ServerUnaryReactor* VllmService::HealthCheck(grpc::CallbackServerContext* context,
                                                   const vllm_pb::HealthCheckRequest*,
                                                   vllm_pb::HealthCheckResponse* response) {
  return Answer(context, [&] {
    response->set_healthy(services_.state.ready());
    response->set_message(response->healthy() ? "ready" : "loading, draining, stalled or failed");
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* VllmService::Abort(grpc::CallbackServerContext* context,
                                             const vllm_pb::AbortRequest* request,
                                             vllm_pb::AbortResponse*) {
  return Answer(context, [&] {
    const std::unordered_set<std::string> ids(request->request_ids().begin(),
                                              request->request_ids().end());
    services_.registry.EndSome(ids, absl::CancelledError("aborted by its caller"));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* VllmService::GetModelInfo(grpc::CallbackServerContext* context,
                                                    const vllm_pb::GetModelInfoRequest*,
                                                    vllm_pb::GetModelInfoResponse* response) {
  return Answer(context, [&] { return DoGetModelInfo(*response); });
}

grpc::ServerUnaryReactor* VllmService::GetServerInfo(grpc::CallbackServerContext* context,
                                                     const vllm_pb::GetServerInfoRequest*,
                                                     vllm_pb::GetServerInfoResponse* response) {
  return Answer(context, [&] {
    response->set_active_requests(static_cast<uint32_t>(services_.registry.size()));
    response->set_is_paused(services_.state.draining());
    response->set_last_receive_timestamp(last_receive_.load(std::memory_order_relaxed));
    response->set_uptime_seconds(ToSeconds(services_.clock.Now() - start_));
    response->set_server_type("mobi-server");
    return absl::OkStatus();
  });
}

absl::Status VllmService::DoGetModelInfo(vllm_pb::GetModelInfoResponse& response) const {
  MOBI_ASSIGN_OR_RETURN(const ServedModel* model, services_.state.model());
  const ModelInfo& info = model->info;
  const int max_model_len = model->engine->max_model_len();
  response.set_model_path(info.name);
  response.set_is_generation(true);
  response.set_max_context_length(static_cast<uint32_t>(max_model_len));
  response.set_vocab_size(static_cast<uint32_t>(info.config.vocab_size));
  response.set_served_model_name(info.name);
  response.set_model_type("llama");
  response.add_architectures("LlamaForCausalLM");
  response.mutable_eos_token_ids()->Assign(info.config.eos_token_ids.begin(),
                                           info.config.eos_token_ids.end());
  response.set_bos_token_id(info.config.bos_token_id);
  response.set_max_req_input_len(max_model_len - 1);
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* VllmService::Answer(grpc::CallbackServerContext* context,
                                              absl::FunctionRef<absl::Status()> work) const {
  absl::Status status = services_.access.Check(*context, Scope::kGenerate);
  if (status.ok()) status = work();
  services_.metrics.RequestEnded(Method::kVllm, status.code());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(WithRetry(status, services_.stream_limits.retry_after_unavailable)));
  return reactor;
}

}  // namespace mobi
