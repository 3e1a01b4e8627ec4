#include "server/inference_service.h"

#include <functional>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/rpc_status.h"
#include "tests/server/server_fixture.h"

namespace mobi {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

class InferenceServiceTest : public ::testing::Test {
 protected:
  absl::Status Tokenize(const v1::TokenizeRequest& request) {
    grpc::ClientContext context;
    tokens_.Clear();
    return FromGrpcStatus(stub_->Tokenize(&context, request, &tokens_));
  }
  absl::Status Detokenize(const v1::DetokenizeRequest& request) {
    grpc::ClientContext context;
    text_.Clear();
    return FromGrpcStatus(stub_->Detokenize(&context, request, &text_));
  }
  static void ExpectRefusal(const absl::Status& status, const std::string& field,
                            const std::string& reason) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field << " " << status;
    const auto detail = DetailOf<google::rpc::BadRequest>(status);
    ASSERT_TRUE(detail) << field << " " << status;
    EXPECT_EQ(detail->field_violations(0).field(), field);
    EXPECT_THAT(detail->field_violations(0).description(), HasSubstr(reason)) << field;
  }

  TestServer server_{{.script = Says("x"), .max_model_len = 77}};
  std::unique_ptr<v1::Inference::Stub> stub_ = server_.Client();
  v1::TokenizeResponse tokens_;
  v1::DetokenizeResponse text_;
};

TEST_F(InferenceServiceTest, EveryFieldOfTokenizeHasItsRefusal) {
  using R = v1::TokenizeRequest;
  struct Case {
    const char* field;
    const char* reason;
    std::function<void(R&)> spoil;
  };
  const Case cases[] = {
      {"input", "needs one of text and chat", [](R&) {}},
      {"text", "is empty", [](R& r) { r.set_text(""); }},
      {"text", "524289 bytes, at most 524288", [](R& r) { r.set_text(std::string(524289, 'x')); }},
      {"chat.messages", "is empty", [](R& r) { r.mutable_chat(); }},
      {"chat.messages", "1025 messages, at most 1024",
       [](R& r) {
         for (int i = 0; i < 1025; ++i) r.mutable_chat()->add_messages()->set_role("user");
       }},
      {"chat", "524293 bytes, at most 524288",
       [](R& r) {
         auto& message = *r.mutable_chat()->add_messages();
         message.set_role("user");
         message.set_content(std::string(524289, 'x'));
       }},
      {"chat", "robot", [](R& r) { r.mutable_chat()->add_messages()->set_role("robot"); }},
  };
  for (const Case& c : cases) {
    R request;
    c.spoil(request);
    ExpectRefusal(Tokenize(request), c.field, c.reason);
  }
}

TEST_F(InferenceServiceTest, EveryFieldOfDetokenizeHasItsRefusal) {
  v1::DetokenizeRequest request;
  request.add_ids(-1);
  ExpectRefusal(Detokenize(request), "ids[0]", "-1 is out of range [0, 319]");
  request.set_ids(0, 5);
  request.add_ids(320);
  ExpectRefusal(Detokenize(request), "ids[1]", "320 is out of range [0, 319]");
  request.mutable_ids()->Resize(524289, 5);
  request.set_ids(1, 5);
  ExpectRefusal(Detokenize(request), "ids", "524289 ids, at most 524288");
  request.clear_ids();
  EXPECT_TRUE(Detokenize(request).ok());
  EXPECT_EQ(text_.text(), "");
}

// What Tokenize says is what Generate reads, for text and chat.
TEST_F(InferenceServiceTest, TokenizeAgreesWithGenerate) {
  v1::TokenizeRequest text;
  text.set_text("hello there");
  ASSERT_TRUE(Tokenize(text).ok());
  const std::vector<int32_t> text_ids(tokens_.ids().begin(), tokens_.ids().end());
  EXPECT_EQ(tokens_.pieces_size(), 0);
  v1::TokenizeRequest chat;
  auto& message = *chat.mutable_chat()->add_messages();
  message.set_role("user");
  message.set_content("hello");
  ASSERT_TRUE(Tokenize(chat).ok());
  const std::vector<int32_t> chat_ids(tokens_.ids().begin(), tokens_.ids().end());
  ASSERT_TRUE(Collect(*stub_, TextRequest("hello there", 2)).status.ok());
  v1::GenerateRequest request;
  *request.mutable_chat() = chat.chat();
  request.set_max_new_tokens(2);
  ASSERT_TRUE(Collect(*stub_, request).status.ok());
  const auto submitted = server_.engine().submitted();
  EXPECT_EQ(submitted[0].prompt, text_ids);
  EXPECT_EQ(submitted[1].prompt, chat_ids);
  text.set_add_special_tokens(false);
  ASSERT_TRUE(Tokenize(text).ok());
  EXPECT_THAT(tokens_.ids(), ElementsAreArray(text_ids.begin() + 1, text_ids.end()));
}

TEST_F(InferenceServiceTest, DetokenizeSkipsControlTokensUnlessAsked) {
  v1::DetokenizeRequest request;
  request.add_ids(kScriptedEos);
  for (const int32_t id : TokensOf("hi")) request.add_ids(id);
  ASSERT_TRUE(Detokenize(request).ok());
  EXPECT_EQ(text_.text(), "hi");
  request.set_skip_special_tokens(false);
  ASSERT_TRUE(Detokenize(request).ok());
  EXPECT_EQ(text_.text(), "<|end_of_text|>hi");
  v1::DetokenizeRequest half;
  half.add_ids(TokensOf("\xC3\xA9", /*bytes=*/true)[0]);
  ASSERT_TRUE(Detokenize(half).ok());
  EXPECT_EQ(text_.text(), "\xEF\xBF\xBD");
}

TEST_F(InferenceServiceTest, GetModelTellsLimitsAndArchitecture) {
  grpc::ClientContext context;
  v1::GetModelResponse model;
  ASSERT_TRUE(stub_->GetModel(&context, {}, &model).ok());
  EXPECT_EQ(model.name(), "scripted");
  EXPECT_FALSE(model.server_version().empty());
  EXPECT_EQ(model.backend(), "scripted");
  EXPECT_EQ(model.min_bits(), 2);
  EXPECT_EQ(model.max_bits(), 8);
  EXPECT_EQ(model.architecture().vocab_size(), TestTokenizer().vocab_size());
  const RequestLimits limits;
  EXPECT_EQ(model.limits().max_model_len(), 77);
  EXPECT_EQ(model.limits().max_new_tokens(), limits.max_new_tokens);
  EXPECT_EQ(model.limits().max_prompt_bytes(), 512 << 10);
  EXPECT_EQ(model.limits().max_n(), 4);
  EXPECT_EQ(model.limits().max_logprobs(), 20);
  EXPECT_EQ(model.limits().max_prompt_logprobs(), 20);
  EXPECT_EQ(model.limits().max_stop_strings(), 8);
  EXPECT_EQ(model.limits().max_stop_bytes(), 64);
  EXPECT_EQ(model.limits().max_logit_bias(), 300);
  EXPECT_EQ(model.limits().max_deadline_seconds(), 600);
  EXPECT_EQ(model.eos_token_ids(0), kScriptedEos);
}

}  // namespace
}  // namespace mobi
