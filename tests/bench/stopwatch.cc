#include "stopwatch.h"

#include <time.h>

#include <algorithm>

#include "engine/base/clock.h"

namespace mobi {
namespace {

double CpuSeconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double Median(std::vector<double>& values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

void TimeInTurns(double min_time_s, std::vector<TimedCase>& cases) {
  constexpr size_t kMinRuns = 5;
  const RealClock clock;
  for (TimedCase& c : cases) c.run();
  std::vector<std::vector<double>> seconds(cases.size()), cpu(cases.size());
  const TimePoint start = clock.Now();
  const double budget = min_time_s * static_cast<double>(cases.size());
  while (seconds[0].size() < kMinRuns || ToSeconds(clock.Now() - start) < budget) {
    for (size_t i = 0; i < cases.size(); ++i) {
      const TimePoint before = clock.Now();
      const double cpu_before = CpuSeconds();
      cases[i].run();
      cpu[i].push_back(CpuSeconds() - cpu_before);
      seconds[i].push_back(ToSeconds(clock.Now() - before));
    }
  }
  for (size_t i = 0; i < cases.size(); ++i) {
    cases[i].median_s = Median(seconds[i]);
    cases[i].best_s = seconds[i].front();
    cases[i].cpu_s = Median(cpu[i]);
  }
}

}  // namespace mobi
