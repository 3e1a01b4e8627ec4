// Slice residency as an operator sees it: the real server over the demo model with few KV blocks,
// on the CPU, and on CUDA where there is a GPU.
#include <atomic>
#include <thread>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/create_backend.h"
#include "tests/paths.h"
#include "tests/server/server_fixture.h"

namespace mobi {
namespace {

using ::testing::HasSubstr;

class ResidencyServerTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (auto backend = CreateBackend(GetParam(), 0); !backend.ok()) {
      GTEST_SKIP() << "NOT RUN: " << backend.status().message();
    }
    LoadOptions load;
    load.device = GetParam();
    load.dir = MOBI_SOURCE_DIR "/deploy/demo/checkpoint";
    load.verify_manifest = false;
    load.engine.max_model_len = 128;
    load.engine.num_kv_blocks = kOwnBlocks;
    load.engine.residency = {.enabled = true,
                             .dwell = std::chrono::milliseconds(1),
                             .patience = std::chrono::milliseconds(1)};
    auto model = LoadForTest(std::move(load), clock_);
    ASSERT_NE(model, nullptr);
    server_ = std::make_unique<TestServer>(std::move(model));
    grpc::ClientContext context;
    v1::SetPolicyRequest request;
    request.set_yaml("windows: [{name: any, floor_bits: 3, ceiling_bits: 8}]\n");
    v1::GetPolicyResponse policy;
    ASSERT_TRUE(server_->Admin()->SetPolicy(&context, request, &policy).ok());
  }

  v1::PrecisionStatus WaitFor(const std::function<bool(const v1::PrecisionStatus&)>& condition) {
    for (;;) {
      grpc::ClientContext context;
      v1::PrecisionStatus status;
      EXPECT_TRUE(server_->Admin()->GetStatus(&context, {}, &status).ok());
      if (condition(status) || HasFailure()) return status;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }

  static constexpr int kOwnBlocks = 8;  // one sequence of 128 tokens
  RealClock clock_;
  std::unique_ptr<TestServer> server_;
};

TEST_P(ResidencyServerTest, SlicesLeaveForKvBlocksAndReturnAndSaySo) {
  const auto everything = WaitFor([](const auto& status) { return status.resident_bits() == 8; });
  EXPECT_EQ(everything.lent_kv_blocks(), 0);
  std::atomic<bool> stop{false};
  std::vector<std::thread> clients;
  for (int i = 0; i < 6; ++i) {
    clients.emplace_back([&, i] {
      for (int round = 0; !stop; ++round) {
        v1::GenerateRequest request = TextRequest(absl::StrCat("Once ", i, " ", round), 90);
        request.set_ignore_eos(true);
        const absl::Status status = Collect(*server_->Client(), request).status;
        EXPECT_TRUE(status.ok()) << status;
      }
    });
  }
  const auto away = WaitFor([](const auto& status) { return status.lent_kv_blocks() > 0; });
  EXPECT_LT(away.resident_bits(), 8);
  EXPECT_GE(away.resident_bits(), 4);
  EXPECT_LT(away.resident_slice_bytes(), everything.resident_slice_bytes());
  stop = true;
  for (std::thread& client : clients) client.join();
  const auto back = WaitFor([](const auto& status) { return status.resident_bits() == 8; });
  EXPECT_EQ(back.lent_kv_blocks(), 0);
  EXPECT_GT(back.slice_drops(), 0u);
  EXPECT_EQ(back.slice_drops(), back.slice_restores());
  const std::string metrics = server_->MetricsText();
  EXPECT_THAT(metrics, HasSubstr("\nmobi_resident_bits 8\n"));
  EXPECT_THAT(metrics, HasSubstr(absl::StrCat("\nmobi_kv_blocks ", kOwnBlocks, "\n")));
  EXPECT_THAT(metrics, HasSubstr(absl::StrCat("\nmobi_slice_changes_total{change=\"leave\"} ",
                                              back.slice_drops(), "\n")));
}

INSTANTIATE_TEST_SUITE_P(Backends, ResidencyServerTest, ::testing::Values("cpu", "cuda"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace mobi
