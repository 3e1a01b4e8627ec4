#include "server/mobi_server.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "grpcpp/generic/generic_stub.h"
#include "gtest/gtest.h"
#include "server/client.h"
#include "server/rpc_status.h"
#include "tests/server/server_fixture.h"

namespace mobi {
namespace {

using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kService[] = "mobi.v1.Inference";

bool Serving(const std::string& address, const std::string& service) {
  const auto serving = CheckHealth(address, service, std::chrono::seconds(5));
  EXPECT_TRUE(serving.ok()) << serving.status();
  return serving.ok() && *serving;
}

ScriptedEngine::Script Endless() {
  return [](const GenerationRequest& request, int) {
    return std::vector<int32_t>(request.max_new_tokens, 65);
  };
}

// Status of a unary call with an empty request, whatever the method is.
grpc::Status CallEmpty(const std::string& address, const std::string& method) {
  grpc::GenericStub stub(ConnectTo(address));
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  const grpc::Slice nothing;
  const grpc::ByteBuffer request(&nothing, 1);
  grpc::ByteBuffer response;
  grpc::Status status;
  const auto call = stub.PrepareUnaryCall(&context, method, request, &queue);
  call->StartCall();
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  queue.Shutdown();
  while (queue.Next(&tag, &ok)) {
  }
  return status;
}

TEST(MobiServer, IsAliveBeforeItIsReady) {
  TestServer server({.script = Says("x")}, TestServerOptions(), /*load=*/false);
  EXPECT_TRUE(Serving(server.address(), ""));
  EXPECT_FALSE(Serving(server.address(), kService));
  const Collected early = Collect(*server.Client(), TextRequest("hello"));
  EXPECT_EQ(early.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(DetailOf<google::rpc::RetryInfo>(early.status));
  EXPECT_THAT(server.MetricsText(), HasSubstr("mobi_ready 0"));
  server.Load();
  EXPECT_TRUE(Serving(server.address(), kService));
  EXPECT_TRUE(Collect(*server.Client(), TextRequest("hello")).status.ok());
  EXPECT_THAT(server.MetricsText(), HasSubstr("mobi_ready 1"));
}

TEST(MobiServer, DrainingFlipsReadinessOnly) {
  TestServer server({.script = Endless(), .step_time = milliseconds(2)});
  std::thread running(
      [&] { EXPECT_TRUE(Collect(*server.Client(), TextRequest("hello", 150)).status.ok()); });
  ASSERT_TRUE(Eventually([&] { return server.engine().live() == 1; }));
  const auto admin = server.Admin();
  {
    grpc::ClientContext context;
    v1::DrainResponse response;
    ASSERT_TRUE(admin->Drain(&context, {}, &response).ok());
    EXPECT_EQ(response.running_requests(), 1);
  }
  EXPECT_TRUE(Serving(server.address(), ""));
  EXPECT_FALSE(Serving(server.address(), kService));
  const Collected late = Collect(*server.Client(), TextRequest("hello"));
  EXPECT_EQ(late.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(DetailOf<google::rpc::RetryInfo>(late.status));
  running.join();  // finished in peace
  {
    grpc::ClientContext context;
    v1::DrainRequest undo;
    undo.set_undo(true);
    v1::DrainResponse response;
    ASSERT_TRUE(admin->Drain(&context, undo, &response).ok());
  }
  EXPECT_TRUE(Serving(server.address(), kService));
  EXPECT_TRUE(Collect(*server.Client(), TextRequest("hello", 3)).status.ok());
}

TEST(MobiServer, ADrainsGraceIsKept) {
  TestServer server({.script = Endless(), .paused = true});
  std::thread running([&] {
    const Collected result = Collect(*server.Client(), TextRequest("hello"));
    EXPECT_EQ(result.status.code(), absl::StatusCode::kUnavailable) << result.status;
    EXPECT_TRUE(DetailOf<google::rpc::RetryInfo>(result.status));
  });
  ASSERT_TRUE(Eventually([&] { return server.engine().live() == 1; }));
  grpc::ClientContext context;
  v1::DrainRequest request;
  request.mutable_grace()->set_nanos(100'000'000);
  v1::DrainResponse response;
  ASSERT_TRUE(server.Admin()->Drain(&context, request, &response).ok());
  running.join();
  EXPECT_TRUE(Serving(server.address(), ""));  // the process stays up
}

// Clients that call all the time: what was accepted ends well, what was not is told to come back.
TEST(MobiServer, DrainingLosesNoAcceptedRequest) {
  for (int round = 0; round < 10; ++round) {
    TestServer server({.script = Endless(), .step_time = std::chrono::microseconds(200)});
    std::atomic<bool> stop{false};
    std::atomic<int> good{0};
    std::atomic<int> lost{0};
    std::vector<std::thread> clients;
    for (int i = 0; i < 4; ++i) {
      clients.emplace_back([&] {
        const auto stub = server.Client();
        while (!stop) {
          const Collected result = Collect(*stub, TextRequest("hello", 20));
          if (result.status.ok()) {
            ++good;
          } else if (!absl::IsUnavailable(result.status) || !result.messages.empty()) {
            ++lost;
            ADD_FAILURE() << result.status;
          }
        }
      });
    }
    EXPECT_TRUE(Eventually([&] { return good > 20; }));
    server.server().Drain();
    // The engine counts a request out after its call's end.
    EXPECT_TRUE(Eventually([&] { return server.engine().live() == 0; }));
    stop = true;
    for (std::thread& client : clients) client.join();
    EXPECT_EQ(lost, 0);
    // Late calls count too while it is decided that they are refused.
    EXPECT_TRUE(Eventually([&] { return server.server().running_requests() == 0; }));
    EXPECT_EQ(server.engine().live(), 0);
  }
}

TEST(MobiServer, DrainingEndsWhatOutlivesTheGrace) {
  ServerOptions options = TestServerOptions();
  options.drain_grace = milliseconds(50);
  TestServer server({.script = Endless(), .paused = true}, options);
  std::thread running([&] {
    const Collected result = Collect(*server.Client(), TextRequest("hello"));
    EXPECT_EQ(result.status.code(), absl::StatusCode::kUnavailable) << result.status;
  });
  ASSERT_TRUE(Eventually([&] { return server.engine().live() == 1; }));
  server.server().Drain();
  running.join();
}

TEST(MobiServer, AFailedDeviceEndsAllAndReadiness) {
  TestServer server({.script = Endless(), .paused = true});
  std::vector<std::thread> running;
  for (int i = 0; i < 4; ++i) {
    running.emplace_back([&] {
      const Collected result = Collect(*server.Client(), TextRequest("hello"));
      EXPECT_EQ(result.status.code(), absl::StatusCode::kInternal) << result.status;
    });
  }
  ASSERT_TRUE(Eventually([&] { return server.engine().live() == 4; }));
  EXPECT_FALSE(server.server().failed());
  server.engine().BreakDevice();
  for (std::thread& thread : running) thread.join();
  EXPECT_TRUE(Eventually([&] { return server.server().failed(); }));
  EXPECT_FALSE(Serving(server.address(), kService));
  EXPECT_EQ(Collect(*server.Client(), TextRequest("hello")).status.code(),
            absl::StatusCode::kUnavailable);
}

TEST(MobiServer, AnEngineThatStopsSteppingIsNotReady) {
  ServerOptions options = TestServerOptions();
  options.stall_after = milliseconds(100);
  TestServer server({.script = Endless(), .step_time = milliseconds(1)}, options);
  grpc::ClientContext context;
  const auto stub = server.Client();
  const auto reader = stub->Generate(&context, TextRequest("hello", 4000));
  ASSERT_TRUE(Eventually([&] { return server.engine().live() == 1; }));
  EXPECT_TRUE(Serving(server.address(), kService));
  server.engine().Pause(true);
  EXPECT_TRUE(Eventually([&] { return !Serving(server.address(), kService); }));
  server.engine().Pause(false);
  EXPECT_TRUE(Eventually([&] { return Serving(server.address(), kService); }));
  context.TryCancel();
}

TEST(MobiServer, BitsChangeWhileAStreamRuns) {
  TestServer server({.script = Endless(), .step_time = milliseconds(1)});
  const auto stub = server.Client();
  grpc::ClientContext context;
  const auto reader = stub->Generate(&context, TextRequest("hello", 4000));
  v1::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_EQ(message.chunks(0).effective_bits(), 8);
  grpc::ClientContext admin_context;
  v1::OverrideRequest request;
  request.set_target_bits(3.5);
  v1::PrecisionStatus status;
  ASSERT_TRUE(server.Admin()->Override(&admin_context, request, &status).ok());
  EXPECT_EQ(status.target_bits(), 3.5);
  EXPECT_EQ(status.mode(), v1::PRECISION_MODE_OVERRIDE);
  EXPECT_TRUE(status.has_override_until());
  bool seen = false;
  for (int i = 0; i < 100 && !seen && reader->Read(&message); ++i) {
    seen = message.chunks(0).effective_bits() == 3.5f;
  }
  EXPECT_TRUE(seen);
  context.TryCancel();
}

TEST(MobiServer, AdminRefusalsNameTheField) {
  TestServer server({.script = Says("x")});
  const auto admin = server.Admin();
  const auto message_of = [](const grpc::Status& status) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    const auto detail = DetailOf<google::rpc::BadRequest>(FromGrpcStatus(status));
    EXPECT_TRUE(detail) << status.error_message();
    return status.error_message();
  };
  const auto override_with = [&](const std::function<void(v1::OverrideRequest&)>& fill) {
    grpc::ClientContext context;
    v1::OverrideRequest request;
    fill(request);
    v1::PrecisionStatus status;
    return message_of(admin->Override(&context, request, &status));
  };
  EXPECT_THAT(override_with([](auto&) {}), HasSubstr("action: needs one of"));
  EXPECT_THAT(override_with([](auto& r) { r.set_target_bits(9); }), HasSubstr("target_bits: 9"));
  EXPECT_THAT(override_with([](auto& r) {
                r.set_target_bits(4);
                r.mutable_ttl()->set_seconds(-5);
              }),
              HasSubstr("ttl: -5 s is out of range"));
  grpc::ClientContext set_context;
  v1::SetPolicyRequest bad;
  bad.set_yaml("windows: 3");
  v1::GetPolicyResponse policy;
  EXPECT_THAT(message_of(admin->SetPolicy(&set_context, bad, &policy)), HasSubstr("policy:1:"));
  grpc::ClientContext watch_context;
  v1::WatchStatusRequest fast;
  fast.mutable_interval()->set_nanos(1);
  const auto reader = admin->WatchStatus(&watch_context, fast);
  v1::PrecisionStatus status;
  EXPECT_FALSE(reader->Read(&status));
  EXPECT_THAT(message_of(reader->Finish()), HasSubstr("interval"));
}

TEST(MobiServer, PoliciesAreReplacedWhole) {
  TestServer server({.script = Says("x")});
  const auto admin = server.Admin();
  const auto set = [&](const std::string& yaml, bool validate_only) {
    grpc::ClientContext context;
    v1::SetPolicyRequest request;
    request.set_yaml(yaml);
    request.set_validate_only(validate_only);
    v1::GetPolicyResponse policy;
    EXPECT_TRUE(admin->SetPolicy(&context, request, &policy).ok());
    return policy;
  };
  const std::string yaml = "windows: [{name: always, floor_bits: 5, ceiling_bits: 5}]\n";
  EXPECT_EQ(set(yaml, true).generation(), 1u);
  EXPECT_EQ(server.engine().target().target_bits, 8);
  const v1::GetPolicyResponse policy = set(yaml, false);
  EXPECT_EQ(policy.generation(), 2u);
  EXPECT_EQ(policy.yaml(), yaml);
  EXPECT_EQ(policy.source(), "admin");
  EXPECT_EQ(server.engine().target().target_bits, 5);
}

TEST(MobiServer, WatchersHearUntilTheyGo) {
  TestServer server({.script = Says("x")});
  const auto admin = server.Admin();
  grpc::ClientContext context;
  v1::WatchStatusRequest request;
  request.mutable_interval()->set_nanos(100'000'000);
  const auto reader = admin->WatchStatus(&context, request);
  v1::PrecisionStatus status;
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(reader->Read(&status));
  EXPECT_TRUE(status.load().ready());
  EXPECT_EQ(status.target_bits(), 8);
  context.TryCancel();
  while (reader->Read(&status)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST(MobiServer, TokenizeDetokenizeAndGetModel) {
  TestServer server({.script = Says("x"), .max_model_len = 77});
  const auto stub = server.Client();
  v1::TokenizeRequest text;
  text.set_text("hello there");
  text.set_with_pieces(true);
  v1::TokenizeResponse tokens;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(stub->Tokenize(&context, text, &tokens).ok());
  }
  EXPECT_EQ(tokens.ids(0), 276);
  ASSERT_EQ(tokens.pieces_size(), tokens.ids_size());
  std::string joined;
  for (int i = 1; i < tokens.pieces_size(); ++i) joined += tokens.pieces(i);
  EXPECT_EQ(joined, "hello there");
  v1::DetokenizeRequest ids;
  *ids.mutable_ids() = tokens.ids();
  v1::DetokenizeResponse back;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(stub->Detokenize(&context, ids, &back).ok());
  }
  EXPECT_EQ(back.text(), "hello there");
  ids.add_ids(320);
  {
    grpc::ClientContext context;
    EXPECT_EQ(stub->Detokenize(&context, ids, &back).error_code(),
              grpc::StatusCode::INVALID_ARGUMENT);
  }
  v1::GetModelResponse model;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(stub->GetModel(&context, {}, &model).ok());
  }
  EXPECT_EQ(model.name(), "scripted");
  EXPECT_TRUE(model.elastic());
  EXPECT_EQ(model.limits().max_model_len(), 77);
  EXPECT_TRUE(model.has_chat_template());
  EXPECT_THAT(model.priority_classes(), ElementsAre("premium", "standard"));
}

TEST(MobiServer, ReflectionIsEverywhereAndChannelzOnlyForOperators) {
  TestServer server({.script = Says("x")});
  const std::string reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
  const std::string channelz = "/grpc.channelz.v1.Channelz/GetTopChannels";
  EXPECT_NE(CallEmpty(server.address(), reflection).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_NE(CallEmpty(server.admin_address(), reflection).error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(CallEmpty(server.address(), channelz).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(CallEmpty(server.admin_address(), channelz).error_message(), "");
  EXPECT_EQ(CallEmpty(server.address(), "/mobi.v1.Precision/GetStatus").error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
}

TEST(MobiServer, MessagesAndMetadataAreBounded) {
  TestServer server({.script = Says("x")});
  const auto stub = server.Client();
  EXPECT_EQ(Collect(*stub, TextRequest(std::string(2 << 20, 'x'))).status.code(),
            absl::StatusCode::kResourceExhausted);
  const Collected heavy = Collect(*stub, TextRequest("hello"), [](grpc::ClientContext& context) {
    for (int i = 0; i < 20; ++i) {
      context.AddMetadata(absl::StrCat("x-", i), std::string(1000, 'a'));
    }
  });
  EXPECT_EQ(heavy.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(Collect(*server.Client(), TextRequest("hello")).status.ok());
}

TEST(MobiServer, CompressedMessagesAreRefused) {
  TestServer server({.script = Says("x")});
  const Collected result =
      Collect(*server.Client(), TextRequest(std::string(5000, 'x')),
              [](grpc::ClientContext& c) { c.set_compression_algorithm(GRPC_COMPRESS_GZIP); });
  EXPECT_FALSE(result.status.ok());
  EXPECT_TRUE(server.engine().submitted().empty());
}

TEST(MobiServer, AnAddressInUseIsNamed) {
  TestServer server({.script = Says("x")});
  const RealClock clock;
  ServerOptions options = TestServerOptions();
  options.listen = server.address();
  const auto second = MobiServer::Start(options, PolicyFromFlags(8), clock);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(server.address()));
}

std::string HttpGet(int port, const std::string& path) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in peer{};
  peer.sin_family = AF_INET;
  peer.sin_port = htons(static_cast<uint16_t>(port));
  peer.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string reply;
  if (connect(fd, reinterpret_cast<sockaddr*>(&peer), sizeof peer) == 0) {
    const std::string request = absl::StrCat("GET ", path, " HTTP/1.0\r\nHost: localhost\r\n\r\n");
    EXPECT_EQ(write(fd, request.data(), request.size()), static_cast<ssize_t>(request.size()));
    char buffer[4096];
    for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0;) reply.append(buffer, n);
  }
  close(fd);
  return reply;
}

TEST(MobiServer, MetricsHaveTheirNamesAndCount) {
  ServerOptions options = TestServerOptions();
  options.metrics_listen = "127.0.0.1:0";
  TestServer server({.script = Says("hello")}, options);
  Collect(*server.Client(), TextRequest("hello"));
  Collect(*server.Client(), TextRequest(""));
  EXPECT_TRUE(Eventually([&] { return server.server().running_requests() == 0; }));
  const std::string text = HttpGet(server.server().metrics_port(), "/metrics");
  EXPECT_THAT(text, HasSubstr("HTTP/1.1 200"));
  for (const char* name :
       {"vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info", "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket", "vllm:e2e_request_latency_seconds_bucket",
        "vllm:request_queue_time_seconds_bucket", "vllm:request_prefill_time_seconds_bucket",
        "vllm:request_decode_time_seconds_bucket", "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total", "vllm:request_success_total", "vllm:num_preemptions_total",
        "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"}) {
    EXPECT_THAT(text, HasSubstr(absl::StrCat("\n", name, "{model_name=\"scripted\""))) << name;
  }
  for (const char* line :
       {"mobi_target_bits 8\n", "mobi_requests_total{method=\"Generate\",code=\"OK\"} 1\n",
        "mobi_requests_total{method=\"Generate\",code=\"INVALID_ARGUMENT\"} 1\n",
        "vllm:request_success_total{model_name=\"scripted\",finished_reason=\"stop\"} 1\n",
        "vllm:time_to_first_token_seconds_count{model_name=\"scripted\"} 1\n",
        "mobi_build_info{version=\"", "# TYPE vllm:generation_tokens_total counter\n",
        "# TYPE vllm:time_to_first_token_seconds histogram\n"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  // Every family once, every sample once.
  std::set<std::string> samples;
  for (size_t begin = text.find("\r\n\r\n") + 4; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    const std::string line = text.substr(begin, end - begin);
    begin = end + 1;
    const std::string key = line[0] == '#' ? line : line.substr(0, line.rfind(' '));
    EXPECT_TRUE(samples.insert(key).second) << key;
  }
}

}  // namespace
}  // namespace mobi
