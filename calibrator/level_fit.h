// Fits the (range, offset) pair of every level and group to codes that are already chosen, by
// weighted least squares: with the diagonal of the Hessian, one group at a time (the start), or
// with the whole Hessian over a row (the refit between passes over the codes). Rows are
// independent.
#ifndef MOBI_CALIBRATOR_LEVEL_FIT_H_
#define MOBI_CALIBRATOR_LEVEL_FIT_H_

#include <cstdint>
#include <vector>

#include "calibrator/fitting_problem.h"
#include "calibrator/nested_weight.h"

namespace mobi {

struct ScaleFit {
  LevelScale scale;
  double error = 0;  // sum of importance * (w - W_level)^2 at the unrounded optimum
};

// The pair that reads `codes` [kGroupSize] at `level` nearest to `target`.
ScaleFit FitScale(const float* target, const float* importance, const uint8_t* codes, int level);

// Diagonal fit of every level of a row to its target.
void FitRowDiagonal(const float* target, const float* importance, int64_t row,
                    NestedWeight& weight);

// [groups, groups], sums of the Hessian over pairs of groups: the normal equations' part for the
// offsets, which no row changes.
std::vector<double> GroupSums(const Matrix& hessian, int num_threads = 1);

// Full-Hessian fit of `level` for rows [begin, begin + error.rows). `gradient` is
// (W_level - target) H for these rows, `group_sums` GroupSums of the Hessian. `ridge` is relative
// to the normal equations' diagonal and holds each pair near where it was. A row whose system is
// singular keeps its pairs.
void RefitLevel(const Matrix& hessian, const std::vector<double>& group_sums, int level,
                int64_t begin, ConstMatrixView gradient, double ridge, NestedWeight& weight);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_LEVEL_FIT_H_
