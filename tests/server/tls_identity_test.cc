#include "server/tls_identity.h"

#include <fstream>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/client.h"
#include "server/rpc_status.h"
#include "tests/engine/test_models.h"
#include "tests/server/certificates.h"
#include "tests/server/server_fixture.h"

namespace mobi {
namespace {

using ::testing::HasSubstr;

class TlsTest : public ::testing::Test {
 protected:
  // `client_ca` null: no mTLS.
  void StartServer(const TestCertificate& identity, const TestCertificate* client_ca = nullptr) {
    Write(identity);
    if (client_ca != nullptr) std::ofstream(dir_.Sub("clients.pem")) << client_ca->cert;
    ServerOptions options = TestServerOptions();
    options.tls = Options();
    if (client_ca == nullptr) options.tls.client_ca.clear();
    server_ = std::make_unique<TestServer>(ScriptedEngine::Options{.script = Says("x")}, options);
  }
  void Write(const TestCertificate& identity) {
    std::ofstream(dir_.Sub("cert.pem")) << identity.cert;
    std::ofstream(dir_.Sub("key.pem")) << identity.key;
  }
  TlsOptions Options() const {
    return {dir_.Sub("cert.pem"), dir_.Sub("key.pem"), dir_.Sub("clients.pem")};
  }
  // A new connection's first call.
  absl::Status Call(const ClientSecurity& security) const {
    const auto stub = v1::Inference::NewStub(ConnectNow(server_->address(), security));
    grpc::ClientContext context;
    SetDeadline(std::chrono::seconds(10), context);
    v1::GetModelResponse model;
    return FromGrpcStatus(stub->GetModel(&context, {}, &model));
  }
  static ClientSecurity Trusting(const TestCertificate& authority) {
    ClientSecurity security;
    security.tls = true;
    security.ca = authority.cert;
    return security;
  }
  static ClientSecurity With(ClientSecurity security, const TestCertificate& identity) {
    security.cert = identity.cert;
    security.key = identity.key;
    return security;
  }

  const TempDir dir_;
  const TestCertificate authority_ = MakeAuthority("ours");
  const TestCertificate stranger_ = MakeAuthority("theirs");
  std::unique_ptr<TestServer> server_;
};

TEST_F(TlsTest, ClientsKnowTheServer) {
  StartServer(MakeCertificate(authority_));
  EXPECT_TRUE(Call(Trusting(authority_)).ok()) << Call(Trusting(authority_));
  EXPECT_TRUE(absl::IsUnavailable(Call(Trusting(stranger_)))) << "wrong authority";
  EXPECT_TRUE(absl::IsUnavailable(Call({}))) << "plain text";
  ClientSecurity misnamed = Trusting(authority_);
  misnamed.server_name = "other.example";
  EXPECT_TRUE(absl::IsUnavailable(Call(misnamed))) << "wrong name";
  // The admin port speaks it too.
  const auto admin =
      v1::Precision::NewStub(ConnectTo(server_->admin_address(), Trusting(authority_)));
  grpc::ClientContext context;
  v1::PrecisionStatus status;
  EXPECT_TRUE(admin->GetStatus(&context, {}, &status).ok());
  // A whole stream, and an unencrypted one refused.
  const auto stub = v1::Inference::NewStub(ConnectTo(server_->address(), Trusting(authority_)));
  EXPECT_EQ(Collect(*stub, TextRequest("hello")).text[0], "x");
}

TEST_F(TlsTest, NamesOfTheCertificateCount) {
  StartServer(MakeCertificate(authority_, "DNS:model.example"));
  EXPECT_TRUE(absl::IsUnavailable(Call(Trusting(authority_))));
  ClientSecurity named = Trusting(authority_);
  named.server_name = "model.example";
  EXPECT_TRUE(Call(named).ok()) << Call(named);
}

TEST_F(TlsTest, MutualTlsWantsACertificateOfOurs) {
  StartServer(MakeCertificate(authority_), &authority_);
  const ClientSecurity trusting = Trusting(authority_);
  EXPECT_TRUE(absl::IsUnavailable(Call(trusting))) << "no certificate";
  EXPECT_TRUE(absl::IsUnavailable(Call(With(trusting, MakeCertificate(stranger_)))));
  EXPECT_TRUE(
      absl::IsUnavailable(Call(With(trusting, MakeCertificate(authority_, "IP:127.0.0.1", -60)))))
      << "expired";
  const absl::Status good = Call(With(trusting, MakeCertificate(authority_)));
  EXPECT_TRUE(good.ok()) << good;
}

TEST_F(TlsTest, NewFilesAreUsedForNewConnections) {
  StartServer(MakeCertificate(authority_), &authority_);
  const auto client = [&](const TestCertificate& server_ca, const TestCertificate& client_ca) {
    return Call(With(Trusting(server_ca), MakeCertificate(client_ca)));
  };
  EXPECT_TRUE(client(authority_, authority_).ok());
  // A key that is not the certificate's changes nothing.
  const TestCertificate next = MakeCertificate(stranger_);
  std::ofstream(dir_.Sub("key.pem")) << next.key;
  EXPECT_TRUE(Eventually([&] {
    return server_->MetricsText().find(
               "mobi_access_reloads_total{files=\"tls\",result=\"refused\"} 1") !=
           std::string::npos;
  }));
  EXPECT_TRUE(client(authority_, authority_).ok());
  // With its certificate, and authorities of clients that changed too.
  std::ofstream(dir_.Sub("clients.pem")) << stranger_.cert;
  std::ofstream(dir_.Sub("cert.pem")) << next.cert;
  EXPECT_TRUE(Eventually([&] { return client(stranger_, stranger_).ok(); }));
  EXPECT_TRUE(absl::IsUnavailable(client(authority_, stranger_)));
  EXPECT_TRUE(absl::IsUnavailable(client(stranger_, authority_)));
}

TEST_F(TlsTest, BadFilesAreRefusedByName) {
  const TestCertificate good = MakeCertificate(authority_);
  const TestCertificate other = MakeCertificate(authority_);
  struct Case {
    std::string cert, key, clients;
    const char* reason;
  };
  const Case cases[] = {
      {good.cert, other.key, authority_.cert, "cert.pem: its first certificate is not the key's"},
      {"rubbish", good.key, authority_.cert, "cert.pem: holds no PEM certificate"},
      {good.cert + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", good.key,
       authority_.cert, "cert.pem: certificate 2 cannot be read"},
      {good.cert, "rubbish", authority_.cert, "cert.pem: its key cannot be read"},
      {good.cert, good.key, "rubbish", "clients.pem: holds no PEM certificate"},
  };
  for (const Case& c : cases) {
    Write({c.cert, c.key});
    std::ofstream(dir_.Sub("clients.pem")) << c.clients;
    const auto identity = TlsIdentity::Open(Options());
    EXPECT_EQ(identity.status().code(), absl::StatusCode::kInvalidArgument) << c.reason;
    EXPECT_THAT(std::string(identity.status().message()), HasSubstr(c.reason));
  }
  Write(MakeCertificate(authority_, "IP:127.0.0.1", -60));
  std::ofstream(dir_.Sub("clients.pem")) << authority_.cert;
  EXPECT_THAT(std::string(TlsIdentity::Open(Options()).status().message()),
              HasSubstr("certificate 1 has expired"));
  EXPECT_EQ(TlsIdentity::Open({dir_.Sub("no"), dir_.Sub("key.pem"), ""}).status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace mobi
