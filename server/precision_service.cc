#include "server/precision_service.h"

#include <algorithm>
#include <chrono>

#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "google/protobuf/util/time_util.h"
#include "server/policy_yaml.h"
#include "server/rpc_status.h"
#include "server/status_watch.h"

namespace mobi {
namespace {

using google::protobuf::util::TimeUtil;

google::protobuf::Timestamp TimestampOf(WallTime time) {
  return TimeUtil::NanosecondsToTimestamp(
      std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count());
}

// INVALID_ARGUMENT names the field when the duration is not in [low, high].
absl::StatusOr<Duration> DurationOf(const std::string& field,
                                    const google::protobuf::Duration& value, Duration low,
                                    Duration high) {
  const double seconds = static_cast<double>(value.seconds()) + value.nanos() * 1e-9;
  if (seconds >= ToSeconds(low) && seconds <= ToSeconds(high)) {
    return std::chrono::seconds(value.seconds()) + std::chrono::nanoseconds(value.nanos());
  }
  return FieldError(field, absl::StrFormat("%g s is out of range [%g s, %g s]", seconds,
                                           ToSeconds(low), ToSeconds(high)));
}

v1::PrecisionMode ModeOf(ControlMode mode) {
  switch (mode) {
    case ControlMode::kFixed:
      return v1::PRECISION_MODE_FIXED;
    case ControlMode::kPolicy:
      return v1::PRECISION_MODE_POLICY;
    case ControlMode::kOverride:
      return v1::PRECISION_MODE_OVERRIDE;
  }
  return v1::PRECISION_MODE_UNSPECIFIED;
}

void FillPolicy(const PolicyVersion& version, v1::GetPolicyResponse& out) {
  out.set_yaml(version.yaml);
  out.set_generation(version.generation);
  out.set_source(version.source);
  *out.mutable_applied_at() = TimestampOf(version.applied_at);
}

void FillLoad(const ControlStatus& status, v1::LoadStatus& out) {
  const EngineStats& stats = status.engine;
  out.set_waiting_requests(stats.waiting_requests);
  out.set_waiting_tokens(stats.waiting_tokens);
  out.set_running_requests(stats.running_requests);
  if (stats.num_kv_blocks > 0) {
    out.set_kv_cache_usage(1 - static_cast<float>(stats.free_kv_blocks) /
                                   static_cast<float>(stats.num_kv_blocks));
  }
  out.set_tokens_per_second(status.tokens_per_second);
  out.set_prompt_tokens_per_second(status.prompt_tokens_per_second);
  out.set_step_ms(status.step_seconds * 1e3);
  out.set_ttft_p95_ms(status.ttft_p95_ms);
  out.set_itl_p95_ms(status.itl_p95_ms);
}

}  // namespace

grpc::ServerUnaryReactor* PrecisionService::GetPolicy(grpc::CallbackServerContext* context,
                                                      const v1::GetPolicyRequest*,
                                                      v1::GetPolicyResponse* response) {
  return Answer(context, [&] {
    FillPolicy(services_.controller.policy(), *response);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PrecisionService::SetPolicy(grpc::CallbackServerContext* context,
                                                      const v1::SetPolicyRequest* request,
                                                      v1::GetPolicyResponse* response) {
  return Answer(context, [&] {
    absl::Status status = DoSetPolicy(*request);
    if (status.ok()) FillPolicy(services_.controller.policy(), *response);
    return status;
  });
}

grpc::ServerUnaryReactor* PrecisionService::GetStatus(grpc::CallbackServerContext* context,
                                                      const v1::GetStatusRequest*,
                                                      v1::PrecisionStatus* response) {
  return Answer(context, [&] {
    *response = Status();
    return absl::OkStatus();
  });
}

grpc::ServerWriteReactor<v1::PrecisionStatus>* PrecisionService::WatchStatus(
    grpc::CallbackServerContext* context, const v1::WatchStatusRequest* request) {
  Duration interval = std::chrono::seconds(1);
  absl::Status status = services_.access.Check(*context, Scope::kAdmin);
  if (status.ok() && request->has_interval()) {
    const auto asked = DurationOf("interval", request->interval(), std::chrono::milliseconds(100),
                                  std::chrono::minutes(1));
    status = asked.status();
    if (asked.ok()) interval = *asked;
  }
  services_.metrics.RequestEnded(Method::kPrecision, status.code());
  if (status.ok()) return new StatusWatch(interval, [this] { return Status(); });
  class Refusal final : public grpc::ServerWriteReactor<v1::PrecisionStatus> {
   public:
    explicit Refusal(const absl::Status& status) { Finish(ToGrpcStatus(status)); }
    void OnDone() override { delete this; }
  };
  return new Refusal(status);
}

grpc::ServerUnaryReactor* PrecisionService::Override(grpc::CallbackServerContext* context,
                                                     const v1::OverrideRequest* request,
                                                     v1::PrecisionStatus* response) {
  return Answer(context, [&] {
    absl::Status status = DoOverride(*request);
    if (status.ok()) *response = Status();
    return status;
  });
}

grpc::ServerUnaryReactor* PrecisionService::Drain(grpc::CallbackServerContext* context,
                                                  const v1::DrainRequest* request,
                                                  v1::DrainResponse* response) {
  return Answer(context, [&] { return DoDrain(*request, *response); });
}

v1::PrecisionStatus PrecisionService::Status() const {
  const ControlStatus status = services_.controller.status();
  v1::PrecisionStatus out;
  *out.mutable_time() = TimestampOf(status.time);
  out.set_elastic(status.elastic);
  out.set_target_bits(status.target_bits);
  out.set_effective_bits(status.effective_bits);
  out.set_loaded_bits(status.loaded_bits);
  out.set_decode_loaded_bits(status.decode_loaded_bits);
  out.set_price(status.price);
  out.set_prompt_log_price_trim(status.log_price_trim[Regime::kPrompt]);
  out.set_log_price_trim(status.log_price_trim[Regime::kDecode]);
  out.set_coherent_log_price_trim(status.log_price_trim[Regime::kCoherent]);
  out.set_saturated(status.saturated);
  out.set_window(status.window.name);
  out.set_floor_bits(status.window.floor_bits);
  out.set_ceiling_bits(status.window.ceiling_bits);
  out.set_policy_generation(status.policy_generation);
  out.set_mode(ModeOf(status.mode));
  if (status.override_until) *out.mutable_override_until() = TimestampOf(*status.override_until);
  out.set_pressure(static_cast<float>(status.pressure));
  for (const SignalPressure& signal : status.signals) {
    v1::SignalPressure& added = *out.add_signals();
    added.set_name(signal.name);
    added.set_value(signal.value);
    added.set_reference(signal.reference);
    added.set_pressure(static_cast<float>(signal.pressure));
    added.set_stale(signal.stale);
  }
  out.set_bits_deficit(status.bits_deficit);
  out.set_seconds_below_floor(status.seconds_below_floor);
  out.set_resident_bits(BitsOfLevel(status.engine.resident_levels));
  out.set_resident_slice_bytes(status.engine.resident_slice_bytes);
  out.set_lent_kv_blocks(status.engine.lent_kv_blocks);
  out.set_slice_drops(status.engine.slice_drops);
  out.set_slice_restores(status.engine.slice_restores);
  FillLoad(status, *out.mutable_load());
  out.mutable_load()->set_ready(services_.state.ready());
  out.mutable_load()->set_draining(services_.state.draining());
  return out;
}

absl::Status PrecisionService::DoSetPolicy(const v1::SetPolicyRequest& request) {
  if (request.yaml().empty()) return FieldError("yaml", "is empty");
  const auto policy = ParsePolicy(request.yaml(), "policy");
  if (!policy.ok()) return FieldError("yaml", std::string(policy.status().message()));
  if (request.validate_only()) return services_.controller.Check(*policy);
  const std::optional<uint64_t> expected = request.has_expected_generation()
                                               ? std::optional(request.expected_generation())
                                               : std::nullopt;
  return services_.controller.SetPolicy({*policy, request.yaml(), "admin"}, expected);
}

absl::Status PrecisionService::DoOverride(const v1::OverrideRequest& request) {
  switch (request.action_case()) {
    case v1::OverrideRequest::kClear:
      services_.controller.ClearOverride();
      return absl::OkStatus();
    case v1::OverrideRequest::kTargetBits: {
      Duration ttl = std::chrono::minutes(15);
      if (request.has_ttl()) {
        MOBI_ASSIGN_OR_RETURN(
            ttl, DurationOf("ttl", request.ttl(), std::chrono::seconds(1), std::chrono::hours(24)));
      }
      return services_.controller.Override(request.target_bits(), ttl);
    }
    case v1::OverrideRequest::ACTION_NOT_SET:
      break;
  }
  return FieldError("action", "needs one of target_bits and clear");
}

absl::Status PrecisionService::DoDrain(const v1::DrainRequest& request,
                                       v1::DrainResponse& response) {
  if (request.undo()) {
    services_.state.StopDrain();
  } else {
    Duration grace = services_.default_drain_grace;
    if (request.has_grace()) {
      MOBI_ASSIGN_OR_RETURN(
          grace, DurationOf("grace", request.grace(), Duration::zero(), std::chrono::minutes(10)));
    }
    services_.state.StartDrain(services_.clock.Now() + grace);
  }
  response.set_running_requests(services_.registry.size());
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* PrecisionService::Answer(grpc::CallbackServerContext* context,
                                                   absl::FunctionRef<absl::Status()> work) const {
  absl::Status status = services_.access.Check(*context, Scope::kAdmin);
  if (status.ok()) status = work();
  services_.metrics.RequestEnded(Method::kPrecision, status.code());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

}  // namespace mobi
