#include "calibrator/parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "calibrator/linear_algebra.h"

namespace mobi {

void ParallelFor(int num_threads, int64_t count, absl::FunctionRef<void(int64_t)> body) {
  const int workers = static_cast<int>(std::min<int64_t>(num_threads, count));
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  SetBlasThreads(1);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < count; i = next++) body(i);
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < workers; ++t) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  SetBlasThreads(num_threads);
}

}  // namespace mobi
