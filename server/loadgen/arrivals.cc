#include "server/loadgen/arrivals.h"

#include <cmath>
#include <random>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr double kMaxRate = 1e5;
constexpr double kMaxSeconds = 86400;
constexpr int kMaxTokens = 1 << 20;

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

absl::Status Bad(absl::string_view part, absl::string_view reason) {
  return absl::InvalidArgumentError(absl::StrCat("\"", part, "\": ", reason));
}

absl::StatusOr<double> ParseNumber(absl::string_view text, double max, absl::string_view what) {
  double value = 0;
  if (!absl::SimpleAtod(text, &value) || !(value > 0 && value <= max)) {
    return Bad(text, absl::StrCat(what, " is a number above 0, at most ", max));
  }
  return value;
}

Duration Seconds(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

// [0, 1); the standard library's distributions may differ between machines, this does not.
double Uniform(std::mt19937_64& random) { return static_cast<double>(random() >> 11) * 0x1p-53; }

int Draw(TokenRange range, std::mt19937_64& random) {
  return range.min + static_cast<int>(Uniform(random) * (range.max - range.min + 1));
}

}  // namespace

absl::StatusOr<std::vector<RatePhase>> ParsePhases(std::string_view text, Duration duration) {
  std::vector<RatePhase> phases;
  for (const absl::string_view part : absl::StrSplit(View(text), ',')) {
    const std::vector<absl::string_view> fields = absl::StrSplit(part, ':');
    if (fields.size() > 2) return Bad(part, "a phase is RATE or RATE:SECONDS");
    MOBI_ASSIGN_OR_RETURN(const double rate, ParseNumber(fields[0], kMaxRate, "a rate"));
    RatePhase phase{rate, duration};
    if (fields.size() == 2) {
      MOBI_ASSIGN_OR_RETURN(const double seconds, ParseNumber(fields[1], kMaxSeconds, "a time"));
      phase.duration = Seconds(seconds);
    }
    phases.push_back(phase);
  }
  return phases;
}

absl::StatusOr<TokenRange> ParseTokenRange(std::string_view text) {
  const std::vector<absl::string_view> fields = absl::StrSplit(View(text), ':');
  TokenRange range;
  if (fields.size() > 2 || !absl::SimpleAtoi(fields.front(), &range.min) ||
      !absl::SimpleAtoi(fields.back(), &range.max)) {
    return Bad(View(text), "tokens are N or MIN:MAX");
  }
  if (range.min < 1 || range.max < range.min || range.max > kMaxTokens) {
    return Bad(View(text), absl::StrCat("needs 1 <= MIN <= MAX <= ", kMaxTokens));
  }
  return range;
}

std::vector<Arrival> PoissonArrivals(absl::Span<const RatePhase> phases, TokenRange prompt_tokens,
                                     TokenRange new_tokens, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Arrival> arrivals;
  double begin = 0;
  for (size_t i = 0; i < phases.size(); ++i) {
    const double end = begin + ToSeconds(phases[i].duration);
    // The process has no memory, so every phase starts afresh.
    for (double at = begin;;) {
      at -= std::log1p(-Uniform(random)) / phases[i].requests_per_second;
      if (at >= end) break;
      const int prompt = Draw(prompt_tokens, random);
      arrivals.push_back({Seconds(at), prompt, Draw(new_tokens, random), static_cast<int>(i)});
    }
    begin = end;
  }
  return arrivals;
}

}  // namespace mobi
