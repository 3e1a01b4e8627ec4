// The server over the real engine and a tiny random checkpoint: what a scripted engine cannot show.
#include <algorithm>
#include <atomic>
#include <random>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/rpc_status.h"
#include "tests/engine/test_models.h"
#include "tests/server/server_fixture.h"

namespace mobi {
namespace {

// A server of the quantized test model.
class RealEngineTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteTestModels(dir_).ok());
    LoadOptions load;
    load.dir = dir_.Sub("mobiquant");
    load.threads = 1;
    load.engine.max_num_seqs = 8;
    load.engine.max_num_batched_tokens = 64;
    load.engine.num_kv_blocks = 200;
    auto model = LoadForTest(std::move(load), clock_);
    ASSERT_NE(model, nullptr);
    engine_ = model->engine.get();
    server_ = std::make_unique<TestServer>(std::move(model));
  }

  v1::GenerateRequest Request(int max_new_tokens, uint64_t seed = 1) const {
    v1::GenerateRequest request = TextRequest("the server and the tokens", max_new_tokens);
    request.set_ignore_eos(true);
    request.mutable_sampling()->set_seed(seed);
    return request;
  }
  Collected Ask(const v1::GenerateRequest& request) { return Collect(*server_->Client(), request); }
  bool Idle() const { return engine_->stats().running_requests == 0; }

  const TempDir dir_;
  RealClock clock_;
  Engine* engine_ = nullptr;
  std::unique_ptr<TestServer> server_;
};

TEST_F(RealEngineTest, CountsAndBitsAreExact) {
  for (const float bits : {2.0f, 4.0f, 8.0f}) {
    v1::GenerateRequest request = Request(40);
    request.mutable_precision()->set_pinned_bits(bits);
    const Collected result = Ask(request);
    ASSERT_TRUE(result.status.ok()) << result.status;
    EXPECT_EQ(result.token_ids[0].size(), 40u);
    EXPECT_EQ(result.summary.usage().completion_tokens(), 40);
    EXPECT_EQ(result.text[0], TestTokenizer().Decode(result.token_ids[0], true));
    EXPECT_NEAR(result.summary.mean_effective_bits(), bits, bits == 4 ? 1.0 : 1e-6);
    EXPECT_GT(result.summary.timings().prefill_ms(), 0);
  }
}

TEST_F(RealEngineTest, ASeedAtPinnedPrecisionIsReproducedInCompany) {
  v1::GenerateRequest request = Request(30, 7);
  request.mutable_precision()->set_pinned_bits(4);
  const Collected alone = Ask(request);
  std::atomic<bool> stop{false};
  std::vector<std::thread> company;
  for (int i = 0; i < 3; ++i) {
    company.emplace_back([&, i] {
      for (uint64_t seed = 0; !stop; ++seed) {
        const absl::Status status = Ask(Request(20, seed * 3 + i)).status;
        EXPECT_TRUE(status.ok()) << status;
      }
    });
  }
  for (int i = 0; i < 5; ++i) {
    const Collected again = Ask(request);
    EXPECT_EQ(again.token_ids, alone.token_ids) << again.status;
  }
  stop = true;
  for (std::thread& thread : company) thread.join();
}

TEST_F(RealEngineTest, PromptLogprobsScoreThePrompt) {
  v1::GenerateRequest request = Request(0);
  request.set_prompt_logprobs(0);
  request.set_echo(true);
  const Collected result = Ask(request);
  ASSERT_TRUE(result.status.ok()) << result.status;
  ASSERT_GT(result.prompt.logprobs_size(), 3);
  EXPECT_EQ(result.prompt.logprobs_size(), result.prompt.token_ids_size() - 1);
  for (const auto& logprob : result.prompt.logprobs()) EXPECT_LT(logprob.logprob(), 0);
  EXPECT_EQ(result.summary.usage().completion_tokens(), 0);
}

TEST_F(RealEngineTest, APrefixIsFoundAgain) {
  v1::GenerateRequest request = Request(2);
  request.set_text(std::string(40, 'a') + " and " + std::string(40, 'b'));
  EXPECT_EQ(Ask(request).summary.usage().cached_tokens(), 0);
  const Collected again = Ask(request);
  EXPECT_GT(again.summary.usage().cached_tokens(), 32);
  request.set_cache_salt("another");
  EXPECT_EQ(Ask(request).summary.usage().cached_tokens(), 0);
}

// An override while a stream runs: its next tokens, and the next request, have the new bits. A
// stream of this tiny model may be over before the override arrives, so it has several chances.
TEST_F(RealEngineTest, TheTargetMovesBitsOfARunningStream) {
  const auto stub = server_->Client();
  const auto set_target = [&](float target) {
    grpc::ClientContext context;
    v1::OverrideRequest bits;
    bits.set_target_bits(target);
    v1::PrecisionStatus status;
    ASSERT_TRUE(server_->Admin()->Override(&context, bits, &status).ok());
  };
  bool moved = false;
  for (int attempt = 0; attempt < 20 && !moved; ++attempt) {
    set_target(8);
    grpc::ClientContext context;
    v1::GenerateRequest request = Request(200);
    request.set_n(4);
    const auto reader = stub->Generate(&context, request);
    v1::GenerateResponse message;
    ASSERT_TRUE(reader->Read(&message));
    EXPECT_NEAR(message.chunks(0).effective_bits(), 8, 1e-3);
    set_target(2);
    while (reader->Read(&message)) {
      for (const v1::Chunk& chunk : message.chunks()) {
        if (chunk.token_ids_size() == 0) continue;  // a last chunk may bring text alone
        EXPECT_LE(chunk.effective_bits(), 8.001f);
        moved = moved || chunk.effective_bits() < 2.001f;
      }
    }
    EXPECT_TRUE(reader->Finish().ok());
  }
  EXPECT_TRUE(moved);
  EXPECT_NEAR(Ask(Request(5)).summary.mean_effective_bits(), 2, 1e-3);
}

TEST_F(RealEngineTest, CancelledRequestsFreeTheirBlocks) {
  v1::GenerateRequest warm = Request(1);
  Ask(warm);
  ASSERT_TRUE(Eventually([&] { return Idle(); }));
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      const auto stub = server_->Client();
      for (int i = 0; i < 150; ++i) {
        grpc::ClientContext context;
        v1::GenerateRequest request = Request(1 + static_cast<int>(random() % 60), random());
        request.set_n(1 + static_cast<int>(random() % 3));
        request.set_cache_salt(std::to_string(random() % 5));
        const auto reader = stub->Generate(&context, request);
        v1::GenerateResponse message;
        for (int reads = static_cast<int>(random() % 4); reads > 0; --reads) {
          if (!reader->Read(&message)) break;
        }
        if (random() % 3 != 0) context.TryCancel();
        while (reader->Read(&message)) {
        }
        const auto code = reader->Finish().error_code();
        EXPECT_TRUE(code == grpc::StatusCode::OK || code == grpc::StatusCode::CANCELLED) << code;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(Eventually([&] { return Idle(); }));
  EXPECT_TRUE(Eventually([&] {
    const EngineStats stats = engine_->stats();
    return stats.free_kv_blocks == stats.num_kv_blocks;
  })) << engine_->stats().free_kv_blocks;
}

}  // namespace
}  // namespace mobi
