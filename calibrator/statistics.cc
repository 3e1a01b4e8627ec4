#include "calibrator/statistics.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "calibrator/linear_algebra.h"
#include "calibrator/parallel.h"
#include "calibrator/vector_math.h"
#include "engine/base/status_macros.h"

namespace mobi {

StreamStatistics::StreamStatistics(int64_t cols, int64_t residual_rows)
    : gram_(cols, cols), wanted_(residual_rows, residual_rows > 0 ? cols : 0) {}

void StreamStatistics::Add(ConstMatrixView input) {
  num_tokens_ += input.rows;
  AddGram(input, gram_);
}

void StreamStatistics::Add(ConstMatrixView input, ConstMatrixView float_input) {
  Add(input);
  if (cross_.empty()) cross_ = DeviceMatrix(input.cols, input.cols);
  TransposedMultiply(float_input, input, cross_, 1, 1);
}

void StreamStatistics::AddWanted(ConstMatrixView input, ConstMatrixView output) {
  Add(input);
  TransposedMultiply(output, input, wanted_, 1, 1);
}

void StreamStatistics::Add(const StreamStatistics& more) {
  num_tokens_ += more.num_tokens_;
  gram_.Add(more.gram_);
  if (!cross_.empty()) cross_.Add(more.cross_);
  if (!wanted_.empty()) wanted_.Add(more.wanted_);
}

absl::StatusOr<StreamProblem> StreamStatistics::Problem(const Matrix& weight, double damping,
                                                        int num_threads) const {
  const int64_t cols = gram_.cols();
  const float scale = 1.0f / static_cast<float>(num_tokens_);
  const Matrix& gram = gram_.Fetch();
  StreamProblem problem;
  problem.hessian = Matrix::Unfilled(cols, cols);
  ParallelFor(num_threads, cols, [&](int64_t j) {
    std::copy_n(gram.Row(j), j + 1, problem.hessian.Row(j));
    Scale(problem.hessian.Row(j), scale, j + 1);
  });
  MirrorLower(problem.hessian, num_threads);
  double trace = 0;
  for (int64_t j = 0; j < cols; ++j) trace += problem.hessian(j, j);
  if (!std::isfinite(trace)) {
    return absl::FailedPreconditionError("activations are not finite");
  }
  const float mean = trace > 0 ? static_cast<float>(trace / static_cast<double>(cols)) : 1.0f;

  const bool of_float = cross_.empty() && wanted_.empty();
  std::vector<float> added(static_cast<size_t>(cols));
  for (int64_t j = 0; j < cols; ++j) {
    float& diagonal = problem.hessian(j, j);
    added[j] = diagonal > 0 ? static_cast<float>(damping) * diagonal : mean;
    diagonal += added[j];
  }
  if (of_float) {
    problem.target = weight;
    return problem;
  }
  Matrix moment = Matrix::Unfilled(weight.rows(), cols);
  if (!cross_.empty()) Multiply(weight, cross_, moment);
  const Matrix& sums = cross_.empty() ? wanted_.Fetch() : moment;
  ParallelFor(num_threads, weight.rows(), [&](int64_t row) {
    const float* sum = sums.Row(row);
    for (int64_t j = 0; j < cols; ++j) {
      const float mean_product = sum[j] * scale;
      moment(row, j) = mean_product + added[j] * weight(row, j);
    }
  });
  MOBI_RETURN_IF_ERROR(SolveRows(problem.hessian, moment, problem.target));
  return problem;
}

}  // namespace mobi
