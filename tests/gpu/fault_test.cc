// What the CUDA backend says and does when something is wrong: no device of that number, too little
// memory, a kernel that faults. A fault ends the process's CUDA context, so it happens in a child.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace mobi {
namespace {

using testing::HasSubstr;

TEST(GpuFault, NoSuchDevice) {
  const auto backend = CreateCudaBackend({.device = 1000});
  ASSERT_FALSE(backend.ok());
  EXPECT_THAT(std::string(backend.status().message()), HasSubstr("CUDA"));
}

TEST(GpuFault, TooLittleMemoryNamesWhatIsNeededAndFree) {
  auto backend = CreateCudaBackend({});
  if (!backend.ok()) GTEST_SKIP() << "NOT RUN: " << backend.status().message();
  const size_t bytes = size_t{1} << 44;
  const auto buffer = (*backend)->Allocate(bytes, "the moon");
  ASSERT_EQ(buffer.status().code(), absl::StatusCode::kResourceExhausted);
  const std::string message(buffer.status().message());
  EXPECT_THAT(message, HasSubstr("the moon needs " + std::to_string(bytes)));
  EXPECT_THAT(message, HasSubstr("are free on"));
  // It was not a fault: the backend goes on.
  EXPECT_TRUE((*backend)->Allocate(1 << 20, "a piece").ok());
  EXPECT_TRUE((*backend)->Synchronize().ok());
}

// Exits with 0 when every call after the fault reports it.
void FaultAndGoOn() {
  auto backend = CreateCudaBackend({});
  auto memory = (*backend)->Allocate(1 << 20, "a table and ids");
  const auto row = [&](int i) {
    return Tensor::Of(memory->As<std::byte>() + i * 1024, (*backend)->activation_dtype(), 1, 256);
  };
  // A token id far outside the table.
  const std::vector<int32_t> ids = {2'000'000'000};
  auto* device_ids = reinterpret_cast<int32_t*>(memory->As<std::byte>() + 8192);
  (*backend)->Upload(ids.data(), sizeof(int32_t), device_ids);
  (*backend)->Embed(row(0), device_ids, row(1));
  const absl::Status fault = (*backend)->Synchronize();
  (*backend)->Embed(row(0), device_ids, row(1));
  const absl::Status again = (*backend)->Synchronize();
  const absl::Status allocate = (*backend)->Allocate(16, "more").status();
  std::fprintf(stderr, "fault: %s\n", std::string(fault.message()).c_str());
  const bool reported = absl::IsInternal(fault) && again == fault && allocate == fault;
  std::_Exit(reported ? 0 : 1);
}

TEST(GpuFaultDeathTest, AFaultIsReportedFromThenOn) {
  if (auto backend = CreateCudaBackend({}); !backend.ok()) {
    GTEST_SKIP() << "NOT RUN: " << backend.status().message();
  }
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(FaultAndGoOn(), testing::ExitedWithCode(0), "fault: CUDA: .*illegal");
}

}  // namespace
}  // namespace mobi
