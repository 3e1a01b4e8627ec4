#include "server/access_control.h"

#include <fstream>

#include "absl/strings/str_cat.h"
#include "engine/base/sha256.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "inference/kserve.grpc.pb.h"
#include "server/client.h"
#include "server/rpc_status.h"
#include "tests/engine/test_models.h"
#include "tests/server/server_fixture.h"
#include "vllm/grpc/engine/vllm_engine.grpc.pb.h"

namespace mobi {
namespace {

using ::testing::HasSubstr;

std::string HashOf(const std::string& token) {
  Sha256 hash;
  hash.Update(absl::MakeSpan(reinterpret_cast<const std::byte*>(token.data()), token.size()));
  return hash.HexDigest();
}

std::string Line(const std::string& name, const std::string& scopes, const std::string& token) {
  return absl::StrCat(name, "\t", scopes, "  ", HashOf(token), "\n");
}

ClientSecurity WithToken(const std::string& token) {
  ClientSecurity security;
  security.token = token;
  return security;
}

class AccessControlTest : public ::testing::Test {
 protected:
  void Write(const std::string& text) { std::ofstream(path_) << text; }
  std::unique_ptr<AccessControl> Open() {
    auto access = AccessControl::Open(path_);
    EXPECT_TRUE(access.ok()) << access.status();
    return *std::move(access);
  }

  const TempDir dir_;
  const std::string path_ = dir_.Sub("tokens");
};

TEST_F(AccessControlTest, TokensHaveScopes) {
  Write("# who may call\n\n" + Line("shop", "generate", "apple") + Line("ops", "admin", "pear") +
        Line("both", "admin,generate", "plum"));
  const auto access = Open();
  struct Case {
    std::optional<std::string_view> header;
    absl::StatusCode generate;
    absl::StatusCode admin;
  };
  constexpr auto kOk = absl::StatusCode::kOk;
  constexpr auto kUnknown = absl::StatusCode::kUnauthenticated;
  constexpr auto kDenied = absl::StatusCode::kPermissionDenied;
  const Case cases[] = {
      {std::nullopt, kUnknown, kUnknown},
      {"", kUnknown, kUnknown},
      {"apple", kUnknown, kUnknown},
      {"Basic apple", kUnknown, kUnknown},
      {"Bearer ", kUnknown, kUnknown},
      {"Bearer appl", kUnknown, kUnknown},
      {"Bearer apple ", kUnknown, kUnknown},
      {"Bearer apple", kOk, kDenied},
      {"bearer apple", kOk, kDenied},
      {"Bearer pear", kDenied, kOk},
      {"Bearer plum", kOk, kOk},
  };
  for (const Case& c : cases) {
    const std::string shown(c.header.value_or("none"));
    EXPECT_EQ(access->CheckHeader(c.header, Scope::kGenerate).code(), c.generate) << shown;
    EXPECT_EQ(access->CheckHeader(c.header, Scope::kAdmin).code(), c.admin) << shown;
  }
}

TEST_F(AccessControlTest, WithoutAFileAllMayCall) {
  const auto access = AccessControl::Open("");
  ASSERT_TRUE(access.ok());
  EXPECT_TRUE((*access)->CheckHeader(std::nullopt, Scope::kAdmin).ok());
}

TEST_F(AccessControlTest, BadFilesAreRefusedByLine) {
  const std::string good = Line("shop", "generate", "apple");
  const std::pair<std::string, const char*> cases[] = {
      {"", "has no token"},
      {"# nothing\n", "has no token"},
      {good + "shop generate\n", ":2: has 2 fields"},
      {good + "\nshop generate secret\n", ":3: the third field is not a SHA-256"},
      {"shop write " + HashOf("x"), ":1: scope \"write\" is neither"},
      {"shop generate, " + HashOf("x"), ":1: scope \"\" is neither"},
      {"shop generate " + std::string(64, 'g'), ":1: the third field"},
  };
  for (const auto& [text, reason] : cases) {
    Write(text);
    const auto access = AccessControl::Open(path_);
    EXPECT_EQ(access.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(access.status().message()), HasSubstr(reason)) << text;
  }
  EXPECT_EQ(AccessControl::Open(dir_.Sub("none")).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(AccessControlTest, AChangedFileIsTakenOverWhenItIsGood) {
  Write(Line("a", "generate", "apple"));
  const auto access = Open();
  const auto may = [&](const std::string& token) {
    return access->CheckHeader("Bearer " + token, Scope::kGenerate).ok();
  };
  EXPECT_FALSE(*access->Reload());
  Write("rubbish\n");
  EXPECT_FALSE(access->Reload().ok());
  EXPECT_TRUE(access->Reload().ok()) << "an error comes once";
  EXPECT_TRUE(may("apple"));
  Write(Line("b", "generate", "pear"));
  EXPECT_TRUE(*access->Reload());
  EXPECT_FALSE(may("apple"));
  EXPECT_TRUE(may("pear"));
}

// Every method of every service, through the server.
class ServerAccessTest : public AccessControlTest {
 protected:
  void SetUp() override {
    Write(Line("app", "generate", "apple") + Line("ops", "admin", "pear"));
    ServerOptions options = TestServerOptions();
    options.token_file = path_;
    server_ = std::make_unique<TestServer>(ScriptedEngine::Options{.script = Says("x")}, options);
  }

  template <typename Service, typename Request, typename Response>
  absl::StatusCode Code(const std::string& address, const std::string& token,
                        grpc::Status (Service::Stub::*method)(grpc::ClientContext*, const Request&,
                                                              Response*)) {
    const auto stub = Service::NewStub(ConnectTo(address, WithToken(token)));
    grpc::ClientContext context;
    Response response;
    return FromGrpcStatus((stub.get()->*method)(&context, Request(), &response)).code();
  }
  // Of all methods on the data port, in one order.
  std::vector<absl::StatusCode> DataCodes(const std::string& token) {
    namespace pb = ::vllm::grpc::engine;
    using I = v1::Inference;
    using V = pb::VllmEngine;
    using K = inference::GRPCInferenceService;
    const std::string address = server_->address();
    std::vector<absl::StatusCode> codes = {
        Code<I>(address, token, &I::Stub::Tokenize),
        Code<I>(address, token, &I::Stub::Detokenize),
        Code<I>(address, token, &I::Stub::GetModel),
        Code<V>(address, token, &V::Stub::HealthCheck),
        Code<V>(address, token, &V::Stub::Abort),
        Code<V>(address, token, &V::Stub::GetModelInfo),
        Code<V>(address, token, &V::Stub::GetServerInfo),
        Code<K>(address, token, &K::Stub::ServerLive),
        Code<K>(address, token, &K::Stub::ServerReady),
        Code<K>(address, token, &K::Stub::ModelReady),
        Code<K>(address, token, &K::Stub::ServerMetadata),
        Code<K>(address, token, &K::Stub::ModelMetadata),
    };
    const auto channel = ConnectTo(address, WithToken(token));
    codes.push_back(Collect(*I::NewStub(channel), TextRequest("hello", 3)).status.code());
    grpc::ClientContext context;
    pb::GenerateRequest request;
    request.set_text("hello");
    const auto reader = V::NewStub(channel)->Generate(&context, request);
    pb::GenerateResponse response;
    while (reader->Read(&response)) {
    }
    codes.push_back(FromGrpcStatus(reader->Finish()).code());
    return codes;
  }
  std::vector<absl::StatusCode> AdminCodes(const std::string& token) {
    using P = v1::Precision;
    const std::string address = server_->admin_address();
    std::vector<absl::StatusCode> codes = {
        Code<P>(address, token, &P::Stub::GetPolicy), Code<P>(address, token, &P::Stub::SetPolicy),
        Code<P>(address, token, &P::Stub::GetStatus), Code<P>(address, token, &P::Stub::Override),
        Code<P>(address, token, &P::Stub::Drain)};
    const auto stub = P::NewStub(ConnectTo(address, WithToken(token)));
    grpc::ClientContext context;
    const auto reader = stub->WatchStatus(&context, {});
    v1::PrecisionStatus status;
    const bool watched = reader->Read(&status);
    if (watched) context.TryCancel();
    const absl::StatusCode end = FromGrpcStatus(reader->Finish()).code();
    codes.push_back(watched ? absl::StatusCode::kOk : end);
    return codes;
  }

  std::unique_ptr<TestServer> server_;
};

TEST_F(ServerAccessTest, NothingIsOpenWithoutItsScope) {
  using ::testing::AnyOf;
  using ::testing::Each;
  using ::testing::Not;
  const auto denied =
      AnyOf(absl::StatusCode::kUnauthenticated, absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(DataCodes(""), Each(absl::StatusCode::kUnauthenticated));
  EXPECT_THAT(DataCodes("grape"), Each(absl::StatusCode::kUnauthenticated));
  EXPECT_THAT(DataCodes("pear"), Each(absl::StatusCode::kPermissionDenied));
  EXPECT_THAT(DataCodes("apple"), Each(Not(denied)));
  EXPECT_THAT(AdminCodes(""), Each(absl::StatusCode::kUnauthenticated));
  EXPECT_THAT(AdminCodes("apple"), Each(absl::StatusCode::kPermissionDenied));
  EXPECT_EQ(server_->engine().submitted().size(), 2u) << "only those of the token with the scope";
  EXPECT_TRUE(*CheckHealth(server_->address(), "", std::chrono::seconds(5)));
  EXPECT_THAT(AdminCodes("pear"), Each(Not(denied)));  // last: it drains
}

TEST_F(ServerAccessTest, TokensChangeWhileServing) {
  const auto code = [&](const std::string& token) {
    return Collect(*v1::Inference::NewStub(ConnectTo(server_->address(), WithToken(token))),
                   TextRequest("hello", 3))
        .status.code();
  };
  EXPECT_EQ(code("apple"), absl::StatusCode::kOk);
  Write("rubbish\n");
  EXPECT_TRUE(Eventually([&] {
    return server_->MetricsText().find(
               "mobi_access_reloads_total{files=\"tokens\",result=\"refused\"} 1") !=
           std::string::npos;
  }));
  EXPECT_EQ(code("apple"), absl::StatusCode::kOk);
  Write(Line("app", "generate", "cherry"));
  EXPECT_TRUE(Eventually([&] { return code("cherry") == absl::StatusCode::kOk; }));
  EXPECT_EQ(code("apple"), absl::StatusCode::kUnauthenticated);
}

}  // namespace
}  // namespace mobi
