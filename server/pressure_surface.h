// How long a step takes at so many bits and tokens, measured on this machine and model: where fewer
// bits buy no latency, the controller does not spend quality. Immutable, thread-safe.
// The file, as `mobi-bench surface` writes it: {"device": "...", "model": "...", "points":
// [{"bits": 2, "tokens": 1, "milliseconds": 3.1}, ...]}, one point for every pair of the bits and
// the tokens in it, in any order; other keys tell people where it comes from.
#ifndef MOBI_SERVER_PRESSURE_SURFACE_H_
#define MOBI_SERVER_PRESSURE_SURFACE_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mobi {

class StepSurface {
 public:
  // INVALID_ARGUMENT names what is wrong: fewer than two bits, axes that do not ascend, latencies
  // that are not positive, rows of the wrong length.
  static absl::StatusOr<StepSurface> Create(std::vector<double> bits,
                                            std::vector<double> step_tokens,
                                            std::vector<std::vector<double>> step_ms);
  // INVALID_ARGUMENT names file, field and reason: points missing or twice, too.
  static absl::StatusOr<StepSurface> Parse(absl::string_view json, absl::string_view file);
  static absl::StatusOr<StepSurface> Load(const std::string& path);

  // Interpolated, linear in bits and in the logarithm of tokens; the edges go on for ever.
  double StepMs(double bits, double step_tokens) const;

  // The most bits of [bits, ceiling] whose step is at most (1 + tolerance) as long as at `bits`.
  float FreeBits(float bits, float ceiling, double step_tokens, double tolerance) const;

  // What Parse reads.
  std::string ToJson() const;

 private:
  StepSurface(std::vector<double> bits, std::vector<double> step_tokens,
              std::vector<std::vector<double>> step_ms)
      : bits_(std::move(bits)),
        step_tokens_(std::move(step_tokens)),
        step_ms_(std::move(step_ms)) {}

  std::vector<double> bits_;
  std::vector<double> step_tokens_;
  std::vector<std::vector<double>> step_ms_;  // [bits, step_tokens]
};

}  // namespace mobi

#endif  // MOBI_SERVER_PRESSURE_SURFACE_H_
