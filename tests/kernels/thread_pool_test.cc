#include "kernels/cpu/thread_pool.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace mobi::cpu {
namespace {

class ThreadPoolTest : public testing::TestWithParam<int> {};

TEST_P(ThreadPoolTest, EveryTaskRunsOnceAndIsSeenByTheCaller) {
  ThreadPool pool(GetParam());
  ASSERT_EQ(pool.num_threads(), GetParam());
  for (int round = 0; round < 2000; ++round) {
    const int tasks = round % 37;
    std::vector<int> runs(tasks);  // plain: Run's return must order the tasks' writes before us
    pool.Run(tasks, [&](int task, int thread) {
      ASSERT_GE(thread, 0);
      ASSERT_LT(thread, GetParam());
      ++runs[task];
    });
    for (const int count : runs) ASSERT_EQ(count, 1);
  }
}

TEST_P(ThreadPoolTest, WakesAfterSleeping) {
  ThreadPool pool(GetParam());
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(round % 3));
    std::atomic<int> done{0};
    pool.Run(8, [&](int, int) { done.fetch_add(1, std::memory_order_relaxed); });
    ASSERT_EQ(done.load(), 8);
  }
}

TEST_P(ThreadPoolTest, RangesCoverEverythingOnce) {
  ThreadPool pool(GetParam());
  for (const int64_t count : {0, 1, 2, 5, 16, 100, 1001}) {
    for (const int64_t grain : {1, 7, 64, 5000}) {
      std::vector<int> seen(count);
      pool.RunRanges(count, grain, [&](int64_t begin, int64_t end, int) {
        ASSERT_LT(begin, end);
        for (int64_t i = begin; i < end; ++i) ++seen[i];
      });
      for (const int times : seen) ASSERT_EQ(times, 1);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolTest, testing::Values(1, 2, 3, 8));

}  // namespace
}  // namespace mobi::cpu
