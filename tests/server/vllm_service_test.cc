#include "server/vllm_service.h"

#include <limits>
#include <thread>

#include "absl/strings/numbers.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/rpc_status.h"
#include "server/vllm_wire.h"
#include "tests/server/server_fixture.h"

namespace mobi {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using Engine = vllm_pb::VllmEngine;

// Everything one Generate returned.
struct Answer {
  absl::Status status;
  std::vector<std::vector<uint32_t>> streamed;  // by completion
  std::vector<vllm_pb::GenerateStreamChunk> chunks;
  std::vector<vllm_pb::GenerateComplete> complete;
  std::map<std::string, std::string> trailers;
};

Answer Ask(TestServer& server, const vllm_pb::GenerateRequest& request,
           const std::map<std::string, std::string>& metadata = {}) {
  const auto stub = Engine::NewStub(server.Channel());
  grpc::ClientContext context;
  for (const auto& [key, value] : metadata) context.AddMetadata(key, value);
  Answer answer;
  answer.streamed.resize(4);
  const auto reader = stub->Generate(&context, request);
  vllm_pb::GenerateResponse response;
  while (reader->Read(&response)) {
    if (response.has_chunk()) {
      EXPECT_TRUE(answer.complete.empty()) << "a chunk after a completion's last message";
      const auto& ids = response.chunk().token_ids();
      EXPECT_EQ(response.chunk().completion_tokens(), static_cast<uint32_t>(ids.size()));
      auto& all = answer.streamed[response.chunk().index()];
      all.insert(all.end(), ids.begin(), ids.end());
      answer.chunks.push_back(response.chunk());
    } else {
      answer.complete.push_back(response.complete());
    }
  }
  answer.status = FromGrpcStatus(reader->Finish());
  for (const auto& [key, value] : context.GetServerTrailingMetadata()) {
    answer.trailers[std::string(key.data(), key.size())] = std::string(value.data(), value.size());
  }
  return answer;
}

vllm_pb::GenerateRequest Request(bool stream, int max_tokens = 100) {
  vllm_pb::GenerateRequest request;
  request.set_request_id("r1");
  for (const int32_t id : TokensOf("hello")) {
    request.mutable_tokenized()->add_input_ids(static_cast<uint32_t>(id));
  }
  request.set_stream(stream);
  request.mutable_sampling_params()->set_max_tokens(static_cast<uint32_t>(max_tokens));
  return request;
}

std::vector<uint32_t> Ids(const std::string& text) {
  const auto ids = TokensOf(text, /*bytes=*/true);
  return {ids.begin(), ids.end()};
}

TEST(VllmService, StreamsIdsThenCompletes) {
  TestServer server({.script = [](const GenerationRequest&, int index) {
    return TokensOf(index == 0 ? "one" : "three", true);
  }});
  vllm_pb::GenerateRequest request = Request(/*stream=*/true);
  request.mutable_sampling_params()->set_n(2);
  const Answer answer = Ask(server, request);
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  EXPECT_EQ(answer.streamed[0], Ids("one"));
  EXPECT_EQ(answer.streamed[1], Ids("three"));
  const auto prompt = static_cast<uint32_t>(TokensOf("hello").size());
  for (const auto& chunk : answer.chunks) EXPECT_EQ(chunk.prompt_tokens(), prompt);
  ASSERT_EQ(answer.complete.size(), 2u);
  for (uint32_t i = 0; i < 2; ++i) {
    const vllm_pb::GenerateComplete& complete = answer.complete[i];
    EXPECT_EQ(complete.index(), i);
    EXPECT_THAT(complete.output_ids(), ElementsAreArray(answer.streamed[i]));
    EXPECT_EQ(complete.finish_reason(), "stop");
    EXPECT_EQ(complete.matched_token_id(), static_cast<uint32_t>(kScriptedEos));
    EXPECT_EQ(complete.prompt_tokens(), prompt);
    EXPECT_EQ(complete.completion_tokens(), answer.streamed[i].size());
  }
  float bits = 0;
  EXPECT_TRUE(absl::SimpleAtof(answer.trailers.at("mobi-effective-bits"), &bits));
  EXPECT_EQ(bits, 8);
  EXPECT_EQ(answer.trailers.count("mobi-decode-ms"), 1u);
}

TEST(VllmService, WithoutStreamOnlyTheEndIsSent) {
  TestServer server({.script = Says("one two thrEND", true)});
  vllm_pb::GenerateRequest request = Request(/*stream=*/false);
  request.mutable_sampling_params()->add_stop("END");
  request.mutable_sampling_params()->set_logprobs(2);
  request.mutable_sampling_params()->set_prompt_logprobs(1);
  const Answer answer = Ask(server, request);
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  EXPECT_TRUE(answer.chunks.empty());
  ASSERT_EQ(answer.complete.size(), 1u);
  const vllm_pb::GenerateComplete& complete = answer.complete[0];
  EXPECT_THAT(complete.output_ids(), ElementsAreArray(Ids("one two thrEND")));
  EXPECT_EQ(complete.matched_stop_str(), "END");
  EXPECT_EQ(complete.finish_reason(), "stop");
  ASSERT_EQ(complete.output_logprobs().token_logprobs_size(), complete.output_ids_size());
  EXPECT_THAT(complete.output_logprobs().token_ids(), ElementsAreArray(complete.output_ids()));
  EXPECT_EQ(complete.output_logprobs().top_logprobs(3).values_size(), 2);
  // The first token of a prompt has no logprob.
  const auto& input = complete.input_logprobs();
  ASSERT_EQ(input.token_logprobs_size(), request.tokenized().input_ids_size());
  EXPECT_THAT(input.token_ids(), ElementsAreArray(request.tokenized().input_ids()));
  EXPECT_FALSE(input.token_logprobs(0).has_value());
  if (input.token_logprobs_size() > 1) {
    EXPECT_EQ(input.token_logprobs(1).value(), -0.5f);
  }
}

TEST(VllmService, LogprobsOfThePromptComeWithTheFirstChunk) {
  TestServer server(
      {.script = Says("some words", true), .step_time = std::chrono::milliseconds(2)});
  vllm_pb::GenerateRequest request = Request(/*stream=*/true);
  request.clear_tokenized();
  request.set_text("a longer prompt of text");
  request.mutable_sampling_params()->set_logprobs(0);
  request.mutable_sampling_params()->set_prompt_logprobs(0);
  const Answer answer = Ask(server, request);
  ASSERT_TRUE(answer.status.ok()) << answer.status;
  ASSERT_GT(answer.chunks.size(), 1u);
  for (size_t i = 0; i < answer.chunks.size(); ++i) {
    EXPECT_EQ(answer.chunks[i].has_input_logprobs(), i == 0);
    EXPECT_EQ(answer.chunks[i].output_logprobs().token_logprobs_size(),
              answer.chunks[i].token_ids_size());
  }
  const auto prompt = server.engine().submitted()[0].prompt;
  EXPECT_EQ(answer.chunks[0].input_logprobs().token_ids_size(), static_cast<int>(prompt.size()));
}

TEST(VllmService, ParametersReachTheEngine) {
  TestServer server({.script = Says("x")});
  vllm_pb::GenerateRequest request = Request(true, 7);
  vllm_pb::SamplingParams& params = *request.mutable_sampling_params();
  params.set_temperature(0);
  params.set_top_p(0.5);
  params.set_top_k(3);
  params.set_min_p(0.1f);
  params.set_frequency_penalty(0.2f);
  params.set_presence_penalty(0.3f);
  params.set_repetition_penalty(1.5f);
  params.set_seed(99);
  params.set_ignore_eos(true);
  params.add_stop_token_ids(5);
  (*params.mutable_logit_bias())[9] = 2;
  const std::map<std::string, std::string> metadata = {{"mobi-min-bits", "3.5"},
                                                       {"mobi-max-bits", "6"},
                                                       {"mobi-priority-class", "premium"},
                                                       {"mobi-tenant", "acme"},
                                                       {"mobi-cache-salt", "salt"}};
  ASSERT_TRUE(Ask(server, request, metadata).status.ok());
  ASSERT_TRUE(Ask(server, Request(true), {{"mobi-pinned-bits", "4"}}).status.ok());
  vllm_pb::GenerateRequest plain;
  plain.set_text("hi");
  ASSERT_TRUE(Ask(server, plain).status.ok());
  const auto got = server.engine().submitted();
  EXPECT_THAT(got[0].prompt, ElementsAreArray(TokensOf("hello")));
  EXPECT_EQ(got[0].max_new_tokens, 7);
  EXPECT_EQ(got[0].sampling.temperature, 0);
  EXPECT_EQ(got[0].sampling.top_p, 0.5f);
  EXPECT_EQ(got[0].sampling.top_k, 3);
  EXPECT_EQ(got[0].sampling.min_p, 0.1f);
  EXPECT_EQ(got[0].sampling.frequency_penalty, 0.2f);
  EXPECT_EQ(got[0].sampling.presence_penalty, 0.3f);
  EXPECT_EQ(got[0].sampling.repetition_penalty, 1.5f);
  EXPECT_EQ(got[0].sampling.seed, 99u);
  EXPECT_TRUE(got[0].ignore_eos);
  EXPECT_THAT(got[0].stop_ids, ElementsAre(5));
  EXPECT_THAT(got[0].sampling.logit_bias, ElementsAre(std::pair(9, 2.0f)));
  EXPECT_EQ(got[0].precision.min_bits, 3.5f);
  EXPECT_EQ(got[0].precision.max_bits, 6);
  EXPECT_EQ(got[0].priority, 1);
  EXPECT_EQ(got[0].tenant, "acme");
  EXPECT_EQ(got[0].cache_salt, "salt");
  EXPECT_TRUE(got[1].precision.pinned());
  // The defaults of the contract: what fits, one completion, nothing filtered.
  EXPECT_EQ(got[2].max_new_tokens, RequestLimits().max_new_tokens);
  EXPECT_EQ(got[2].n, 1);
  EXPECT_EQ(got[2].sampling.temperature, 1);
  EXPECT_EQ(got[2].sampling.top_p, 1);
  EXPECT_EQ(got[2].sampling.repetition_penalty, 1);
}

TEST(VllmService, RefusalsNameTheContractsFields) {
  TestServer server({.script = Says("x"), .max_model_len = 100});
  using R = vllm_pb::GenerateRequest;
  using Metadata = std::map<std::string, std::string>;
  const auto params = [](R& r) { return r.mutable_sampling_params(); };
  struct Case {
    const char* message;
    std::function<void(R&)> spoil;
    Metadata metadata = {};
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Case cases[] = {
      {"input: needs one of", [](R& r) { r.clear_input(); }},
      {"text: is empty", [](R& r) { r.set_text(""); }},
      {"tokenized.input_ids: is empty", [](R& r) { r.mutable_tokenized()->clear_input_ids(); }},
      {"tokenized.input_ids[0]: 4000", [](R& r) { r.mutable_tokenized()->set_input_ids(0, 4000); }},
      {"tokenized.input_ids[0]: 2147483647",
       [](R& r) { r.mutable_tokenized()->set_input_ids(0, 0xFFFFFFFFu); }},
      {"sampling_params.temperature: -1 is out", [&](R& r) { params(r)->set_temperature(-1); }},
      {"sampling_params.top_p: 2 is out", [&](R& r) { params(r)->set_top_p(2); }},
      {"sampling_params.top_p: nan", [&](R& r) { params(r)->set_top_p(nan); }},
      {"sampling_params.top_p: -nan", [&](R& r) { params(r)->set_top_p(-nan); }},
      {"sampling_params.top_k: 2147483647", [&](R& r) { params(r)->set_top_k(0xFFFFFFFFu); }},
      {"sampling_params.min_p: nan", [&](R& r) { params(r)->set_min_p(nan); }},
      {"sampling_params.frequency_penalty: 3", [&](R& r) { params(r)->set_frequency_penalty(3); }},
      {"sampling_params.presence_penalty: 3", [&](R& r) { params(r)->set_presence_penalty(3); }},
      {"sampling_params.repetition_penalty: 3",
       [&](R& r) { params(r)->set_repetition_penalty(3); }},
      {"sampling_params.max_tokens: 5000", [&](R& r) { params(r)->set_max_tokens(5000); }},
      {"sampling_params.min_tokens: is not offered", [&](R& r) { params(r)->set_min_tokens(1); }},
      {"sampling_params.stop[0]: is empty", [&](R& r) { params(r)->add_stop(""); }},
      {"sampling_params.stop_token_ids[0]: 4000",
       [&](R& r) { params(r)->add_stop_token_ids(4000); }},
      {"sampling_params.n: 5 is out", [&](R& r) { params(r)->set_n(5); }},
      {"sampling_params.logprobs: -1 is out", [&](R& r) { params(r)->set_logprobs(-1); }},
      {"sampling_params.prompt_logprobs: 21", [&](R& r) { params(r)->set_prompt_logprobs(21); }},
      {"sampling_params.logit_bias[4000]: 4000",
       [&](R& r) { (*params(r)->mutable_logit_bias())[4000] = 1; }},
      {"sampling_params.truncate_prompt_tokens: is not",
       [&](R& r) { params(r)->set_truncate_prompt_tokens(-1); }},
      {"sampling_params.constraint: structured", [&](R& r) { params(r)->set_regex("a"); }},
      {"mm_inputs: is not offered",
       [](R& r) {
         r.GetReflection()->MutableUnknownFields(&r)->AddLengthDelimited(7)->assign("\x12");
       }},
      {"kv_transfer_params: is not offered",
       [](R& r) {
         r.GetReflection()->MutableUnknownFields(&r)->AddLengthDelimited(8)->assign("{}");
       }},
      {"mobi-min-bits: is not a number", [](R&) {}, {{"mobi-min-bits", "four"}}},
      {"mobi-min-bits: 1 is out of range", [](R&) {}, {{"mobi-min-bits", "1"}}},
      {"mobi-max-bits: nan is out of range", [](R&) {}, {{"mobi-max-bits", "nan"}}},
      {"mobi-pinned-bits: 9 is out of range", [](R&) {}, {{"mobi-pinned-bits", "9"}}},
      {"mobi-priority-class: the policy", [](R&) {}, {{"mobi-priority-class", "gold"}}},
      {"mobi-cache-salt: 129 bytes", [](R&) {}, {{"mobi-cache-salt", std::string(129, 'x')}}},
  };
  for (const Case& c : cases) {
    R request = Request(true, 10);
    c.spoil(request);
    const absl::Status status = Ask(server, request, c.metadata).status;
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.message << " " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message));
    EXPECT_TRUE(DetailOf<google::rpc::BadRequest>(status)) << c.message;
  }
  EXPECT_TRUE(server.engine().submitted().empty());
}

TEST(VllmService, AbortEndsCallsOfThisServiceById) {
  TestServer server({.script = [](const GenerationRequest& r,
                                  int) { return std::vector<int32_t>(r.max_new_tokens, 65); },
                     .paused = true});
  absl::Status aborted;
  absl::Status native;
  std::thread caller([&] { aborted = Ask(server, Request(true)).status; });
  std::thread other([&] {
    v1::GenerateRequest request = TextRequest("hello", 10);
    request.set_request_id("r1");
    native = Collect(*server.Client(), request).status;
  });
  ASSERT_TRUE(Eventually([&] { return server.engine().live() == 2; }));
  const auto stub = Engine::NewStub(server.Channel());
  grpc::ClientContext context;
  vllm_pb::AbortRequest request;
  request.add_request_ids("unknown");
  request.add_request_ids("r1");
  request.add_request_ids("");
  vllm_pb::AbortResponse response;
  EXPECT_TRUE(stub->Abort(&context, request, &response).ok());
  caller.join();
  EXPECT_EQ(aborted.code(), absl::StatusCode::kCancelled) << aborted;
  EXPECT_THAT(std::string(aborted.message()), HasSubstr("aborted"));
  server.engine().Pause(false);
  other.join();
  EXPECT_TRUE(native.ok()) << "ids of other services are their own: " << native;
}

TEST(VllmService, TellsAboutModelAndServer) {
  TestServer server({.script = Says("x"), .max_model_len = 77}, TestServerOptions(), false);
  const auto stub = Engine::NewStub(server.Channel());
  const auto healthy = [&] {
    grpc::ClientContext context;
    vllm_pb::HealthCheckResponse health;
    EXPECT_TRUE(stub->HealthCheck(&context, {}, &health).ok());
    return health.healthy();
  };
  EXPECT_FALSE(healthy());
  server.Load();
  EXPECT_TRUE(healthy());
  {
    grpc::ClientContext context;
    vllm_pb::GetModelInfoResponse info;
    ASSERT_TRUE(stub->GetModelInfo(&context, {}, &info).ok());
    EXPECT_EQ(info.served_model_name(), "scripted");
    EXPECT_TRUE(info.is_generation());
    EXPECT_EQ(info.max_context_length(), 77u);
    EXPECT_EQ(info.vocab_size(), static_cast<uint32_t>(TestTokenizer().vocab_size()));
    EXPECT_THAT(info.eos_token_ids(), ElementsAre(kScriptedEos));
  }
  const auto server_info = [&] {
    grpc::ClientContext context;
    vllm_pb::GetServerInfoResponse info;
    EXPECT_TRUE(stub->GetServerInfo(&context, {}, &info).ok());
    return info;
  };
  EXPECT_EQ(server_info().last_receive_timestamp(), 0);
  ASSERT_TRUE(Ask(server, Request(true, 10)).status.ok());
  EXPECT_GT(server_info().last_receive_timestamp(), 1.6e9);
  EXPECT_GT(server_info().uptime_seconds(), 0);
  EXPECT_EQ(server_info().server_type(), "mobi-server");
  server.server().Drain();
  EXPECT_FALSE(healthy());
  EXPECT_TRUE(server_info().is_paused());
  grpc::ClientContext context;
  vllm_pb::EmbedResponse embedding;
  EXPECT_EQ(stub->Embed(&context, {}, &embedding).error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

}  // namespace
}  // namespace mobi
