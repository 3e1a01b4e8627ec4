#include "server/client.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "server/rpc_status.h"

namespace mobi {

std::shared_ptr<grpc::Channel> Connect(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(64 << 20);
  arguments.SetUserAgentPrefix("mobictl");
  // Channels to one address would share a connection otherwise, and with it its limit of streams.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

void SetDeadline(Duration timeout, grpc::ClientContext& context) {
  if (timeout <= Duration::zero()) return;
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::duration_cast<std::chrono::system_clock::duration>(timeout));
}

std::string DescribeError(const absl::Status& status, const std::string& address) {
  if (absl::IsUnavailable(status) && !DetailOf<google::rpc::RetryInfo>(status)) {
    return absl::StrCat("no server at ", address, " (", status.message(), ")");
  }
  std::string text = absl::StrCat(absl::StatusCodeToString(status.code()), ": ", status.message());
  if (const auto bad = DetailOf<google::rpc::BadRequest>(status)) {
    for (int i = 1; i < bad->field_violations_size(); ++i) {  // the first is the message
      const auto& violation = bad->field_violations(i);
      absl::StrAppend(&text, "; ", violation.field(), ": ", violation.description());
    }
  }
  if (const auto retry = DetailOf<google::rpc::RetryInfo>(status)) {
    const double seconds =
        static_cast<double>(retry->retry_delay().seconds()) + retry->retry_delay().nanos() * 1e-9;
    absl::StrAppendFormat(&text, " (try again in %g s)", seconds);
  }
  return text;
}

absl::StatusOr<bool> CheckHealth(const std::string& address, const std::string& service,
                                 Duration timeout) {
  using grpc::health::v1::HealthCheckRequest;
  using grpc::health::v1::HealthCheckResponse;
  const auto stub = grpc::health::v1::Health::NewStub(Connect(address));
  grpc::ClientContext context;
  SetDeadline(timeout, context);
  HealthCheckRequest request;
  request.set_service(service);
  HealthCheckResponse response;
  if (auto status = FromGrpcStatus(stub->Check(&context, request, &response)); !status.ok()) {
    return status;
  }
  return response.status() == HealthCheckResponse::SERVING;
}

absl::StatusOr<v1::Summary> Generate(
    v1::Inference::StubInterface& stub, const v1::GenerateRequest& request, Duration timeout,
    const std::function<void(const v1::GenerateResponse&)>& on_message) {
  grpc::ClientContext context;
  SetDeadline(timeout, context);
  const auto reader = stub.Generate(&context, request);
  v1::GenerateResponse message;
  v1::Summary summary;
  while (reader->Read(&message)) {
    if (message.has_summary()) summary = message.summary();
    on_message(message);
  }
  if (auto status = FromGrpcStatus(reader->Finish()); !status.ok()) return status;
  return summary;
}

}  // namespace mobi
