// Between vllm.grpc.engine and mobi.v1: requests and the precision in their metadata one way,
// messages and field names the other. No call state beyond one request's output; one thread at a
// time. Field numbers and meanings as in proto/vllm/grpc/engine/vllm_engine.proto.
#ifndef MOBI_SERVER_VLLM_WIRE_H_
#define MOBI_SERVER_VLLM_WIRE_H_

#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "grpcpp/support/string_ref.h"
#include "mobi/v1/inference.pb.h"
#include "vllm/grpc/engine/vllm_engine.pb.h"

namespace mobi {

namespace vllm_pb = ::vllm::grpc::engine;

using ClientMetadata = std::multimap<grpc::string_ref, grpc::string_ref>;

// INVALID_ARGUMENT names what the contract has and we do not; ranges are left to the parser of
// ours.
absl::StatusOr<v1::GenerateRequest> FromVllm(const vllm_pb::GenerateRequest& request,
                                             const ClientMetadata& metadata);

// A refusal that names fields of ours, naming theirs.
absl::Status InVllmNames(const absl::Status& status);

// One request's messages in order.
class VllmResponses {
 public:
  explicit VllmResponses(bool stream) : stream_(stream) {}

  // What `message`, which may be taken apart, becomes; often nothing when not streaming.
  std::vector<vllm_pb::GenerateResponse> From(v1::GenerateResponse& message, int prompt_tokens);

 private:
  struct Completion {
    bool started = false;
    vllm_pb::GenerateComplete complete;
  };

  Completion& CompletionAt(int index);
  void Add(v1::Chunk& chunk, int prompt_tokens, std::vector<vllm_pb::GenerateResponse>& out);

  const bool stream_;
  vllm_pb::InputLogProbs prompt_;
  bool has_prompt_ = false;
  std::vector<Completion> completions_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_VLLM_WIRE_H_
