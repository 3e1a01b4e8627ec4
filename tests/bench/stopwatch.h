// Medians of interleaved runs: the cases of a comparison take turns, so that whatever else the
// machine does meets them all alike and their ratios stay true.
#ifndef MOBI_TESTS_BENCH_STOPWATCH_H_
#define MOBI_TESTS_BENCH_STOPWATCH_H_

#include <functional>
#include <vector>

namespace mobi {

struct TimedCase {
  std::function<void()> run;  // returns when its work is done
  double median_s = 0;
  double best_s = 0;
  double cpu_s =
      0;  // median of the processor time that all threads took: what a busy machine gives
};

// Runs every case once to warm up, then all in turns until `min_time_s` per case has passed, five
// times at least.
void TimeInTurns(double min_time_s, std::vector<TimedCase>& cases);

}  // namespace mobi

#endif  // MOBI_TESTS_BENCH_STOPWATCH_H_
