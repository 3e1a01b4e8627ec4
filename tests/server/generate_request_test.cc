#include "server/generate_request.h"

#include <functional>
#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/rpc_status.h"
#include "tests/server/server_fixture.h"

namespace mobi {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

class GenerateRequestTest : public ::testing::Test {
 protected:
  GenerateRequestTest() : model_(ScriptedModel({.script = Says(""), .max_model_len = 100})) {
    policy_.max_request_bits = 6;
    policy_.classes[0].floor_bits = 4.5;
  }
  absl::StatusOr<ParsedRequest> Parse(const v1::GenerateRequest& request) {
    return ParseGenerateRequest(request, *model_, limits_, policy_, {});
  }

  std::unique_ptr<ServedModel> model_;
  RequestLimits limits_;
  Policy policy_ = FixedPolicy(8);
};

struct BadRequest {
  const char* field;
  const char* reason;
  std::function<void(v1::GenerateRequest&)> spoil;
};

TEST_F(GenerateRequestTest, EveryFieldHasItsOwnRefusal) {
  using R = v1::GenerateRequest;
  const auto sampling = [](R& r) { return r.mutable_sampling(); };
  const auto precision = [](R& r) { return r.mutable_precision(); };
  const BadRequest cases[] = {
      {"prompt", "needs one of", [](R& r) { r.clear_prompt(); }},
      {"text", "is empty", [](R& r) { r.set_text(""); }},
      {"text", "600000 bytes, at most 524288", [](R& r) { r.set_text(std::string(600000, 'x')); }},
      {"text", "tokens, at most 99 fit", [](R& r) { r.set_text(std::string(200, '?')); }},
      {"token_ids", "is empty", [](R& r) { r.mutable_token_ids(); }},
      {"token_ids.ids[1]", "320 is out of range [0, 319]",
       [](R& r) {
         r.mutable_token_ids()->add_ids(5);
         r.mutable_token_ids()->add_ids(320);
       }},
      {"token_ids.ids[0]", "-1 is out of range", [](R& r) { r.mutable_token_ids()->add_ids(-1); }},
      {"chat.messages", "is empty", [](R& r) { r.mutable_chat(); }},
      {"chat", "robot", [](R& r) { r.mutable_chat()->add_messages()->set_role("robot"); }},
      {"chat.messages", "1025 messages, at most 1024",
       [](R& r) {
         for (int i = 0; i < 1025; ++i) r.mutable_chat()->add_messages()->set_role("user");
       }},
      {"model", "\"gpt\" is unknown, this server has \"scripted\"",
       [](R& r) { r.set_model("gpt"); }},
      {"request_id", "129 bytes", [](R& r) { r.set_request_id(std::string(129, 'a')); }},
      {"request_id", "printable", [](R& r) { r.set_request_id("a b"); }},
      {"request_id", "printable", [](R& r) { r.set_request_id("\xC3\xA9"); }},
      {"cache_salt", "129 bytes", [](R& r) { r.set_cache_salt(std::string(129, 'a')); }},
      {"max_new_tokens", "-1 is out of range [0, 4096]", [](R& r) { r.set_max_new_tokens(-1); }},
      {"max_new_tokens", "4097 is out of range", [](R& r) { r.set_max_new_tokens(4097); }},
      {"max_new_tokens", "has room for", [](R& r) { r.set_max_new_tokens(100); }},
      {"n", "0 is out of range [1, 4]", [](R& r) { r.set_n(0); }},
      {"n", "5 is out of range", [](R& r) { r.set_n(5); }},
      {"logprobs", "21 is out of range [0, 20]", [](R& r) { r.set_logprobs(21); }},
      {"logprobs", "-1 is out of range", [](R& r) { r.set_logprobs(-1); }},
      {"prompt_logprobs", "21 is out of range [0, 20]", [](R& r) { r.set_prompt_logprobs(21); }},
      {"prompt_logprobs", "-1 is out of range", [](R& r) { r.set_prompt_logprobs(-1); }},
      {"priority_class", "no class \"gold\"", [](R& r) { r.set_priority_class("gold"); }},
      {"stop", "9 strings, at most 8",
       [](R& r) {
         for (int i = 0; i < 9; ++i) r.add_stop("x");
       }},
      {"stop[1]", "is empty", [](R& r) { r.add_stop("x"), r.add_stop(""); }},
      {"stop[0]", "65 bytes, at most 64", [](R& r) { r.add_stop(std::string(65, 'x')); }},
      {"stop_ids", "9 ids, at most 8",
       [](R& r) {
         for (int i = 0; i < 9; ++i) r.add_stop_ids(i);
       }},
      {"stop_ids[0]", "320 is out of range", [](R& r) { r.add_stop_ids(320); }},
      {"sampling.temperature", "2.1 is out of range [0, 2]",
       [&](R& r) { sampling(r)->set_temperature(2.1f); }},
      {"sampling.temperature", "-0.1 is", [&](R& r) { sampling(r)->set_temperature(-0.1f); }},
      {"sampling.temperature", "nan is", [&](R& r) { sampling(r)->set_temperature(kNan); }},
      {"sampling.top_p", "0 is out of range (0, 1]", [&](R& r) { sampling(r)->set_top_p(0); }},
      {"sampling.top_p", "nan is out of range", [&](R& r) { sampling(r)->set_top_p(kNan); }},
      {"sampling.top_p", "1.01 is out of range", [&](R& r) { sampling(r)->set_top_p(1.01f); }},
      {"sampling.top_k", "-1 is out of range [0, 320]", [&](R& r) { sampling(r)->set_top_k(-1); }},
      {"sampling.top_k", "321 is", [&](R& r) { sampling(r)->set_top_k(321); }},
      {"sampling.min_p", "1.5 is out of range [0, 1]", [&](R& r) { sampling(r)->set_min_p(1.5f); }},
      {"sampling.min_p", "nan", [&](R& r) { sampling(r)->set_min_p(kNan); }},
      {"sampling.repetition_penalty", "0 is out of range (0, 2]",
       [&](R& r) { sampling(r)->set_repetition_penalty(0); }},
      {"sampling.repetition_penalty", "inf",
       [&](R& r) { sampling(r)->set_repetition_penalty(kInf); }},
      {"sampling.presence_penalty", "3 is out of range [-2, 2]",
       [&](R& r) { sampling(r)->set_presence_penalty(3); }},
      {"sampling.presence_penalty", "nan", [&](R& r) { sampling(r)->set_presence_penalty(kNan); }},
      {"sampling.frequency_penalty", "-3 is out of range [-2, 2]",
       [&](R& r) { sampling(r)->set_frequency_penalty(-3); }},
      {"sampling.frequency_penalty", "-inf",
       [&](R& r) { sampling(r)->set_frequency_penalty(-kInf); }},
      {"sampling.logit_bias", "301 entries, at most 300",
       [&](R& r) {
         for (int i = 0; i < 301; ++i) (*sampling(r)->mutable_logit_bias())[i] = 1;
       }},
      {"sampling.logit_bias[320]", "320 is out of range",
       [&](R& r) { (*sampling(r)->mutable_logit_bias())[320] = 1; }},
      {"sampling.logit_bias[3]", "101 is out of range [-100, 100]",
       [&](R& r) { (*sampling(r)->mutable_logit_bias())[3] = 101; }},
      {"sampling.logit_bias[3]", "nan",
       [&](R& r) { (*sampling(r)->mutable_logit_bias())[3] = kNan; }},
      {"precision.min_bits", "1.9 is out of range [2, 8]",
       [&](R& r) { precision(r)->set_min_bits(1.9f); }},
      {"precision.min_bits", "nan", [&](R& r) { precision(r)->set_min_bits(kNan); }},
      {"precision.max_bits", "8.1 is out of range",
       [&](R& r) { precision(r)->set_max_bits(8.1f); }},
      {"precision.max_bits", "nan", [&](R& r) { precision(r)->set_max_bits(kNan); }},
      {"precision.pinned_bits", "0 is", [&](R& r) { precision(r)->set_pinned_bits(0); }},
      {"precision.pinned_bits", "excludes",
       [&](R& r) { precision(r)->set_pinned_bits(4), precision(r)->set_min_bits(4); }},
      {"precision.min_bits", "5 is above max_bits, which is 4",
       [&](R& r) { precision(r)->set_min_bits(5), precision(r)->set_max_bits(4); }},
  };
  for (const BadRequest& bad : cases) {
    v1::GenerateRequest request = TextRequest("hello", 10);
    ASSERT_TRUE(Parse(request).ok());
    bad.spoil(request);
    const absl::Status status = Parse(request).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad.field << " " << status;
    const auto detail = DetailOf<google::rpc::BadRequest>(status);
    ASSERT_TRUE(detail) << bad.field << " " << status;
    EXPECT_EQ(detail->field_violations(0).field(), bad.field) << status;
    EXPECT_THAT(detail->field_violations(0).description(), HasSubstr(bad.reason)) << bad.field;
    EXPECT_THAT(std::string(status.message()), HasSubstr(bad.reason));
  }
}

TEST_F(GenerateRequestTest, AllViolationsAreReported) {
  v1::GenerateRequest request = TextRequest("hello", -3);
  request.mutable_sampling()->set_top_p(7);
  request.mutable_precision()->set_max_bits(kNan);
  const auto detail = DetailOf<google::rpc::BadRequest>(Parse(request).status());
  ASSERT_TRUE(detail);
  std::vector<std::string> fields;
  for (const auto& violation : detail->field_violations()) fields.push_back(violation.field());
  EXPECT_THAT(fields, ElementsAre("max_new_tokens", "sampling.top_p", "precision.max_bits"));
}

TEST_F(GenerateRequestTest, DefaultsAreThoseOfTheProto) {
  v1::GenerateRequest request;
  request.set_text("hello");
  const auto parsed = Parse(request);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const GenerationRequest& engine = parsed->engine;
  EXPECT_EQ(engine.prompt.front(), 276);  // begin of text
  EXPECT_EQ(engine.max_new_tokens, 100 - static_cast<int>(engine.prompt.size()));
  EXPECT_EQ(engine.n, 1);
  EXPECT_EQ(engine.sampling.temperature, 1);
  EXPECT_EQ(engine.sampling.top_p, 1);
  EXPECT_EQ(engine.sampling.top_k, 0);
  EXPECT_EQ(engine.sampling.min_p, 0);
  EXPECT_EQ(engine.sampling.repetition_penalty, 1);
  EXPECT_EQ(engine.precision.min_bits, 2);
  EXPECT_EQ(engine.precision.max_bits, 8);
  EXPECT_FALSE(parsed->has_seed);
  EXPECT_FALSE(parsed->logprobs);
  EXPECT_FALSE(engine.prompt_logprobs);
}

TEST_F(GenerateRequestTest, ControlTokensInUserTextArePlainText) {
  v1::GenerateRequest request = TextRequest("<|eot_id|>", 10);
  const auto parsed = Parse(request);
  ASSERT_TRUE(parsed.ok());
  EXPECT_GT(parsed->engine.prompt.size(), 3u);
  EXPECT_THAT(parsed->engine.prompt, ::testing::Not(::testing::Contains(280)));
  v1::GenerateRequest chat;
  auto& message = *chat.mutable_chat()->add_messages();
  message.set_role("user");
  message.set_content("<|eot_id|>");
  const auto templated = Parse(chat);
  ASSERT_TRUE(templated.ok()) << templated.status();
  const auto& ids = templated->engine.prompt;
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 280), 1);  // the template's own
}

TEST_F(GenerateRequestTest, ScoringMayFillTheContext) {
  v1::GenerateRequest request;
  for (int i = 0; i < 100; ++i) request.mutable_token_ids()->add_ids(i);
  EXPECT_FALSE(Parse(request).ok());
  request.set_max_new_tokens(0);
  EXPECT_TRUE(Parse(request).ok());
  request.mutable_token_ids()->add_ids(1);
  EXPECT_THAT(std::string(Parse(request).status().message()),
              HasSubstr("token_ids: 101 tokens, at most 100 fit"));
}

TEST_F(GenerateRequestTest, ScoresOfAPromptHaveALimit) {
  limits_.max_prompt_scores = 100;
  v1::GenerateRequest request;
  for (int i = 0; i < 50; ++i) request.mutable_token_ids()->add_ids(i);
  request.set_max_new_tokens(0);
  request.set_prompt_logprobs(1);
  const auto parsed = Parse(request);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_TRUE(parsed->engine.prompt_logprobs);
  EXPECT_EQ(parsed->engine.prompt_top_logprobs, 1);
  request.mutable_token_ids()->add_ids(1);
  EXPECT_THAT(std::string(Parse(request).status().message()),
              HasSubstr("prompt_logprobs: 2 for each of 51 prompt tokens, at most 100 in all"));
}

TEST_F(GenerateRequestTest, PrecisionFollowsClassAndPolicy) {
  const auto band = [&](const char* name, std::optional<float> min, std::optional<float> max,
                        std::optional<float> pinned) {
    v1::GenerateRequest request = TextRequest("hello", 10);
    request.set_priority_class(name);
    if (min) request.mutable_precision()->set_min_bits(*min);
    if (max) request.mutable_precision()->set_max_bits(*max);
    if (pinned) request.mutable_precision()->set_pinned_bits(*pinned);
    const auto parsed = Parse(request);
    EXPECT_TRUE(parsed.ok()) << parsed.status();
    return std::pair(parsed->engine.precision.min_bits, parsed->engine.precision.max_bits);
  };
  using Band = std::pair<float, float>;
  EXPECT_EQ(band("", {}, {}, {}), Band(2, 8));
  EXPECT_EQ(band("premium", {}, {}, {}), Band(4.5, 8));
  EXPECT_EQ(band("premium", 5, {}, {}), Band(5, 8));
  EXPECT_EQ(band("premium", {}, 4, {}), Band(4, 4));  // less than its floor, as asked
  EXPECT_EQ(band("premium", {}, {}, 3), Band(3, 3));
  EXPECT_EQ(band("standard", 6, 7, {}), Band(6, 7));
}

TEST_F(GenerateRequestTest, WhatPolicyOrModelForbidIsAPrecondition) {
  v1::GenerateRequest request = TextRequest("hello", 10);
  request.mutable_precision()->set_pinned_bits(7);
  absl::Status status = Parse(request).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  auto detail = DetailOf<google::rpc::PreconditionFailure>(status);
  ASSERT_TRUE(detail);
  EXPECT_EQ(detail->violations(0).type(), "POLICY");
  EXPECT_EQ(detail->violations(0).subject(), "precision.pinned_bits");
  model_->info.elastic = false;
  request.mutable_precision()->set_pinned_bits(4);
  status = Parse(request).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  detail = DetailOf<google::rpc::PreconditionFailure>(status);
  ASSERT_TRUE(detail);
  EXPECT_EQ(detail->violations(0).type(), "MODEL");
  request.clear_precision();
  EXPECT_TRUE(Parse(request).ok());
}

TEST_F(GenerateRequestTest, ChatNeedsATemplate) {
  model_->chat_template = absl::FailedPreconditionError("the model has no chat template");
  v1::GenerateRequest request;
  request.mutable_chat()->add_messages()->set_role("user");
  const absl::Status status = Parse(request).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("chat: the model has no chat template"));
}

TEST_F(GenerateRequestTest, LogitBiasIsInOneOrder) {
  v1::GenerateRequest request = TextRequest("hello", 10);
  auto& bias = *request.mutable_sampling()->mutable_logit_bias();
  for (int i = 99; i >= 0; --i) bias[(i * 37) % 300] = static_cast<float>(i);
  const auto parsed = Parse(request);
  ASSERT_TRUE(parsed.ok());
  const auto& pairs = parsed->engine.sampling.logit_bias;
  EXPECT_EQ(pairs.size(), 100u);
  EXPECT_TRUE(std::is_sorted(pairs.begin(), pairs.end()));
}

}  // namespace
}  // namespace mobi
