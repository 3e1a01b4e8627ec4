// mobi.v1.Precision on the callback API, for the admin port: policy, override, drain and status.
// A thin face of Controller and ServingState. Thread-safe.
#ifndef MOBI_SERVER_PRECISION_SERVICE_H_
#define MOBI_SERVER_PRECISION_SERVICE_H_

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "engine/base/clock.h"
#include "mobi/v1/precision.grpc.pb.h"
#include "server/access_control.h"
#include "server/call_registry.h"
#include "server/controller.h"
#include "server/metrics.h"
#include "server/serving_state.h"

namespace mobi {

struct PrecisionServices {
  const AccessControl& access;
  Controller& controller;
  ServingState& state;
  const CallRegistry& registry;
  Metrics& metrics;
  const Clock& clock;
  Duration default_drain_grace;
};

class PrecisionService final : public v1::Precision::CallbackService {
 public:
  explicit PrecisionService(const PrecisionServices& services) : services_(services) {}

  grpc::ServerUnaryReactor* GetPolicy(grpc::CallbackServerContext* context,
                                      const v1::GetPolicyRequest* request,
                                      v1::GetPolicyResponse* response) override;
  grpc::ServerUnaryReactor* SetPolicy(grpc::CallbackServerContext* context,
                                      const v1::SetPolicyRequest* request,
                                      v1::GetPolicyResponse* response) override;
  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context,
                                      const v1::GetStatusRequest* request,
                                      v1::PrecisionStatus* response) override;
  grpc::ServerWriteReactor<v1::PrecisionStatus>* WatchStatus(
      grpc::CallbackServerContext* context, const v1::WatchStatusRequest* request) override;
  grpc::ServerUnaryReactor* Override(grpc::CallbackServerContext* context,
                                     const v1::OverrideRequest* request,
                                     v1::PrecisionStatus* response) override;
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context,
                                  const v1::DrainRequest* request,
                                  v1::DrainResponse* response) override;

  v1::PrecisionStatus Status() const;

 private:
  absl::Status DoSetPolicy(const v1::SetPolicyRequest& request);
  absl::Status DoOverride(const v1::OverrideRequest& request);
  absl::Status DoDrain(const v1::DrainRequest& request, v1::DrainResponse& response);
  // Runs `work` if the caller may call, and finishes with its status.
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context,
                                   absl::FunctionRef<absl::Status()> work) const;

  const PrecisionServices services_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_PRECISION_SERVICE_H_
