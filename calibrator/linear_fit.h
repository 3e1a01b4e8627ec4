// Fits one linear by a recipe: base fit, joint codes, then rounds of refit and descent. The pieces
// are apart (base_fit, joint_codes, level_fit, code_descent); this is their order.
#ifndef MOBI_CALIBRATOR_LINEAR_FIT_H_
#define MOBI_CALIBRATOR_LINEAR_FIT_H_

#include "absl/status/statusor.h"
#include "calibrator/base_fit.h"
#include "calibrator/fitting_problem.h"
#include "calibrator/nested_weight.h"

namespace mobi {

struct LinearFitOptions {
  BaseFitOptions base;
  bool joint_codes = true;
  int rounds = 2;       // of refit and descent
  int passes = 2;       // of descent in a round
  double ridge = 1e-3;  // of the refit
};

// FAILED_PRECONDITION when a Hessian cannot be factorized.
absl::StatusOr<NestedWeight> FitLinear(const FittingProblem& problem,
                                       const LinearFitOptions& options, int num_threads);

// The loss of every level over all rows.
std::array<double, kNumLevels> LevelLosses(const FittingProblem& problem,
                                           const NestedWeight& weight, int num_threads);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_LINEAR_FIT_H_
