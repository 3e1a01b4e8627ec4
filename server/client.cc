#include "server/client.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/support/client_interceptor.h"
#include "server/rpc_status.h"

namespace mobi {

namespace {

namespace experimental = grpc::experimental;

constexpr int kConnectTimeoutMs = 5000;
constexpr int kFirstRetryMs = 100;

// gRPC's own call credentials need TLS; a token may as well travel to a proxy on loopback.
class BearerToken final : public experimental::Interceptor {
 public:
  explicit BearerToken(const std::string& header) : header_(header) {}
  void Intercept(experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(
            experimental::InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->emplace("authorization", header_);
    }
    methods->Proceed();
  }

 private:
  const std::string& header_;
};

class BearerTokenFactory final : public experimental::ClientInterceptorFactoryInterface {
 public:
  explicit BearerTokenFactory(const std::string& token) : header_("Bearer " + token) {}
  experimental::Interceptor* CreateClientInterceptor(experimental::ClientRpcInfo*) override {
    return new BearerToken(header_);
  }

 private:
  const std::string header_;
};

absl::StatusOr<std::string> ReadFileOf(const std::string& flag, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(std::istreambuf_iterator<char>(file), {});
  if (file.bad() || !file.is_open() || text.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("--", flag, ": cannot read ", path));
  }
  return text;
}

}  // namespace

absl::StatusOr<ClientSecurity> LoadClientSecurity(const ClientSecurityFiles& files) {
  ClientSecurity security;
  const std::pair<const char*, std::pair<const std::string*, std::string*>> pems[] = {
      {"tls_ca", {&files.ca, &security.ca}},
      {"tls_cert", {&files.cert, &security.cert}},
      {"tls_key", {&files.key, &security.key}}};
  for (const auto& [flag, pem] : pems) {
    if (pem.first->empty()) continue;
    security.tls = true;
    MOBI_ASSIGN_OR_RETURN(*pem.second, ReadFileOf(flag, *pem.first));
  }
  if (security.cert.empty() != security.key.empty()) {
    return absl::InvalidArgumentError("--tls_cert and --tls_key: one needs the other");
  }
  security.server_name = files.server_name;
  if (!files.token.empty() && !files.token_file.empty()) {
    return absl::InvalidArgumentError("--token and --token_file exclude each other");
  }
  security.token = files.token;
  if (!files.token_file.empty()) {
    MOBI_ASSIGN_OR_RETURN(security.token, ReadFileOf("token_file", files.token_file));
    absl::StripAsciiWhitespace(&security.token);
  }
  const bool printable = std::all_of(security.token.begin(), security.token.end(),
                                     [](char c) { return absl::ascii_isgraph(c); });
  if (!printable) return absl::InvalidArgumentError("--token: has characters outside ASCII's");
  return security;
}

std::shared_ptr<grpc::Channel> Connect(const std::string& address, const ClientSecurity& security) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(64 << 20);
  arguments.SetUserAgentPrefix("mobictl");
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS,
                   kConnectTimeoutMs);  // of one attempt, in fact
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kFirstRetryMs);
  // Channels to one address would share a connection otherwise, and with it its limit of streams.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  if (!security.server_name.empty()) arguments.SetSslTargetNameOverride(security.server_name);
  const auto credentials = security.tls
                               ? grpc::SslCredentials({security.ca, security.key, security.cert})
                               : grpc::InsecureChannelCredentials();
  if (security.token.empty()) return grpc::CreateCustomChannel(address, credentials, arguments);
  std::vector<std::unique_ptr<experimental::ClientInterceptorFactoryInterface>> interceptors;
  interceptors.push_back(std::make_unique<BearerTokenFactory>(security.token));
  return experimental::CreateCustomChannelWithInterceptors(address, credentials, arguments,
                                                           std::move(interceptors));
}

std::shared_ptr<grpc::Channel> ConnectNow(const std::string& address,
                                          const ClientSecurity& security) {
  auto channel = Connect(address, security);
  AwaitConnection(*channel);
  return channel;
}

void AwaitConnection(grpc::Channel& channel, Duration retry_failed) {
  auto end = std::chrono::system_clock::time_point::max();
  for (bool failed = false;;) {
    const grpc_connectivity_state state = channel.GetState(/*try_to_connect=*/true);
    if (state == GRPC_CHANNEL_READY) return;
    if (state == GRPC_CHANNEL_TRANSIENT_FAILURE && !failed) {
      failed = true;
      end = std::chrono::system_clock::now() +
            std::chrono::duration_cast<std::chrono::system_clock::duration>(retry_failed);
    }
    if (!channel.WaitForStateChange(state, end)) return;
  }
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
                                 Duration timeout, const ClientSecurity& security) {
  using grpc::health::v1::HealthCheckRequest;
  using grpc::health::v1::HealthCheckResponse;
  const auto stub = grpc::health::v1::Health::NewStub(ConnectNow(address, security));
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
