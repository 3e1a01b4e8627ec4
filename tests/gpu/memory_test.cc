// Device memory that comes and goes, as only the device can tell: what it has free, and what it
// does when something touches memory that is away. What all backends share is tested with them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace mobi {
namespace {

class GpuMemory : public testing::Test {
 protected:
  void SetUp() override {
    auto backend = CreateCudaBackend({});
    if (!backend.ok()) GTEST_SKIP() << "NOT RUN: " << backend.status().message();
    backend_ = *std::move(backend);
  }

  std::unique_ptr<Backend> backend_;
};

TEST_F(GpuMemory, FreeMemoryIsWhatIsNotCommitted) {
  constexpr size_t kBytes = size_t{1} << 30;
  // Other programs may use the device meanwhile, a little.
  constexpr double kNoise = 1 << 26;
  const auto free = [&] { return static_cast<double>(backend_->memory().free); };
  const double before = free();
  auto reserved = backend_->Reserve(2 * kBytes, "test");
  ASSERT_TRUE(reserved.ok()) << reserved.status();
  EXPECT_NEAR(free(), before, kNoise) << "addresses cost nothing";
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(backend_->Commit(reserved->data(), kBytes, "test").ok());
    EXPECT_NEAR(free(), before - kBytes, kNoise);
    backend_->Decommit(reserved->data(), kBytes);
    EXPECT_NEAR(free(), before, kNoise) << "free at once";
  }
  ASSERT_TRUE(backend_->Commit(reserved->data(), kBytes, "test").ok());
  *reserved = Buffer();
  EXPECT_NEAR(free(), before, kNoise) << "a reservation ends with all that is in it";
  EXPECT_TRUE(backend_->Synchronize().ok());
}

TEST_F(GpuMemory, APartOfACommitDoesNotGoAlone) {
  const size_t page = backend_->page_bytes();
  auto reserved = backend_->Reserve(2 * page, "test");
  ASSERT_TRUE(reserved.ok()) << reserved.status();
  ASSERT_TRUE(backend_->Commit(reserved->data(), 2 * page, "test").ok());
  backend_->Decommit(reserved->data(), page);
  EXPECT_TRUE(absl::IsInternal(backend_->Synchronize()));
}

// Exits with 0 when the device reports the row that is away.
void ReadWhatIsAway() {
  auto backend = CreateCudaBackend({});
  const size_t page = (*backend)->page_bytes();
  auto reserved = (*backend)->Reserve(2 * page, "test");
  auto other = (*backend)->Allocate(4096, "test");
  auto* at = reserved->As<std::byte>();
  const DType dtype = (*backend)->activation_dtype();
  const std::vector<int32_t> ids = {0};
  auto* device_ids = other->As<int32_t>();
  (*backend)->Upload(ids.data(), sizeof(int32_t), device_ids);
  const auto copy_row = [&](std::byte* from) {
    (*backend)->Embed(Tensor::Of(from, dtype, 1, 256), device_ids,
                      Tensor::Of(other->As<std::byte>() + 1024, dtype, 1, 256));
    return (*backend)->Synchronize();
  };
  bool right = (*backend)->Commit(at, page, "test").ok() &&
               (*backend)->Commit(at + page, page, "test").ok() && copy_row(at).ok() &&
               copy_row(at + page).ok();
  (*backend)->Decommit(at + page, page);
  right = right && copy_row(at).ok();
  const absl::Status away = copy_row(at + page);
  std::fprintf(stderr, "away: %s\n", std::string(away.message()).c_str());
  std::_Exit(right && absl::IsInternal(away) ? 0 : 1);
}

TEST(GpuMemoryDeathTest, WhatIsAwayCannotBeReadByMistake) {
  if (auto backend = CreateCudaBackend({}); !backend.ok()) {
    GTEST_SKIP() << "NOT RUN: " << backend.status().message();
  }
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(ReadWhatIsAway(), testing::ExitedWithCode(0), "away: CUDA: .*illegal");
}

}  // namespace
}  // namespace mobi
