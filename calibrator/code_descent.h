// Coordinate descent on the codes: every weight in turn takes the code that lowers the sum of the
// levels' exact losses, given all other weights of its row. Each step can only lower that sum, so
// passes converge; pairs are refitted between rounds (level_fit.h). Rows are independent.
#ifndef MOBI_CALIBRATOR_CODE_DESCENT_H_
#define MOBI_CALIBRATOR_CODE_DESCENT_H_

#include <cstdint>

#include "calibrator/fitting_problem.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/nested_weight.h"

namespace mobi {

// (W_level - target) H for rows [begin, begin + count) and every level: what a change of a weight
// costs to first order.
class LevelGradients {
 public:
  LevelGradients(int64_t count, int64_t cols)
      : count_(count), all_(DeviceMatrix::Unfilled(kNumLevels * count, cols)) {}

  // The rows of level 1, then those of level 2, and so on.
  DeviceMatrix& all() { return all_; }
  MatrixView Of(int level) { return MatrixView(all_).Rows((level - 1) * count_, count_); }
  // For the host.
  ConstMatrixView Fetch(int level) const { return all_.FetchRows((level - 1) * count_, count_); }

 private:
  int64_t count_;
  DeviceMatrix all_;
};

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
