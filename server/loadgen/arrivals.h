// When the requests of a load test are sent and how long they are, drawn before the test starts so
// that no answer can delay the next request (open loop). Pure functions: the same seed gives the
// same arrivals on every machine.
#ifndef MOBI_SERVER_LOADGEN_ARRIVALS_H_
#define MOBI_SERVER_LOADGEN_ARRIVALS_H_

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/base/clock.h"

namespace mobi {

struct Arrival {
  Duration at{};  // after the start
  int prompt_tokens = 1;
  int new_tokens = 1;
  int phase = 0;  // index of the phase it belongs to
};

// A stretch of constant rate.
struct RatePhase {
  double requests_per_second = 1;
  Duration duration{};
};

struct TokenRange {  // uniform, both ends included
  int min = 1;
  int max = 1;
};

// "4", or "4:10,40:20,4:10" for RATE:SECONDS phases; a bare rate lasts `duration`.
// INVALID_ARGUMENT says what is wrong with which part.
absl::StatusOr<std::vector<RatePhase>> ParsePhases(std::string_view text, Duration duration);

// "128" or "64:256".
absl::StatusOr<TokenRange> ParseTokenRange(std::string_view text);

// A Poisson process whose rate changes from phase to phase.
std::vector<Arrival> PoissonArrivals(absl::Span<const RatePhase> phases, TokenRange prompt_tokens,
                                     TokenRange new_tokens, uint64_t seed);

}  // namespace mobi

#endif  // MOBI_SERVER_LOADGEN_ARRIVALS_H_
