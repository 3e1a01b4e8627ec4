// Chooses the codes of a linear for all levels together with error feedback: columns are walked in
// the order of falling importance, each weight takes the code nearest to the levels' current
// targets, and every level's own error moves on to the columns behind it through that level's own
// Hessian. Source: GPTQ (arXiv 2210.17323), one feedback state per level. Rows are independent.
#ifndef MOBI_CALIBRATOR_JOINT_CODES_H_
#define MOBI_CALIBRATOR_JOINT_CODES_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "calibrator/fitting_problem.h"
#include "calibrator/nested_weight.h"

namespace mobi {

// What the walk over a linear's columns shares between rows.
struct FeedbackPlan {
  std::vector<int64_t> order;   // column visited at each place
  std::vector<Matrix> factors;  // per stream: InverseFactor of the Hessian in that order
};

absl::StatusOr<FeedbackPlan> PlanFeedback(const FittingProblem& problem, int num_threads = 1);

// Replaces the codes of rows [begin, begin + count); the pairs stay as they are.
void ChooseJointCodes(const FittingProblem& problem, const FeedbackPlan& plan, int64_t begin,
                      int64_t count, NestedWeight& weight);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_JOINT_CODES_H_
