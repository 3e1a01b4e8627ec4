#include "server/generate_call.h"

#include <atomic>
#include <fstream>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "server/rpc_status.h"
#include "tests/paths.h"
#include "tests/server/server_fixture.h"

namespace mobi {
namespace {

using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kStory[] = "Once upon a time there was a server and it streamed its tokens.";

bool HasRetryInfo(const absl::Status& status) {
  return DetailOf<google::rpc::RetryInfo>(status).has_value();
}

std::vector<int32_t> Repeated(int count) { return std::vector<int32_t>(count, 65); }

ScriptedEngine::Script Endless() {
  return [](const GenerationRequest& request, int) { return Repeated(request.max_new_tokens); };
}

TEST(GenerateCall, StreamsTextIdsAndSummary) {
  TestServer server({.script = Says(kStory)});
  v1::GenerateRequest request = TextRequest("hello", 1000);
  request.set_request_id("mine");
  const Collected result = Collect(*server.Client(), request);
  ASSERT_TRUE(result.status.ok()) << result.status;
  EXPECT_EQ(result.text[0], kStory);
  EXPECT_EQ(result.token_ids[0], TokensOf(kStory));
  EXPECT_FALSE(result.has_prompt);
  const v1::Chunk& last = result.last_chunks[0];
  EXPECT_EQ(last.finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(last.stop_id(), kScriptedEos);
  ASSERT_TRUE(result.has_summary);
  EXPECT_EQ(result.summary.request_id(), "mine");
  EXPECT_THAT(result.summary.finish_reasons(), ElementsAre(v1::FINISH_REASON_STOP));
  const auto submitted = server.engine().submitted();
  EXPECT_EQ(result.summary.usage().prompt_tokens(), static_cast<int>(submitted[0].prompt.size()));
  EXPECT_EQ(result.summary.usage().completion_tokens(),
            static_cast<int>(result.token_ids[0].size()));
  EXPECT_EQ(result.summary.mean_effective_bits(), 8);
  EXPECT_EQ(result.summary.seed(), submitted[0].sampling.seed);
  EXPECT_GT(result.summary.timings().total_ms(), 0);
  EXPECT_GT(submitted[0].deadline, std::chrono::steady_clock::now() + std::chrono::minutes(9));
  EXPECT_LT(submitted[0].deadline, std::chrono::steady_clock::now() + std::chrono::minutes(11));
}

TEST(GenerateCall, SeedsAndIdsDifferUnlessGiven) {
  TestServer server({.script = Says("x")});
  const auto stub = server.Client();
  const Collected a = Collect(*stub, TextRequest("hello"));
  const Collected b = Collect(*stub, TextRequest("hello"));
  EXPECT_NE(a.summary.seed(), b.summary.seed());
  EXPECT_NE(a.summary.request_id(), b.summary.request_id());
  v1::GenerateRequest request = TextRequest("hello");
  request.mutable_sampling()->set_seed(0);
  EXPECT_EQ(Collect(*stub, request).summary.seed(), 0u);
}

TEST(GenerateCall, LengthEndsACompletion) {
  TestServer server({.script = Says(kStory)});
  const Collected result = Collect(*server.Client(), TextRequest("hello", 5));
  ASSERT_TRUE(result.status.ok()) << result.status;
  EXPECT_EQ(result.token_ids[0].size(), 5u);
  EXPECT_EQ(result.last_chunks[0].finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(result.last_chunks[0].stopped_by_case(), v1::Chunk::STOPPED_BY_NOT_SET);
}

// Characters of up to four bytes, one token per byte, cut off everywhere: every message parses (so
// every text is UTF-8) and the whole equals what the tokenizer makes of the ids.
TEST(GenerateCall, TextIsUtf8WhereverTokensEnd) {
  const std::string text = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z\xE4\xBD\xA0";
  TestServer server({.script = Says(text, /*bytes=*/true)});
  const auto stub = server.Client();
  for (int length = 1; length <= static_cast<int>(text.size()); ++length) {
    const Collected result = Collect(*stub, TextRequest("hello", length));
    ASSERT_TRUE(result.status.ok()) << result.status;
    ASSERT_EQ(result.token_ids[0].size(), static_cast<size_t>(length));
    EXPECT_EQ(result.text[0], TestTokenizer().Decode(result.token_ids[0], true)) << length;
  }
}

TEST(GenerateCall, RandomBytesStayUtf8) {
  std::mt19937 random(5);
  std::vector<int32_t> ids;
  for (int i = 0; i < 4000; ++i) ids.push_back(static_cast<int32_t>(random() % 256));
  TestServer server({.script = [&ids](const GenerationRequest&, int) { return ids; }});
  const Collected result = Collect(*server.Client(), TextRequest("hello", 4000));
  ASSERT_TRUE(result.status.ok()) << result.status;
  EXPECT_EQ(result.token_ids[0], ids);
  EXPECT_EQ(result.text[0], TestTokenizer().Decode(ids, true));
}

// A Llama-2-style decoder: the first word's space belongs to a text that goes on, not to an answer.
TEST(GenerateCall, OnlyTextIsContinuedWithItsSpace) {
  using nlohmann::json;
  const std::string testdata = std::string(MOBI_SOURCE_DIR) + "/tests/testdata/";
  const json chats = json::parse(std::ifstream(testdata + "chat_goldens.json"));
  json config = {{"bos_token", "<s>"}, {"eos_token", "</s>"}};
  for (const json& family : chats["families"]) {
    if (family["name"] == "llama2") config["chat_template"] = family["template"];
  }
  const json vocabulary = json::parse(std::ifstream(testdata + "tokenizer_llama2.json"));
  auto tokenizer =
      Tokenizer::Parse(vocabulary.dump(), "tokenizer.json", config.dump(), "tokenizer_config.json");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto words = (*tokenizer)->Encode("the said", {.add_special_tokens = false});
  ASSERT_TRUE(words.ok());
  TestServer server(ScriptedModel({.script = [&](const GenerationRequest&, int) { return *words; }},
                                  *std::move(tokenizer)));
  const auto stub = server.Client();
  const int length = static_cast<int>(words->size());
  EXPECT_EQ(Collect(*stub, TextRequest("hello", length)).text[0], " the said");
  v1::GenerateRequest chat;
  chat.set_max_new_tokens(length);
  auto& message = *chat.mutable_chat()->add_messages();
  message.set_role("user");
  message.set_content("hello");
  const Collected answer = Collect(*stub, chat);
  EXPECT_TRUE(answer.status.ok()) << answer.status;
  EXPECT_EQ(answer.text[0], "the said");
  v1::GenerateRequest ids;
  ids.set_max_new_tokens(length);
  ids.mutable_token_ids()->add_ids(1);
  EXPECT_EQ(Collect(*stub, ids).text[0], "the said");
}

TEST(GenerateCall, StopStringsSplitOverTokensNeverLeak) {
  const std::string text = "one two thrEND of it, and ENDING comes late";
  TestServer server({.script = Says(text, /*bytes=*/true)});
  const auto stub = server.Client();
  v1::GenerateRequest request = TextRequest("hello");
  request.add_stop("late");
  request.add_stop("ENDING");
  const Collected result = Collect(*stub, request);
  ASSERT_TRUE(result.status.ok()) << result.status;
  EXPECT_EQ(result.text[0], "one two thrEND of it, and ");
  EXPECT_EQ(result.last_chunks[0].finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(result.last_chunks[0].stop(), "ENDING");
  EXPECT_EQ(result.summary.usage().completion_tokens(),
            static_cast<int>(result.token_ids[0].size()));
  // What was held back as a possible stop comes with the end.
  v1::GenerateRequest cut = TextRequest("hello", 13);
  cut.add_stop("thrENDING");
  const Collected held = Collect(*stub, cut);
  EXPECT_EQ(held.text[0], "one two thrEN");
  EXPECT_EQ(held.last_chunks[0].finish_reason(), v1::FINISH_REASON_LENGTH);
}

TEST(GenerateCall, StopIdsAreNotPartOfTheCompletion) {
  TestServer server({.script = Says("abcdef", /*bytes=*/true)});
  v1::GenerateRequest request = TextRequest("hello");
  request.add_stop_ids(TokensOf("d", true)[0]);
  const Collected result = Collect(*server.Client(), request);
  EXPECT_EQ(result.text[0], "abc");
  EXPECT_EQ(result.token_ids[0].size(), 3u);
  EXPECT_EQ(result.last_chunks[0].stop_id(), request.stop_ids(0));
}

TEST(GenerateCall, CompletionsOfOneRequestAreApart) {
  const auto script = [](const GenerationRequest&, int index) {
    return TokensOf(std::string(20 + 10 * index, static_cast<char>('a' + index)), true);
  };
  TestServer server({.script = script});
  v1::GenerateRequest request = TextRequest("hello");
  request.set_n(3);
  request.add_stop("bbb");
  const Collected result = Collect(*server.Client(), request);
  ASSERT_TRUE(result.status.ok()) << result.status;
  EXPECT_THAT(result.text, ElementsAre(std::string(20, 'a'), "", std::string(40, 'c')));
  EXPECT_EQ(result.last_chunks[1].stop(), "bbb");
  EXPECT_EQ(result.summary.finish_reasons_size(), 3);
  EXPECT_EQ(result.summary.usage().completion_tokens(), 20 + 3 + 40);
}

TEST(GenerateCall, LogprobsComeWithEveryToken) {
  TestServer server({.script = Says("hello", true)});
  v1::GenerateRequest request = TextRequest("hi");
  request.set_logprobs(2);
  const Collected result = Collect(*server.Client(), request);
  ASSERT_TRUE(result.status.ok()) << result.status;
  size_t logprobs = 0;
  for (const auto& message : result.messages) {
    for (const auto& chunk : message.chunks()) {
      ASSERT_EQ(chunk.logprobs_size(), chunk.token_ids_size());
      for (int i = 0; i < chunk.logprobs_size(); ++i, ++logprobs) {
        const v1::TokenLogprob& logprob = chunk.logprobs(i);
        EXPECT_EQ(logprob.token_id(), chunk.token_ids(i));
        EXPECT_EQ(logprob.token(), std::string(1, "hello"[logprobs]));
        ASSERT_EQ(logprob.top_size(), 2);
        EXPECT_EQ(logprob.top(0).token_id(), logprob.token_id());
        EXPECT_GT(logprob.top(0).logprob(), logprob.top(1).logprob());
      }
    }
  }
  EXPECT_EQ(logprobs, 5u);
  request.set_logprobs(0);
  const Collected plain = Collect(*server.Client(), request);
  EXPECT_EQ(plain.messages[0].chunks(0).logprobs(0).top_size(), 0);
  EXPECT_EQ(plain.messages[0].chunks(0).logprobs(0).logprob(), -0.25f);
}

TEST(GenerateCall, EchoAndPromptLogprobsComeFirst) {
  TestServer server({.script = Says("x")});
  const auto stub = server.Client();
  v1::GenerateRequest request = TextRequest("hello there");
  request.set_echo(true);
  request.set_prompt_logprobs(0);
  const Collected result = Collect(*stub, request);
  ASSERT_TRUE(result.has_prompt);
  EXPECT_EQ(result.prompt.text(), "hello there");
  const auto prompt = server.engine().submitted()[0].prompt;
  EXPECT_THAT(result.prompt.token_ids(), ::testing::ElementsAreArray(prompt));
  ASSERT_EQ(result.prompt.logprobs_size(), static_cast<int>(prompt.size()) - 1);
  for (int i = 0; i < result.prompt.logprobs_size(); ++i) {
    EXPECT_EQ(result.prompt.logprobs(i).token_id(), prompt[i + 1]);
    EXPECT_EQ(result.prompt.logprobs(i).logprob(), -0.5f * static_cast<float>(i + 1));
  }
  // Scoring alone: no token, and still the prompt.
  request.set_max_new_tokens(0);
  const Collected scored = Collect(*stub, request);
  ASSERT_TRUE(scored.status.ok()) << scored.status;
  EXPECT_TRUE(scored.has_prompt);
  EXPECT_TRUE(scored.token_ids[0].empty());
  EXPECT_EQ(scored.last_chunks[0].finish_reason(), v1::FINISH_REASON_LENGTH);
}

TEST(GenerateCall, RequestReachesTheEngineWhole) {
  TestServer server({.script = Says("x")});
  v1::GenerateRequest request = TextRequest("hello", 7);
  request.set_n(2);
  request.set_ignore_eos(true);
  request.set_logprobs(3);
  request.set_cache_salt("salt");
  request.set_priority_class("premium");
  request.mutable_precision()->set_pinned_bits(4);
  v1::Sampling& sampling = *request.mutable_sampling();
  sampling.set_temperature(0.5);
  sampling.set_top_k(11);
  sampling.set_seed(42);
  (*sampling.mutable_logit_bias())[7] = -5;
  Collect(*server.Client(), request,
          [](grpc::ClientContext& context) { context.AddMetadata("mobi-tenant", "acme"); });
  const GenerationRequest got = server.engine().submitted()[0];
  EXPECT_EQ(got.max_new_tokens, 7);
  EXPECT_EQ(got.n, 2);
  EXPECT_TRUE(got.ignore_eos);
  EXPECT_EQ(got.top_logprobs, 3);
  EXPECT_EQ(got.cache_salt, "salt");
  EXPECT_EQ(got.tenant, "acme");
  EXPECT_EQ(got.priority, 1);
  EXPECT_TRUE(got.precision.pinned());
  EXPECT_EQ(got.precision.min_bits, 4);
  EXPECT_EQ(got.sampling.temperature, 0.5f);
  EXPECT_EQ(got.sampling.top_k, 11);
  EXPECT_EQ(got.sampling.seed, 42u);
  EXPECT_THAT(got.sampling.logit_bias, ElementsAre(std::pair(7, -5.0f)));
}

TEST(GenerateCall, StatusesOfTheEngineReachTheClient) {
  TestServer server({.script = Endless(), .step_time = milliseconds(1)});
  const auto stub = server.Client();
  server.engine().RefuseSubmits(absl::ResourceExhaustedError("the queue is full"));
  Collected result = Collect(*stub, TextRequest("hello"));
  EXPECT_EQ(result.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(HasRetryInfo(result.status));
  EXPECT_TRUE(result.messages.empty());
  server.engine().RefuseSubmits(absl::OkStatus());

  server.engine().GiveNonFiniteLogits();
  result = Collect(*stub, TextRequest("hello"));
  EXPECT_EQ(result.status.code(), absl::StatusCode::kDataLoss);
  EXPECT_FALSE(HasRetryInfo(result.status));
  EXPECT_FALSE(result.has_summary);
  EXPECT_TRUE(Collect(*stub, TextRequest("hello", 5)).status.ok());  // that request alone
}

TEST(GenerateCall, TenantsAreBounded) {
  TestServer server({.script = Says("x")});
  const Collected result =
      Collect(*server.Client(), TextRequest("hello"), [](grpc::ClientContext& context) {
        context.AddMetadata("mobi-tenant", std::string(65, 'a'));
      });
  EXPECT_EQ(result.status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(result.status.message()), HasSubstr("mobi-tenant"));
}

TEST(GenerateCall, TheDeadlineEndsARequestWhereItWaits) {
  TestServer server({.script = Endless(), .paused = true});
  const Collected result =
      Collect(*server.Client(), TextRequest("hello"), [](grpc::ClientContext& context) {
        context.set_deadline(std::chrono::system_clock::now() + milliseconds(100));
      });
  EXPECT_EQ(result.status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(Eventually([&] { return server.engine().live() == 0; }));
  const auto deadline = server.engine().submitted()[0].deadline;
  EXPECT_LT(deadline, std::chrono::steady_clock::now() + std::chrono::seconds(1));
  EXPECT_TRUE(Eventually([&] { return server.server().running_requests() == 0; }));
}

TEST(GenerateCall, LongDeadlinesAreCapped) {
  ServerOptions options = TestServerOptions();
  options.request_limits.max_deadline = milliseconds(50);
  TestServer server({.script = Endless(), .paused = true}, options);
  const Collected result = Collect(*server.Client(), TextRequest("hello"));
  EXPECT_EQ(result.status.code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(GenerateCall, ThousandsOfCancelsLeaveNothingBehind) {
  TestServer server({.script = Endless(), .step_time = std::chrono::microseconds(100)});
  constexpr int kThreads = 8;
  constexpr int kCalls = 500;
  std::atomic<int> finished{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      const auto stub = server.Client();
      for (int i = 0; i < kCalls; ++i) {
        grpc::ClientContext context;
        const auto reader = stub->Generate(&context, TextRequest("hello", 1 + random() % 40));
        v1::GenerateResponse message;
        for (int reads = static_cast<int>(random() % 4); reads > 0; --reads) {
          if (!reader->Read(&message)) break;
        }
        if (random() % 4 != 0) context.TryCancel();
        while (reader->Read(&message)) {
        }
        finished += reader->Finish().ok();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(Eventually([&] { return server.server().running_requests() == 0; }));
  EXPECT_TRUE(Eventually([&] { return server.engine().live() == 0; }));
  EXPECT_EQ(server.engine().ended(), server.engine().submitted().size());
  EXPECT_GT(finished, 0);
  EXPECT_TRUE(Collect(*server.Client(), TextRequest("hello", 3)).status.ok());
}

TEST(GenerateCall, ClientsThatVanishAreCancelled) {
  TestServer server({.script = Endless(), .paused = true});
  {
    auto stub = server.Client();
    grpc::ClientContext context;
    const auto reader = stub->Generate(&context, TextRequest("hello"));
    ASSERT_TRUE(Eventually([&] { return server.engine().live() == 1; }));
    context.TryCancel();
  }
  EXPECT_TRUE(Eventually([&] { return server.engine().live() == 0; }));
  EXPECT_TRUE(Eventually([&] { return server.server().running_requests() == 0; }));
}

// The connection's flow control stops taking data; the engine must not notice.
TEST(GenerateCall, ASlowReaderSlowsNobody) {
  ServerOptions options = TestServerOptions();
  options.stream_limits.max_outbox_bytes = 16 << 10;
  options.request_limits.max_new_tokens = 1 << 20;
  TestServer server({.script = Endless()}, options);
  const auto slow_stub = server.Client();
  grpc::ClientContext slow_context;
  v1::GenerateRequest endless = TextRequest("hello", 1 << 19);
  endless.set_logprobs(20);
  const auto slow = slow_stub->Generate(&slow_context, endless);
  ASSERT_TRUE(Eventually([&] { return !server.engine().submitted().empty(); }));
  // It reads nothing. Others stream, and its request ends without their waiting.
  for (int i = 0; i < 10; ++i) {
    EXPECT_TRUE(Collect(*server.Client(), TextRequest("hello", 200)).status.ok());
  }
  EXPECT_TRUE(Eventually([&] { return server.engine().live() == 0; }));
  EXPECT_LT(server.engine().stats().generation_tokens, (1u << 19));
  // When it reads again it gets what was on its way, then the reason.
  v1::GenerateResponse message;
  while (slow->Read(&message)) {
  }
  const absl::Status status = FromGrpcStatus(slow->Finish());
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("too slowly"));
  EXPECT_TRUE(HasRetryInfo(status));
  EXPECT_THAT(server.MetricsText(), HasSubstr("mobi_outbox_overflows_total 1"));
}

TEST(GenerateCall, AReaderThatStopsIsCutOff) {
  ServerOptions options = TestServerOptions();
  options.stream_limits.max_outbox_bytes = 64 << 20;
  options.stream_limits.max_write_stall = milliseconds(200);
  options.request_limits.max_new_tokens = 1 << 20;
  TestServer server({.script = Endless()}, options);
  const auto stub = server.Client();
  grpc::ClientContext context;
  v1::GenerateRequest request = TextRequest("hello", 1 << 16);
  request.set_logprobs(20);
  const auto reader = stub->Generate(&context, request);
  EXPECT_TRUE(Eventually([&] { return server.server().running_requests() == 1; }));
  EXPECT_TRUE(Eventually([&] { return server.server().running_requests() == 0; }));
  EXPECT_TRUE(Eventually([&] { return server.engine().live() == 0; }));
  EXPECT_THAT(server.MetricsText(), HasSubstr("mobi_write_stalls_total 1"));
  context.TryCancel();
}

TEST(GenerateCall, ManyStreamsAtOnceAllComplete) {
  TestServer server({.script = Says(kStory)});
  constexpr int kThreads = 32;
  std::vector<std::thread> threads;
  std::atomic<int> good{0};
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      const auto stub = server.Client();
      for (int i = 0; i < 10; ++i) {
        const Collected result = Collect(*stub, TextRequest("hello"));
        EXPECT_TRUE(result.status.ok()) << result.status;
        good += result.status.ok() && result.text[0] == kStory && result.has_summary;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, kThreads * 10);
  EXPECT_TRUE(Eventually([&] { return server.server().running_requests() == 0; }));
}

}  // namespace
}  // namespace mobi
