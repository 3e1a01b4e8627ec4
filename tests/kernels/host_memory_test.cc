// What the operating system says of memory that comes and goes; what every backend's does is in
// backend_memory_test.cc.
#include "kernels/cpu/host_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace mobi {
namespace {

// Bytes of [at, at + bytes) that are in memory.
size_t ResidentBytes(void* at, size_t bytes) {
  const size_t page = HostPageBytes();
  std::vector<unsigned char> pages(bytes / page);
  EXPECT_EQ(mincore(at, bytes, pages.data()), 0);
  size_t resident = 0;
  for (const unsigned char in : pages) resident += (in & 1) * page;
  return resident;
}

TEST(HostMemory, AReservationTakesNoMemoryUntilCommittedAndGivesItBackAtOnce) {
  const auto backend = CreateCpuBackend({.num_threads = 1});
  constexpr size_t kBytes = size_t{24} << 20, kHalf = kBytes / 2;
  auto reserved = backend->Reserve(kBytes, "test");
  ASSERT_TRUE(reserved.ok()) << reserved.status();
  auto* at = reserved->As<unsigned char>();
  EXPECT_EQ(ResidentBytes(at, kBytes), 0u);
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(backend->Commit(at + kHalf, kHalf, "test").ok());
    for (size_t i = kHalf; i < kBytes; i += 509) ASSERT_EQ(at[i], 0) << "contents survived";
    std::memset(at + kHalf, 7, kHalf);
    EXPECT_GT(ResidentBytes(at + kHalf, kHalf), 0u);
    EXPECT_EQ(ResidentBytes(at, kHalf), 0u);
    backend->Decommit(at + kHalf, kHalf);
    EXPECT_EQ(ResidentBytes(at, kBytes), 0u);
  }
}

TEST(HostMemory, WhatIsAwayCannotBeReadByMistake) {
  const auto backend = CreateCpuBackend({.num_threads = 1});
  const size_t page = backend->page_bytes();
  auto reserved = backend->Reserve(3 * page, "test");
  ASSERT_TRUE(reserved.ok());
  auto* at = reserved->As<volatile unsigned char>();
  ASSERT_TRUE(backend->Commit(reserved->data(), 2 * page, "test").ok());
  backend->Decommit(reserved->As<std::byte>() + page, page);
  at[page - 1] = 1;
  EXPECT_DEATH(at[page] = 1, "");
}

}  // namespace
}  // namespace mobi
