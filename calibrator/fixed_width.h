// What others do at one fixed width, to compare with: round-to-nearest, GPTQ with a clip search,
// learned clipping. The result is a nested weight whose upper levels all hold the fixed-width
// values exactly (a b-bit code in the top bits of the 8-bit one), so that it is written, served and
// evaluated by the same path; read it at the highest level. Rows are fitted in parallel.
// Sources: GPTQ (arXiv 2210.17323), OmniQuant's learnable weight clipping (arXiv 2308.13137).
#ifndef MOBI_CALIBRATOR_FIXED_WIDTH_H_
#define MOBI_CALIBRATOR_FIXED_WIDTH_H_

#include "absl/status/statusor.h"
#include "calibrator/fitting_problem.h"
#include "calibrator/nested_weight.h"

namespace mobi {

enum class FixedMethod {
  kNone,  // no baseline: fit nested codes
  kRtn,   // range of the group with 0 in it, integer zero point
  kGptq,  // ranges by clip search, then error feedback, columns by decreasing importance
  kLwc,  // both ends of every range trained on the linear's output error, straight through rounding
};

struct FixedWidthOptions {
  FixedMethod method = FixedMethod::kNone;
  int bits = 3;                     // 2..8
  int lwc_steps = 100;              // of Adam
  float lwc_learning_rate = 1e-2f;  // of an end, relative to the group's range
};

// The float weights are what is approximated: no correction for what came before, as published.
absl::StatusOr<NestedWeight> FitFixedWidth(const FittingProblem& problem,
                                           const FixedWidthOptions& options, int num_threads);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_FIXED_WIDTH_H_
