// The flags by which every command-line client of ours is trusted and trusts: TLS, mTLS and the
// bearer token. A program has them as soon as it links this file (see ParseFlags). Main thread
// only.
#ifndef MOBI_SERVER_CLIENT_FLAGS_H_
#define MOBI_SERVER_CLIENT_FLAGS_H_

#include "absl/status/statusor.h"
#include "server/client.h"

namespace mobi {

// As LoadClientSecurity, from --tls_ca, --tls_cert, --tls_key, --tls_server_name, --token and
// --token_file.
absl::StatusOr<ClientSecurity> SecurityFromFlags();

}  // namespace mobi

#endif  // MOBI_SERVER_CLIENT_FLAGS_H_
