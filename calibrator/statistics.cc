#include "calibrator/statistics.h"

#include <cmath>

#include "calibrator/linear_algebra.h"
#include "engine/base/status_macros.h"

namespace mobi {

StreamStatistics::StreamStatistics(int64_t cols, int64_t residual_rows)
    : gram_(cols, cols), cross_(cols, cols), gap_(residual_rows, cols) {}

void StreamStatistics::Add(ConstMatrixView input, ConstMatrixView float_input,
                           ConstMatrixView residual_gap) {
  num_tokens_ += input.rows;
  AddGram(input, gram_);
  TransposedMultiply(float_input, input, cross_, 1, 1);
  if (gap_.rows() > 0) TransposedMultiply(residual_gap, input, gap_, 1, 1);
}

absl::StatusOr<StreamProblem> StreamStatistics::Problem(const Matrix& weight,
                                                        double damping) const {
  const int64_t cols = gram_.cols();
  const float scale = 1.0f / static_cast<float>(num_tokens_);
  StreamProblem problem;
  problem.hessian = gram_;
  MirrorLower(problem.hessian);
  double trace = 0;
  for (int64_t i = 0; i < problem.hessian.size(); ++i) problem.hessian.data()[i] *= scale;
  for (int64_t j = 0; j < cols; ++j) trace += problem.hessian(j, j);
  if (!std::isfinite(trace)) {
    return absl::FailedPreconditionError("activations are not finite");
  }
  const float mean = trace > 0 ? static_cast<float>(trace / static_cast<double>(cols)) : 1.0f;

  Matrix moment(weight.rows(), cols);
  if (gap_.rows() > 0) moment = gap_;
  Multiply(weight, cross_, moment, scale, gap_.rows() > 0 ? scale : 0);
  for (int64_t j = 0; j < cols; ++j) {
    float& diagonal = problem.hessian(j, j);
    const float added = diagonal > 0 ? static_cast<float>(damping) * diagonal : mean;
    diagonal += added;
    for (int64_t row = 0; row < weight.rows(); ++row) moment(row, j) += added * weight(row, j);
  }
  MOBI_RETURN_IF_ERROR(SolveRows(problem.hessian, moment, problem.target));
  return problem;
}

}  // namespace mobi
