#include "stopwatch.h"

#include <algorithm>

#include "engine/base/clock.h"

namespace mobi {

void TimeInTurns(double min_time_s, std::vector<TimedCase>& cases) {
  constexpr size_t kMinRuns = 5;
  const RealClock clock;
  for (TimedCase& c : cases) c.run();
  std::vector<std::vector<double>> seconds(cases.size());
  const TimePoint start = clock.Now();
  const double budget = min_time_s * static_cast<double>(cases.size());
  while (seconds[0].size() < kMinRuns || ToSeconds(clock.Now() - start) < budget) {
    for (size_t i = 0; i < cases.size(); ++i) {
      const TimePoint before = clock.Now();
      cases[i].run();
      seconds[i].push_back(ToSeconds(clock.Now() - before));
    }
  }
  for (size_t i = 0; i < cases.size(); ++i) {
    std::sort(seconds[i].begin(), seconds[i].end());
    cases[i].median_s = seconds[i][seconds[i].size() / 2];
    cases[i].best_s = seconds[i].front();
  }
}

}  // namespace mobi
