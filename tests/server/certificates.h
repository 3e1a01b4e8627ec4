// Certificates made on the spot, for tests of TLS: authorities, servers, clients, expired ones.
#ifndef MOBI_TESTS_SERVER_CERTIFICATES_H_
#define MOBI_TESTS_SERVER_CERTIFICATES_H_

#include <string>

namespace mobi {

struct TestCertificate {
  std::string cert;  // PEM
  std::string key;   // PEM, P-256
};

// Signs itself.
TestCertificate MakeAuthority(const std::string& name);

// Valid for `alt_names` as OpenSSL writes them ("IP:127.0.0.1,DNS:localhost") from an hour ago
// until `seconds` from now.
TestCertificate MakeCertificate(const TestCertificate& authority,
                                const std::string& alt_names = "IP:127.0.0.1", long seconds = 3600);

}  // namespace mobi

#endif  // MOBI_TESTS_SERVER_CERTIFICATES_H_
