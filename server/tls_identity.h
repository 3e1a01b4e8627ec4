// The server's TLS: certificate chain, key and, for mTLS, the authorities of clients, from PEM
// files that are taken over again when they change. New files are checked as a whole first: a bad
// or half-written set leaves the old one in use. Connections that exist keep what they have.
#ifndef MOBI_SERVER_TLS_IDENTITY_H_
#define MOBI_SERVER_TLS_IDENTITY_H_

#include <ctime>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "grpcpp/security/server_credentials.h"
#include "server/watched_files.h"

namespace mobi {

struct TlsOptions {
  std::string cert;       // chain, leaf first; empty: no TLS
  std::string key;        // of the leaf, without a passphrase
  std::string client_ca;  // not empty: clients must have a certificate of one of these (mTLS)

  bool enabled() const { return !cert.empty(); }
};

// The key is the leaf's, and nothing has expired.
absl::Status CheckTlsIdentity(const std::string& cert_pem, const std::string& key_pem);
// One certificate at least, and all can be read.
absl::Status CheckTlsAuthorities(const std::string& pem);

class TlsIdentity {
 public:
  // INVALID_ARGUMENT and errors of the system name the file.
  static absl::StatusOr<std::unique_ptr<TlsIdentity>> Open(const TlsOptions& options);
  ~TlsIdentity();
  TlsIdentity(const TlsIdentity&) = delete;
  TlsIdentity& operator=(const TlsIdentity&) = delete;

  // For any number of ports; must not be used longer than this.
  std::shared_ptr<grpc::ServerCredentials> Credentials() const;

  // Takes the files over when they changed: true, and new connections see them within about a
  // second. An error says why the old ones stay. For one thread at a time.
  absl::StatusOr<bool> Reload();

 private:
  explicit TlsIdentity(const TlsOptions& options);
  // gRPC reads files on a timer of its own, one by one and unchecked. So it is shown copies in
  // memory: certificate and key in one file, which is replaced at once.
  absl::Status Publish(std::string_view pem, int& fd);

  const TlsOptions options_;
  WatchedFiles files_;
  int identity_fd_ = -1;
  int authorities_fd_ = -1;
  time_t generation_ = 0;  // gRPC tells files apart by their time
};

}  // namespace mobi

#endif  // MOBI_SERVER_TLS_IDENTITY_H_
