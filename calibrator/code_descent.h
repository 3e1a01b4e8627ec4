// Coordinate descent on the codes: every weight in turn takes the code that lowers the sum of the
// levels' exact losses, given all other weights of its row. Each step can only lower that sum, so
// passes converge; pairs are refitted between rounds (level_fit.h). Rows are independent.
#ifndef MOBI_CALIBRATOR_CODE_DESCENT_H_
#define MOBI_CALIBRATOR_CODE_DESCENT_H_

#include <array>
#include <cstdint>

#include "calibrator/fitting_problem.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/nested_weight.h"

namespace mobi {

// (W_level - target) H for rows [begin, begin + count) and every level: what a change of a weight
// costs to first order.
using LevelGradients = std::array<DeviceMatrix, kNumLevels>;

LevelGradients Gradients(const FittingProblem& problem, const NestedWeight& weight, int64_t begin,
                         int64_t count);

// The sum over these rows of the level's loss, without its level weight.
double LevelLoss(const FittingProblem& problem, const NestedWeight& weight, int level,
                 int64_t begin, ConstMatrixView gradient);

// One pass over the columns of rows [begin, begin + count); keeps `gradients` current. Returns the
// number of codes changed.
int64_t DescendCodes(const FittingProblem& problem, int64_t begin, int64_t count,
                     LevelGradients& gradients, NestedWeight& weight);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_CODE_DESCENT_H_
