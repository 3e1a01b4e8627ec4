#include "server/kserve_service.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "server/rpc_status.h"
#include "server/version.h"

namespace mobi {
namespace {

constexpr char kOnlyVersion[] = "1";
constexpr int64_t kAnySize = -1;

bool IsServed(const std::string& name, const std::string& version, const ModelInfo& info) {
  return name == info.name && (version.empty() || version == kOnlyVersion);
}

void AddTensor(
    const char* name, const char* datatype,
    google::protobuf::RepeatedPtrField<inference::ModelMetadataResponse::TensorMetadata>& tensors) {
  auto& tensor = *tensors.Add();
  tensor.set_name(name);
  tensor.set_datatype(datatype);
  tensor.add_shape(kAnySize);
}

}  // namespace

grpc::ServerUnaryReactor* KserveService::ServerLive(grpc::CallbackServerContext* context,
                                                    const inference::ServerLiveRequest*,
                                                    inference::ServerLiveResponse* response) {
  return Answer(context, [&] {
    response->set_live(true);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KserveService::ServerReady(grpc::CallbackServerContext* context,
                                                     const inference::ServerReadyRequest*,
                                                     inference::ServerReadyResponse* response) {
  return Answer(context, [&] {
    response->set_ready(state_.ready());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KserveService::ModelReady(grpc::CallbackServerContext* context,
                                                    const inference::ModelReadyRequest* request,
                                                    inference::ModelReadyResponse* response) {
  return Answer(context, [&] {
    const auto model = state_.model();
    response->set_ready(model.ok() && state_.ready() &&
                        IsServed(request->name(), request->version(), (*model)->info));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KserveService::ServerMetadata(
    grpc::CallbackServerContext* context, const inference::ServerMetadataRequest*,
    inference::ServerMetadataResponse* response) {
  return Answer(context, [&] {
    response->set_name("mobi-server");
    response->set_version(kServerVersion);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KserveService::ModelMetadata(
    grpc::CallbackServerContext* context, const inference::ModelMetadataRequest* request,
    inference::ModelMetadataResponse* response) {
  return Answer(context, [&] { return DoModelMetadata(*request, *context, *response); });
}

absl::Status KserveService::DoModelMetadata(const inference::ModelMetadataRequest& request,
                                            grpc::CallbackServerContext& context,
                                            inference::ModelMetadataResponse& response) const {
  MOBI_ASSIGN_OR_RETURN(const ServedModel* model, state_.model());
  const ModelInfo& info = model->info;
  if (!IsServed(request.name(), request.version(), info)) {
    return absl::NotFoundError(absl::StrFormat("name: unknown, this server has \"%s\" version %s",
                                               info.name, kOnlyVersion));
  }
  response.set_name(info.name);
  response.add_versions(kOnlyVersion);
  response.set_platform(absl::StrCat("mobiserve_", info.backend));
  AddTensor("text_input", "BYTES", *response.mutable_inputs());
  AddTensor("text_output", "BYTES", *response.mutable_outputs());
  const ControlStatus control = controller_.status();
  context.AddInitialMetadata("mobi-elastic", info.elastic ? "true" : "false");
  for (const auto& [key, bits] :
       {std::pair{"mobi-min-bits", info.elastic ? kLowestBits : control.effective_bits},
        std::pair{"mobi-max-bits", info.elastic ? kHighestBits : control.effective_bits},
        std::pair{"mobi-target-bits", control.target_bits},
        std::pair{"mobi-effective-bits", control.effective_bits}}) {
    context.AddInitialMetadata(key, absl::StrFormat("%g", bits));
  }
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* KserveService::Answer(grpc::CallbackServerContext* context,
                                                absl::FunctionRef<absl::Status()> work) const {
  absl::Status status = access_.Check(*context, Scope::kGenerate);
  if (status.ok()) status = work();
  metrics_.RequestEnded(Method::kKserve, status.code());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

}  // namespace mobi
