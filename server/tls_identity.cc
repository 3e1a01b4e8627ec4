#include "server/tls_identity.h"

#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "grpcpp/security/tls_certificate_provider.h"
#include "grpcpp/security/tls_credentials_options.h"

namespace mobi {
namespace {

using grpc::experimental::FileWatcherCertificateProvider;

constexpr unsigned kRefreshSeconds = 1;

struct FreeBio {
  void operator()(BIO* bio) const { BIO_free(bio); }
};
struct FreeX509 {
  void operator()(X509* x509) const { X509_free(x509); }
};
struct FreeKey {
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
};
using Certificate = std::unique_ptr<X509, FreeX509>;

std::unique_ptr<BIO, FreeBio> BioOf(const std::string& pem) {
  return std::unique_ptr<BIO, FreeBio>(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
}

// A key with a passphrase is refused rather than asked about on a terminal.
int NoPassphrase(char*, int, int, void*) { return -1; }

absl::StatusOr<std::vector<Certificate>> ParseCertificates(const std::string& pem) {
  const auto clear_errors = absl::MakeCleanup([] { ERR_clear_error(); });
  const auto bio = BioOf(pem);
  std::vector<Certificate> certificates;
  while (X509* x509 = PEM_read_bio_X509(bio.get(), nullptr, NoPassphrase, nullptr)) {
    certificates.emplace_back(x509);
  }
  const bool at_end = ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
  if (certificates.empty()) return absl::InvalidArgumentError("holds no PEM certificate");
  if (!at_end) {
    return absl::InvalidArgumentError(
        absl::StrCat("certificate ", certificates.size() + 1, " cannot be read"));
  }
  return certificates;
}

absl::Status AtFile(const std::string& path, const absl::Status& status) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
}

std::string PathOf(int fd) { return absl::StrCat("/proc/self/fd/", fd); }

}  // namespace

absl::Status CheckTlsIdentity(const std::string& cert_pem, const std::string& key_pem) {
  MOBI_ASSIGN_OR_RETURN(const std::vector<Certificate> chain, ParseCertificates(cert_pem));
  for (size_t i = 0; i < chain.size(); ++i) {
    if (X509_cmp_current_time(X509_get0_notAfter(chain[i].get())) <= 0) {
      return absl::InvalidArgumentError(absl::StrCat("certificate ", i + 1, " has expired"));
    }
  }
  const auto clear_errors = absl::MakeCleanup([] { ERR_clear_error(); });
  const auto bio = BioOf(key_pem);
  const std::unique_ptr<EVP_PKEY, FreeKey> key(
      PEM_read_bio_PrivateKey(bio.get(), nullptr, NoPassphrase, nullptr));
  if (key == nullptr) {
    return absl::InvalidArgumentError("its key cannot be read: not PEM, or with a passphrase");
  }
  if (X509_check_private_key(chain[0].get(), key.get()) != 1) {
    return absl::InvalidArgumentError("its first certificate is not the key's");
  }
  return absl::OkStatus();
}

absl::Status CheckTlsAuthorities(const std::string& pem) { return ParseCertificates(pem).status(); }

TlsIdentity::TlsIdentity(const TlsOptions& options)
    : options_(options),
      files_(options.client_ca.empty()
                 ? std::vector<std::string>{options.cert, options.key}
                 : std::vector<std::string>{options.cert, options.key, options.client_ca}) {}

TlsIdentity::~TlsIdentity() {
  for (const int fd : {identity_fd_, authorities_fd_}) {
    if (fd >= 0) close(fd);
  }
}

absl::StatusOr<std::unique_ptr<TlsIdentity>> TlsIdentity::Open(const TlsOptions& options) {
  std::unique_ptr<TlsIdentity> identity(new TlsIdentity(options));
  MOBI_RETURN_IF_ERROR(identity->Reload().status());
  return identity;
}

std::shared_ptr<grpc::ServerCredentials> TlsIdentity::Credentials() const {
  const std::string identity = PathOf(identity_fd_);
  const bool mutual = authorities_fd_ >= 0;
  grpc::experimental::TlsServerCredentialsOptions options(
      std::make_shared<FileWatcherCertificateProvider>(
          identity, identity, mutual ? PathOf(authorities_fd_) : "", kRefreshSeconds));
  options.watch_identity_key_cert_pairs();
  if (mutual) {
    options.watch_root_certs();
    options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  }
  return grpc::experimental::TlsServerCredentials(options);
}

absl::StatusOr<bool> TlsIdentity::Reload() {
  MOBI_ASSIGN_OR_RETURN(const auto texts, files_.Read());
  if (!texts) return false;
  const std::string& cert = (*texts)[0];
  const std::string& key = (*texts)[1];
  MOBI_RETURN_IF_ERROR(AtFile(options_.cert, CheckTlsIdentity(cert, key)));
  const bool mutual = texts->size() > 2;
  if (mutual) MOBI_RETURN_IF_ERROR(AtFile(options_.client_ca, CheckTlsAuthorities((*texts)[2])));
  ++generation_;
  MOBI_RETURN_IF_ERROR(Publish(absl::StrCat(cert, "\n", key, "\n"), identity_fd_));
  if (mutual) MOBI_RETURN_IF_ERROR(Publish((*texts)[2], authorities_fd_));
  return true;
}

absl::Status TlsIdentity::Publish(std::string_view pem, int& fd) {
  const int fresh = memfd_create("tls", MFD_CLOEXEC);
  if (fresh < 0) return absl::ErrnoToStatus(errno, "memfd_create");
  auto close_fresh = absl::MakeCleanup([fresh] { close(fresh); });
  for (std::string_view rest = pem; !rest.empty();) {
    const ssize_t count = write(fresh, rest.data(), rest.size());
    if (count < 0) return absl::ErrnoToStatus(errno, "memfd");
    rest.remove_prefix(static_cast<size_t>(count));
  }
  const timespec times[2] = {{.tv_sec = generation_, .tv_nsec = 0},
                             {.tv_sec = generation_, .tv_nsec = 0}};
  if (futimens(fresh, times) != 0) return absl::ErrnoToStatus(errno, "memfd");
  if (fd < 0) {
    std::move(close_fresh).Cancel();
    fd = fresh;
    return absl::OkStatus();
  }
  // The number now leads to the new file; who reads the old one has it open.
  if (dup3(fresh, fd, O_CLOEXEC) < 0) return absl::ErrnoToStatus(errno, "dup3");
  return absl::OkStatus();
}

}  // namespace mobi
