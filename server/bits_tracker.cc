#include "server/bits_tracker.h"

#include <algorithm>
#include <cmath>

namespace mobi {
namespace {

// Of measurements per second and of the time between looks.
constexpr double kRateMemorySeconds = 1;

double Decay(double seconds, double time_constant) { return std::exp(-seconds / time_constant); }

// What is new since the last look.
BitsCounters Since(const BitsCounters& now, const BitsCounters& from) {
  if (now.count < from.count) return now;  // a new engine
  return {now.bits_sum - from.bits_sum, now.target_sum - from.target_sum,
          now.trim_sum - from.trim_sum, now.count - from.count};
}

// What the trim would have had to be for the bits that were asked for, if the slope is right. The
// engine says what trim was used, so news that is late misleads nobody.
void Learn(const BitsTrackerOptions& options, double memory, double nats_per_bit,
           const BitsCounters& news, LearnedTrim& learned) {
  if (news.count == 0) return;
  const auto count = static_cast<double>(news.count);
  const double needed = (news.trim_sum + (news.bits_sum - news.target_sum) * nats_per_bit) / count;
  learned.seen = std::min(learned.seen + count, memory);
  const double part = std::min(options.most_per_look, count / learned.seen);
  const double limit = options.max_shift_bits * nats_per_bit;
  const double wanted = std::lerp(learned.trim, needed, part);
  learned.trim = std::clamp(wanted, -limit, limit);
  learned.saturated = wanted != learned.trim;
}

// How often there is news, in measurements and in looks.
void MeasureRate(TimePoint now, double count, BitsDebt& debt) {
  const double seconds = debt.measured ? ToSeconds(now - *debt.measured) : 0;
  debt.measured = now;
  if (seconds <= 0 || seconds > kRateMemorySeconds) return;  // the first, or after a gap
  const double keep = debt.rate > 0 ? Decay(seconds, kRateMemorySeconds) : 0;
  debt.rate = std::lerp(count / seconds, debt.rate, keep);
  debt.look_seconds = std::lerp(seconds, debt.look_seconds, keep);
}

// Adds what is new and returns the bits by which the next tokens are to differ from the target.
double Repay(const BitsTrackerOptions& options, double excess, uint64_t count, TimePoint now,
             double keep, BitsDebt& debt) {
  debt.bits = debt.bits * keep + excess;
  if (count > 0) MeasureRate(now, static_cast<double>(count), debt);
  const double seconds =
      std::max(ToSeconds(options.repayment), options.repayment_looks * debt.look_seconds);
  const double measurements = std::max(1.0, debt.rate * seconds);
  return std::clamp(debt.bits / measurements, -double{options.max_repayment_bits},
                    double{options.max_repayment_bits});
}

}  // namespace

BitsTrackerState TrackBits(const BitsTrackerOptions& options, const PerRegime<float>& nats_per_bit,
                           const PerRegime<BitsCounters>& counters, TimePoint now,
                           BitsTrackerState state) {
  const double keep =
      state.updated ? Decay(ToSeconds(now - *state.updated), ToSeconds(options.debt_memory)) : 0;
  state.updated = now;
  double token_excess = 0, step_excess = 0;
  uint64_t tokens = 0, steps = 0;
  for (const Regime regime : kRegimes) {
    const bool shared = regime == Regime::kCoherent;
    LearnedTrim& learned = state.learned[regime];
    const BitsCounters news = Since(counters[regime], learned.from);
    learned.from = counters[regime];
    Learn(options, shared ? options.step_memory : options.token_memory, nats_per_bit[regime], news,
          learned);
    (shared ? step_excess : token_excess) += news.bits_sum - news.target_sum;
    (shared ? steps : tokens) += news.count;
  }
  const double token_bits = Repay(options, token_excess, tokens, now, keep, state.token_debt);
  const double step_bits = Repay(options, step_excess, steps, now, keep, state.step_debt);
  state.saturated = false;
  for (const Regime regime : kRegimes) {
    const LearnedTrim& learned = state.learned[regime];
    const double repaid = regime == Regime::kCoherent ? step_bits : token_bits;
    state.trim[regime] = static_cast<float>(learned.trim + repaid * nats_per_bit[regime]);
    state.saturated |= learned.saturated;
  }
  return state;
}

}  // namespace mobi
