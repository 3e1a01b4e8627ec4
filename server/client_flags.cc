#include "server/client_flags.h"

#include <string>

#include "absl/flags/flag.h"

ABSL_FLAG(std::string, tls_ca, "", "PEM file of the server's authority; turns TLS on.");
ABSL_FLAG(std::string, tls_cert, "", "PEM file of this client's certificate, for mTLS.");
ABSL_FLAG(std::string, tls_key, "", "PEM file of its key.");
ABSL_FLAG(std::string, tls_server_name, "",
          "Name the certificate must have; empty: the address's.");
ABSL_FLAG(std::string, token, "", "Bearer token; others on this machine may see it here.");
ABSL_FLAG(std::string, token_file, "", "File that holds it.");

namespace mobi {

absl::StatusOr<ClientSecurity> SecurityFromFlags() {
  return LoadClientSecurity({absl::GetFlag(FLAGS_tls_ca), absl::GetFlag(FLAGS_tls_cert),
                             absl::GetFlag(FLAGS_tls_key), absl::GetFlag(FLAGS_tls_server_name),
                             absl::GetFlag(FLAGS_token), absl::GetFlag(FLAGS_token_file)});
}

}  // namespace mobi
