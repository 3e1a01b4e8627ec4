// vllm.grpc.engine.VllmEngine over the same calls as mobi.v1.Inference: Generate is a GenerateCall
// with another wire, the rest answers at once. Thread-safe.
#ifndef MOBI_SERVER_VLLM_SERVICE_H_
#define MOBI_SERVER_VLLM_SERVICE_H_

#include <atomic>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "grpcpp/support/server_callback.h"
#include "server/generate_call.h"
#include "server/limits.h"
#include "vllm/grpc/engine/vllm_engine.grpc.pb.h"

namespace mobi {

class VllmService final : public ::vllm::grpc::engine::VllmEngine::CallbackService {
 public:
  explicit VllmService(const CallServices& services);

  grpc::ServerWriteReactor<::vllm::grpc::engine::GenerateResponse>* Generate(
      grpc::CallbackServerContext* context,
      const ::vllm::grpc::engine::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* HealthCheck(
      grpc::CallbackServerContext* context, const ::vllm::grpc::engine::HealthCheckRequest* request,
      ::vllm::grpc::engine::HealthCheckResponse* response) override;
  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context,
                                  const ::vllm::grpc::engine::AbortRequest* request,
                                  ::vllm::grpc::engine::AbortResponse* response) override;
  grpc::ServerUnaryReactor* GetModelInfo(
      grpc::CallbackServerContext* context,
      const ::vllm::grpc::engine::GetModelInfoRequest* request,
      ::vllm::grpc::engine::GetModelInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetServerInfo(
      grpc::CallbackServerContext* context,
      const ::vllm::grpc::engine::GetServerInfoRequest* request,
      ::vllm::grpc::engine::GetServerInfoResponse* response) override;

 private:
  absl::Status DoGetModelInfo(::vllm::grpc::engine::GetModelInfoResponse& response) const;
  // Runs `work` if the caller may call, and finishes with its status.
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context,
                                   absl::FunctionRef<absl::Status()> work) const;

  // The contract's default length is what fits, not a number.
  const RequestLimits limits_;
  const CallServices services_;
  const TimePoint start_;
  std::atomic<double> last_receive_{0};  // seconds since 1970
};

}  // namespace mobi

#endif  // MOBI_SERVER_VLLM_SERVICE_H_
