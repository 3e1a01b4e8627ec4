// What the command-line clients share: a channel, statuses as one line for a person, and one
// generation streamed to a callback. Blocking; one thread per call.
#ifndef MOBI_SERVER_CLIENT_H_
#define MOBI_SERVER_CLIENT_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "mobi/v1/inference.grpc.pb.h"

namespace mobi {

// How a client proves who it is and knows the server. PEM texts, not paths.
struct ClientSecurity {
  bool tls = false;
  std::string ca;    // empty: the system's authorities
  std::string cert;  // with `key`: for mTLS
  std::string key;
  std::string server_name;  // that the server's certificate must have; empty: the address's
  std::string token;        // bearer token; empty: none
};

// Names of files; `token` is the token itself.
struct ClientSecurityFiles {
  std::string ca, cert, key, server_name, token, token_file;
};

// INVALID_ARGUMENT: contradictory, or a file that cannot be read, by name. TLS is on as soon as one
// of its files is named.
absl::StatusOr<ClientSecurity> LoadClientSecurity(const ClientSecurityFiles& files);

// A connection of its own, made lazily; messages up to 64 MiB are taken. Every call brings the
// token.
std::shared_ptr<grpc::Channel> Connect(const std::string& address,
                                       const ClientSecurity& security = {});

// The same, connected before it returns where that is possible. Nobody listening shows after half a
// second, an address that does not answer after five; the first call then fails with the reason.
std::shared_ptr<grpc::Channel> ConnectNow(const std::string& address,
                                          const ClientSecurity& security = {});
// The wait of it, for a channel that exists. gRPC 1.51 now and then takes a connection under way
// for a failed one, because it looks at errno after calls that may change it; so a failure is
// believed only when retries for `retry_failed` have failed too.
void AwaitConnection(grpc::Channel& channel,
                     Duration retry_failed = std::chrono::milliseconds(500));

// Zero: no deadline.
void SetDeadline(Duration timeout, grpc::ClientContext& context);

// "INVALID_ARGUMENT: sampling.top_p: 2 is out of range (0, 1]", and when to try again.
std::string DescribeError(const absl::Status& status, const std::string& address);

// Whether `service` ("" is the process) is SERVING by grpc.health.v1.
absl::StatusOr<bool> CheckHealth(const std::string& address, const std::string& service,
                                 Duration timeout, const ClientSecurity& security = {});

// Streams one generation to `on_message`; the summary is empty when the server sent none.
absl::StatusOr<v1::Summary> Generate(
    v1::Inference::StubInterface& stub, const v1::GenerateRequest& request, Duration timeout,
    const std::function<void(const v1::GenerateResponse&)>& on_message);

}  // namespace mobi

#endif  // MOBI_SERVER_CLIENT_H_
