// inference.GRPCInferenceService: health and metadata of the KServe v2 protocol, answered from the
// serving state. Thread-safe.
#ifndef MOBI_SERVER_KSERVE_SERVICE_H_
#define MOBI_SERVER_KSERVE_SERVICE_H_

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "grpcpp/support/server_callback.h"
#include "inference/kserve.grpc.pb.h"
#include "server/access_control.h"
#include "server/controller.h"
#include "server/metrics.h"
#include "server/serving_state.h"

namespace mobi {

class KserveService final : public inference::GRPCInferenceService::CallbackService {
 public:
  KserveService(const AccessControl& access, const ServingState& state,
                const Controller& controller, Metrics& metrics)
      : access_(access), state_(state), controller_(controller), metrics_(metrics) {}

  grpc::ServerUnaryReactor* ServerLive(grpc::CallbackServerContext* context,
                                       const inference::ServerLiveRequest* request,
                                       inference::ServerLiveResponse* response) override;
  grpc::ServerUnaryReactor* ServerReady(grpc::CallbackServerContext* context,
                                        const inference::ServerReadyRequest* request,
                                        inference::ServerReadyResponse* response) override;
  grpc::ServerUnaryReactor* ModelReady(grpc::CallbackServerContext* context,
                                       const inference::ModelReadyRequest* request,
                                       inference::ModelReadyResponse* response) override;
  grpc::ServerUnaryReactor* ServerMetadata(grpc::CallbackServerContext* context,
                                           const inference::ServerMetadataRequest* request,
                                           inference::ServerMetadataResponse* response) override;
  grpc::ServerUnaryReactor* ModelMetadata(grpc::CallbackServerContext* context,
                                          const inference::ModelMetadataRequest* request,
                                          inference::ModelMetadataResponse* response) override;

 private:
  absl::Status DoModelMetadata(const inference::ModelMetadataRequest& request,
                               grpc::CallbackServerContext& context,
                               inference::ModelMetadataResponse& response) const;
  // Runs `work` if the caller may call, and finishes with its status.
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context,
                                   absl::FunctionRef<absl::Status()> work) const;

  const AccessControl& access_;
  const ServingState& state_;
  const Controller& controller_;
  Metrics& metrics_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_KSERVE_SERVICE_H_
