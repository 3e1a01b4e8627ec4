// A fixed team of threads for the CPU backend's ops. An op is a few microseconds, so idle threads
// spin briefly before they sleep, nothing is allocated to run a job, and a thread that wakes late
// is not waited for: whoever is awake takes the tasks. One caller at a time; Run returns when every
// task is done.
#ifndef MOBI_KERNELS_CPU_THREAD_POOL_H_
#define MOBI_KERNELS_CPU_THREAD_POOL_H_

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace mobi::cpu {

class ThreadPool {
 public:
  // What a job runs: tasks are numbered from 0; `thread` in [0, num_threads) is the runner's.
  using Body = absl::FunctionRef<void(int task, int thread)>;

  // A part [begin, end) of a range, likewise.
  using RangeBody = absl::FunctionRef<void(int64_t begin, int64_t end, int thread)>;

  explicit ThreadPool(int num_threads);  // the caller's thread included
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs body(task, thread) for every task in [0, num_tasks), on any thread and in any order.
  void Run(int num_tasks, Body body);

  // Cuts [0, count) into a few ranges per thread, of at least `grain` each, and runs them.
  void RunRanges(int64_t count, int64_t grain, RangeBody body);

 private:
  void Work(int thread);
  // Takes tasks of the current job until none is left.
  void RunTasks(int thread);
  bool HasTasks() const;
  void Sleep();

  // The job number in the upper half, tasks not yet taken in the lower: a thread takes a task by
  // one compare-exchange, which fails when the job has changed under it.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int> num_done_{0};
  alignas(64) std::atomic<int> num_asleep_{0};
  std::atomic<uint32_t> wakeups_{0};
  std::atomic<bool> stopping_{false};
  // Of the current job; stable while one of its tasks is taken and not done.
  const Body* body_ = nullptr;
  int num_tasks_ = 0;
  std::vector<std::thread> workers_;
};

}  // namespace mobi::cpu

#endif  // MOBI_KERNELS_CPU_THREAD_POOL_H_
