// mobi.v1.Inference on the callback API: Generate hands over to a GenerateCall, the rest answers at
// once. First step of the generate walk. Thread-safe.
#ifndef MOBI_SERVER_INFERENCE_SERVICE_H_
#define MOBI_SERVER_INFERENCE_SERVICE_H_

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "grpcpp/support/server_callback.h"
#include "mobi/v1/inference.grpc.pb.h"
#include "server/generate_call.h"

namespace mobi {

class InferenceService final : public v1::Inference::CallbackService {
 public:
  explicit InferenceService(const CallServices& services) : services_(services) {}

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const v1::GetModelRequest* request,
                                     v1::GetModelResponse* response) override;

 private:
  absl::Status DoTokenize(const v1::TokenizeRequest& request, v1::TokenizeResponse& response) const;
  absl::Status DoDetokenize(const v1::DetokenizeRequest& request,
                            v1::DetokenizeResponse& response) const;
  absl::Status DoGetModel(v1::GetModelResponse& response) const;
  // Runs `work` if the caller may call, and finishes with its status.
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, Method method,
                                   absl::FunctionRef<absl::Status()> work) const;

  const CallServices services_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_INFERENCE_SERVICE_H_
