#include "server/promql.h"

#include <atomic>
#include <chrono>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/metrics.h"
#include "server/promql_poller.h"
#include "tests/server/fake_clock.h"
#include "tests/server/loopback_server.h"
#include "tests/server/prometheus_server.h"

namespace mobi {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

std::string Success(const std::string& type, const std::string& result) {
  return R"({"status":"success","data":{"resultType":")" + type + R"(","result":)" + result + "}}";
}

TEST(ParsePromqlResponse, TakesOneSampleAndSaysWhyNot) {
  const PromqlAnswer vector = ParsePromqlResponse(
      200, Success("vector", R"([{"metric":{},"value":[1700000000.5,"1.25"]}])"));
  ASSERT_TRUE(vector.value.has_value()) << vector.reason;
  EXPECT_EQ(*vector.value, 1.25);
  EXPECT_EQ(vector.time, 1700000000.5);
  EXPECT_EQ(ParsePromqlResponse(200, Success("scalar", R"([1,"-3"])")).value, -3);

  const std::string sample = R"({"metric":{},"value":[1,"1"]})";
  const struct {
    long http_status;
    std::string body;
    PromqlError error;
  } cases[] = {
      {200, Success("vector", "[]"), PromqlError::kNoSeries},
      {200, Success("vector", "[" + sample + "," + sample + "]"), PromqlError::kManySeries},
      {200, Success("scalar", R"([1,"NaN"])"), PromqlError::kNotFinite},
      {200, Success("scalar", R"([1,"+Inf"])"), PromqlError::kNotFinite},
      {200, Success("scalar", R"([1,"-Inf"])"), PromqlError::kNotFinite},
      {200, Success("scalar", R"([1,"one"])"), PromqlError::kBadResponse},
      {200, Success("scalar", R"([1,2])"), PromqlError::kBadResponse},
      {200, Success("scalar", R"(["1","2"])"), PromqlError::kBadResponse},
      {200, Success("scalar", "[]"), PromqlError::kBadResponse},
      {200, Success("string", R"([1,"2"])"), PromqlError::kBadResponse},
      {200, Success("matrix", "[]"), PromqlError::kBadResponse},
      {200, Success("vector", "{}"), PromqlError::kBadResponse},
      {200, Success("vector", "[1]"), PromqlError::kBadResponse},
      {200, Success("vector", R"([{"metric":{}}])"), PromqlError::kBadResponse},
      {200, R"({"status":"success"})", PromqlError::kBadResponse},
      {200, R"({"status":"success","data":[]})", PromqlError::kBadResponse},
      {200, R"({"status":"error","error":"x"})", PromqlError::kRefused},
      {200, R"({"status":1})", PromqlError::kRefused},
      {200, "", PromqlError::kBadResponse},
      {200, "<html>", PromqlError::kBadResponse},
      {200, "[]", PromqlError::kBadResponse},
      {400, R"({"status":"error","error":"parse error"})", PromqlError::kRefused},
      {502, "<html>", PromqlError::kRefused},
  };
  for (const auto& bad : cases) {
    const PromqlAnswer answer = ParsePromqlResponse(bad.http_status, bad.body);
    EXPECT_FALSE(answer.value.has_value()) << bad.body;
    EXPECT_STREQ(PromqlErrorName(answer.error), PromqlErrorName(bad.error)) << bad.body;
    EXPECT_FALSE(answer.reason.empty()) << bad.body;
  }
}

TEST(ParsePromqlResponse, SurvivesMutatedResponses) {
  std::mt19937 rng(1);
  const std::string good = Success("vector", R"([{"metric":{"a":"b"},"value":[1.5,"2"]}])");
  for (int round = 0; round < 5000; ++round) {
    std::string body = good;
    for (int edits = 1 + rng() % 4; edits > 0; --edits) {
      const size_t at = rng() % body.size();
      if (rng() % 2) {
        body[at] = static_cast<char>(rng());
      } else {
        body.erase(at, rng() % 8);
      }
      if (body.empty()) body = "x";
    }
    const PromqlAnswer answer = ParsePromqlResponse(200, body);
    EXPECT_LE(answer.reason.size(), 200u);
  }
}

TEST(PromqlClient, RefusesWhatIsNoUrl) {
  for (const char* url :
       {"", "prometheus", "ftp://host", "http://", "file:///etc/passwd", "http://[::1"}) {
    EXPECT_EQ(PromqlClient::Create(url).status().code(), absl::StatusCode::kInvalidArgument) << url;
  }
  EXPECT_TRUE(PromqlClient::Create("https://host/prefix/").ok());
}

PromqlAnswer Ask(const std::string& url, Duration timeout) {
  auto client = PromqlClient::Create(url);
  EXPECT_TRUE(client.ok()) << client.status();
  return (*client)->Query("up", timeout, nullptr);
}

// Says nothing, and returns only when the client has gone.
void Hang(int fd) {
  char buffer[4096];
  while (recv(fd, buffer, sizeof(buffer), 0) > 0) continue;
}

TEST(PromqlClient, ServersThatMisbehaveAreBounded) {
  const auto ask = [](std::function<void(int)> serve, Duration timeout) {
    const LoopbackServer server(std::move(serve));
    return std::string(PromqlErrorName(Ask(server.url(), timeout).error));
  };
  // These would go on for ever: that the question has an end is the client's doing.
  const auto endless = [&](std::function<void(int)> serve) {
    return ask(std::move(serve), milliseconds(300));
  };
  const auto error_of = [&](std::function<void(int)> serve) {
    return ask(std::move(serve), std::chrono::minutes(5));
  };
  const auto head = std::string("HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n");
  EXPECT_EQ(endless(Hang), "timeout");
  EXPECT_EQ(endless([&](int fd) {  // drips
              LoopbackServer::ReadRequest(fd);
              LoopbackServer::Write(fd, head);
              while (send(fd, "[", 1, MSG_NOSIGNAL) == 1) {
                std::this_thread::sleep_for(milliseconds(50));
              }
            }),
            "timeout");
  EXPECT_EQ(error_of([&](int fd) {  // never stops
              LoopbackServer::ReadRequest(fd);
              LoopbackServer::Write(fd, head);
              LoopbackServer::Write(fd, std::string(1 << 20, '['));
            }),
            "many_series");
  EXPECT_EQ(error_of([](int fd) { LoopbackServer::ReadRequest(fd); }), "unreachable");
  EXPECT_EQ(error_of([](int fd) {
              LoopbackServer::ReadRequest(fd);
              LoopbackServer::Write(fd, "SSH-2.0-OpenSSH\r\n");
            }),
            "unreachable");
  EXPECT_EQ(error_of([](int fd) {  // redirects are not followed
              LoopbackServer::ReadRequest(fd);
              LoopbackServer::Write(fd,
                                    "HTTP/1.1 302 x\r\nLocation: file:///etc/passwd\r\n"
                                    "Content-Length: 0\r\nConnection: close\r\n\r\n");
            }),
            "refused");
  EXPECT_EQ(error_of([](int fd) {
              LoopbackServer::ReadRequest(fd);
              LoopbackServer::Write(fd, LoopbackServer::Http(200, std::string(50000, '[')));
            }),
            "bad_response");
  int port = 0;
  {
    port = LoopbackServer([](int) {}).port();
  }
  EXPECT_STREQ(PromqlErrorName(Ask(absl::StrCat("http://127.0.0.1:", port), seconds(60)).error),
               "unreachable");
}

// A busy machine takes its time.
template <typename Condition>
bool Eventually(const Condition& condition) {
  for (int i = 0; i < 4800; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(milliseconds(50));
  }
  return false;
}

PolicySignal Promql(const std::string& name, const std::string& query) {
  return {.kind = SignalKind::kPromql, .name = name, .query = query, .max_age = seconds(2)};
}

TEST(PromqlPoller, AnAnswerThatDoesNotGetNewerGrowsOld) {
  // Always the same evaluation time, as from a cache.
  const LoopbackServer server([](int fd) {
    LoopbackServer::ReadRequest(fd);
    LoopbackServer::Write(fd, LoopbackServer::Http(200, Success("scalar", R"([1700000000,"7"])")));
  });
  FakeClock clock;
  auto poller = PromqlPoller::Start(server.url(), clock);
  ASSERT_TRUE(poller.ok()) << poller.status();
  PolicySignal cached = Promql("cached", "up");
  cached.timeout = std::chrono::minutes(5);
  (*poller)->SetSignals({cached});
  EXPECT_TRUE(Eventually([&] { return (*poller)->Answers().contains("cached"); }));
  clock.Advance(seconds(1));
  EXPECT_TRUE(Eventually([&] { return (*poller)->counts().at("cached").queries > 1; }));
  EXPECT_TRUE((*poller)->Answers().contains("cached"));
  clock.Advance(milliseconds(1001));
  EXPECT_FALSE((*poller)->Answers().contains("cached"));
}

TEST(PromqlPoller, StopsWhileAServerHangs) {
  std::atomic<bool> asked{false};
  const LoopbackServer server([&](int fd) {
    asked = true;
    Hang(fd);
  });
  const RealClock clock;
  auto poller = PromqlPoller::Start(server.url(), clock);
  ASSERT_TRUE(poller.ok());
  PolicySignal slow = Promql("slow", "up");
  slow.timeout = std::chrono::hours(24);
  (*poller)->SetSignals({slow});
  EXPECT_TRUE(Eventually([&] { return asked.load(); }));
  poller->reset();
}

// Debian's Prometheus, which scrapes a metrics endpoint of ours twice.
class PrometheusTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!PrometheusServer::Installed()) GTEST_SKIP() << "needs Debian's package prometheus";
    metrics_ = std::make_shared<Metrics>(Metrics::Sources{
        .control =
            [this] {
              ControlStatus status;
              status.engine.waiting_requests = waiting_;
              status.engine.running_requests = 3;
              return status;
            },
        .ready = [] { return true; },
        .active_calls = [] { return 0; },
    });
    metrics_->SetModel("demo", 16, 100);
    auto server = MetricsServer::Start("127.0.0.1:0", metrics_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    ASSERT_TRUE(prometheus_.Start({server_->port(), server_->port()}));
  }

  std::atomic<int> waiting_{5};
  std::shared_ptr<Metrics> metrics_;
  std::unique_ptr<MetricsServer> server_;
  PrometheusServer prometheus_;
};

TEST_F(PrometheusTest, AnswersExpressionsOverWhatItScraped) {
  const auto client = PromqlClient::Create(prometheus_.url());
  ASSERT_TRUE(client.ok());
  const auto ask = [&](const std::string& query) {
    return (*client)->Query(query, seconds(5), nullptr);
  };
  const PromqlAnswer waiting = ask("max(vllm:num_requests_waiting{model_name=\"demo\"})");
  ASSERT_TRUE(waiting.value.has_value()) << waiting.reason;
  EXPECT_EQ(*waiting.value, 5);
  const double now = absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch());
  EXPECT_NEAR(waiting.time, now, 10);
  EXPECT_EQ(ask("scalar(sum(vllm:num_requests_running))").value, 6);
  const std::pair<const char*, PromqlError> cases[] = {
      {"vllm:num_requests_waiting", PromqlError::kManySeries},
      {"nothing_of_this_name", PromqlError::kNoSeries},
      {"vector(0) / 0", PromqlError::kNotFinite},
      {"avg(", PromqlError::kRefused},
      {"up[1m]", PromqlError::kBadResponse},
      {"\"text\"", PromqlError::kBadResponse},
  };
  for (const auto& [query, error] : cases) {
    const PromqlAnswer answer = ask(query);
    EXPECT_FALSE(answer.value.has_value()) << query;
    EXPECT_STREQ(PromqlErrorName(answer.error), PromqlErrorName(error)) << query;
  }
  EXPECT_THAT(ask("avg(").reason, HasSubstr("parse error"));
}

TEST_F(PrometheusTest, SignalsFollowItAndFallBackWhenItGoes) {
  const RealClock clock;
  auto started = PromqlPoller::Start(prometheus_.url(), clock);
  ASSERT_TRUE(started.ok());
  PromqlPoller& poller = **started;
  poller.SetSignals({Promql("queue", "max(vllm:num_requests_waiting)"),
                     Promql("many", "up"),
                     {.kind = SignalKind::kQueueDepth, .name = "own"}});
  const auto value = [&] {
    const auto answers = poller.Answers();
    return answers.contains("queue") ? answers.at("queue") : -1;
  };
  EXPECT_TRUE(Eventually([&] { return value() == 5; }));
  waiting_ = 11;
  EXPECT_TRUE(Eventually([&] { return value() == 11; }));
  EXPECT_FALSE(poller.Answers().contains("many"));
  EXPECT_GT(poller.counts().at("many").errors[static_cast<int>(PromqlError::kManySeries)], 0u);
  EXPECT_FALSE(poller.counts().contains("own"));

  prometheus_.Stop();
  EXPECT_TRUE(Eventually([&] { return poller.Answers().empty(); }));
  EXPECT_TRUE(Eventually([&] {
    return poller.counts().at("queue").errors[static_cast<int>(PromqlError::kUnreachable)] > 0;
  }));
  EXPECT_FALSE(poller.counts().at("queue").last_error.empty());
}

}  // namespace
}  // namespace mobi
