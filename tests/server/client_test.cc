// How clients connect: a failed attempt is not the end, and nobody listening shows soon.
#include "server/client.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "server/rpc_status.h"

namespace mobi {
namespace {

using ::testing::StartsWith;

// A port of loopback that is bound, and so nobody else's, but refuses connections until Listen.
class BoundPort {
 public:
  BoundPort() : socket_(socket(AF_INET, SOCK_STREAM, 0)) {
    const int on = 1;  // lets a server bind it beside us
    setsockopt(socket_, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    EXPECT_EQ(bind(socket_, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &size), 0);
    address_ = absl::StrCat("127.0.0.1:", ntohs(address.sin_port));
  }
  ~BoundPort() { Close(); }

  const std::string& address() const { return address_; }
  void Listen() { ASSERT_EQ(listen(socket_, 1), 0); }
  // Takes one connection and closes it before a word is said.
  void RejectOne() { close(accept(socket_, nullptr, nullptr)); }
  void Close() {
    if (socket_ >= 0) close(socket_);
    socket_ = -1;
  }

 private:
  int socket_;
  std::string address_;
};

TEST(ClientConnection, SurvivesAFailedAttempt) {
  BoundPort port;
  port.Listen();
  grpc::CallbackGenericService service;
  std::unique_ptr<grpc::Server> server;
  std::thread late([&] {
    port.RejectOne();
    grpc::ServerBuilder builder;
    builder.AddListeningPort(port.address(), grpc::InsecureServerCredentials());
    builder.RegisterCallbackGenericService(&service);
    server = builder.BuildAndStart();
    port.Close();
  });
  const auto channel = Connect(port.address());
  AwaitConnection(*channel, std::chrono::minutes(5));
  EXPECT_EQ(channel->GetState(false), GRPC_CHANNEL_READY);
  late.join();
  ASSERT_NE(server, nullptr);
}

TEST(ClientConnection, NobodyListeningIsSaid) {
  const BoundPort port;
  const auto stub = v1::Inference::NewStub(ConnectNow(port.address()));
  grpc::ClientContext context;
  v1::GetModelResponse model;
  const absl::Status status = FromGrpcStatus(stub->GetModel(&context, {}, &model));
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_THAT(DescribeError(status, port.address()), StartsWith("no server at 127.0.0.1:"));
}

}  // namespace
}  // namespace mobi
