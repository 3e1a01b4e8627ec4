// Load on a server as differential equations: no noise but what is put in, so a limit cycle shows
// as one. The controller sees a pressure and answers with bits; relief (the part of the way from
// ceiling to floor) of `need` balances the load; a need below zero is none at all.
#ifndef MOBI_TESTS_SERVER_FLUID_PLANT_H_
#define MOBI_TESTS_SERVER_FLUID_PLANT_H_

#include <algorithm>
#include <cmath>
#include <deque>
#include <random>
#include <vector>

namespace mobi {

enum class FluidKind {
  kQueue,    // grows with what is not served, as queues do
  kLatency,  // a percentile over a window of a value that follows relief at once
  kLag,      // follows relief with a time constant, as KV usage does
};

struct FluidOptions {
  FluidKind kind = FluidKind::kQueue;
  double rate = 1;             // pressure per second and missing relief, of a queue
  double slope = 1;            // pressure per relief, of the others
  double window_seconds = 1;   // of kLatency
  double lag_seconds = 1;      // of kLag
  double delay_seconds = 0.1;  // from a target to steps that use it
};

class FluidPlant {
 public:
  static constexpr double kStep = 1.0 / 60;
  // Pressure of kLatency and kLag when load is balanced, and when there is none.
  static constexpr double kRest = 0.7;
  static constexpr double kIdle = 0.2;

  explicit FluidPlant(const FluidOptions& options) : options_(options) {}

  // Lets `seconds` pass at this need and relief.
  void Run(double seconds, double need, double relief) {
    targets_.push_back({time_ + options_.delay_seconds, relief});
    for (const double end = time_ + seconds; time_ < end; time_ += kStep) {
      while (!targets_.empty() && targets_.front().first <= time_) {
        relief_ = targets_.front().second;
        targets_.pop_front();
      }
      const double missing = need - relief_;
      const double rest = need < 0 ? kIdle : kRest + options_.slope * missing;
      if (options_.kind == FluidKind::kQueue) {
        value_ = std::max(0.0, value_ + kStep * options_.rate * missing);
      } else if (options_.kind == FluidKind::kLag) {
        value_ += kStep / options_.lag_seconds * (rest - value_);
      } else {
        value_ = std::max(0.0, rest);
      }
      history_.push_back(value_);
      if (history_.size() * kStep > options_.window_seconds) history_.pop_front();
    }
  }

  double pressure() const {
    if (options_.kind != FluidKind::kLatency) return std::max(0.0, value_);
    std::vector<double> sorted(history_.begin(), history_.end());
    const auto rank = sorted.begin() + static_cast<int64_t>(sorted.size() * 95 / 100);
    if (rank == sorted.end()) return value_;
    std::nth_element(sorted.begin(), rank, sorted.end());
    return *rank;
  }

 private:
  const FluidOptions options_;
  double time_ = 0;
  double value_ = 0;
  double relief_ = 0;
  std::deque<std::pair<double, double>> targets_;
  std::deque<double> history_;
};

// Any plant that a server could be: from slow queues on a CPU to queues that a GPU empties ten
// times a second.
inline FluidOptions RandomFluid(std::mt19937_64& rng, double max_rate, double min_slope = 0.1) {
  const auto uniform = [&](double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(rng);
  };
  const auto log_uniform = [&](double low, double high) {
    return std::exp(uniform(std::log(low), std::log(high)));
  };
  return {.kind = static_cast<FluidKind>(rng() % 3),
          .rate = log_uniform(0.05, max_rate),
          .slope = log_uniform(min_slope, 2),
          .window_seconds = uniform(1, 5),
          .lag_seconds = log_uniform(0.5, 15),
          .delay_seconds = log_uniform(0.01, 0.3)};
}

}  // namespace mobi

#endif  // MOBI_TESTS_SERVER_FLUID_PLANT_H_
