#include "kernels/cpu/thread_pool.h"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mobi::cpu {
namespace {

// About 50 microseconds: longer than the gaps between the ops of a step.
constexpr int kSpins = 1500;

// More ranges than threads, so that a thread that starts late or is slow takes fewer.
constexpr int kRangesPerThread = 4;

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr uint64_t TasksLeft(uint64_t state) { return state & 0xFFFFFFFFu; }

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { Work(thread); });
  }
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  wakeups_.fetch_add(1);
  wakeups_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int num_tasks, Body body) {
  if (num_tasks <= 1 || workers_.empty()) {
    for (int task = 0; task < num_tasks; ++task) body(task, 0);
    return;
  }
  body_ = &body;
  num_tasks_ = num_tasks;
  num_done_.store(0, std::memory_order_relaxed);
  const uint64_t job = (state_.load(std::memory_order_relaxed) >> 32) + 1;
  state_.store(job << 32 | static_cast<uint32_t>(num_tasks));
  if (num_asleep_.load() > 0) {
    wakeups_.fetch_add(1);
    wakeups_.notify_all();
  }
  RunTasks(0);
  for (int spins = 0; num_done_.load(std::memory_order_acquire) != num_tasks; ++spins) {
    // A worker may have lost its core; give it ours.
    if (spins < kSpins) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::RunRanges(int64_t count, int64_t grain, RangeBody body) {
  if (count <= 0) return;
  const int64_t tasks =
      workers_.empty() ? 1
                       : std::clamp<int64_t>(count / grain, 1, kRangesPerThread * num_threads());
  Run(static_cast<int>(tasks), [&](int task, int thread) {
    body(count * task / tasks, count * (task + 1) / tasks, thread);
  });
}

void ThreadPool::RunTasks(int thread) {
  uint64_t state = state_.load(std::memory_order_acquire);
  while (TasksLeft(state) > 0) {
    if (!state_.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel,
                                      std::memory_order_acquire)) {
      continue;
    }
    (*body_)(num_tasks_ - static_cast<int>(TasksLeft(state)), thread);
    num_done_.fetch_add(1, std::memory_order_release);
    state = state_.load(std::memory_order_acquire);
  }
}

bool ThreadPool::HasTasks() const { return TasksLeft(state_.load()) > 0; }

void ThreadPool::Work(int thread) {
  while (!stopping_.load(std::memory_order_relaxed)) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (HasTasks()) {
        RunTasks(thread);
        spins = 0;
      }
      Pause();
    }
    Sleep();
  }
}

void ThreadPool::Sleep() {
  // The order matters: whoever posts a job after this count rises wakes us, and a job posted before
  // is seen by the check.
  num_asleep_.fetch_add(1);
  const uint32_t before = wakeups_.load();
  if (!HasTasks() && !stopping_.load()) wakeups_.wait(before);
  num_asleep_.fetch_sub(1);
}

}  // namespace mobi::cpu
