// What fitting one linear needs to know, per level: the Hessian of the inputs that the linear sees
// at that level, the weights it should have there, and how much an error at that level counts.
// Built by statistics.h, read by base_fit, level_fit, joint_codes and code_descent. Immutable while
// rows are fitted in parallel.
#ifndef MOBI_CALIBRATOR_FITTING_PROBLEM_H_
#define MOBI_CALIBRATOR_FITTING_PROBLEM_H_

#include <array>
#include <cstdint>
#include <vector>

#include "calibrator/matrix.h"
#include "kernels/bit_slice.h"

namespace mobi {

// The inputs that one or more levels see.
struct StreamProblem {
  Matrix hessian;  // [cols, cols], mean of x x^T, damped so that it is positive definite
  Matrix target;   // [rows, cols], the weights that serve these inputs best
};

// The loss of a level is  level_weight * sum over rows of (W - target) hessian (W - target)^T.
struct FittingProblem {
  Matrix weight;                  // [rows, cols], the float model's
  std::vector<float> importance;  // [cols], diagonal of the float inputs' Hessian
  std::vector<StreamProblem> streams;
  std::array<int, kNumLevels> stream_of_level{};
  std::array<float, kNumLevels> level_weights{};

  int64_t rows() const { return weight.rows(); }
  int64_t cols() const { return weight.cols(); }
  const StreamProblem& stream(int level) const { return streams[stream_of_level[level - 1]]; }
};

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_FITTING_PROBLEM_H_
