#include "calibrator/code_descent.h"

#include <algorithm>
#include <array>
#include <vector>

#include "calibrator/code_search.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/simd.h"

namespace mobi {
namespace {

MOBI_VECTORIZED void AddScaledGroup(float* out, const float* x, float scale) {
  for (int i = 0; i < kGroupSize; ++i) out[i] += scale * x[i];
}

// Visits the columns of one group of one row, `r` of the `count` of every level in `gradients` and
// `change`: the group's columns of the gradients, and what receives each level's change of value.
int64_t DescendGroup(const FittingProblem& problem, int64_t row, int64_t r, int64_t count,
                     int64_t group, ConstMatrixView gradients, Matrix& change,
                     NestedWeight& weight) {
  const int64_t first = group * kGroupSize;
  const LevelGrids grids = GridsOf(weight, row, group);
  uint8_t* codes = weight.Codes(row) + first;
  float gradient[kNumLevels][kGroupSize];
  for (int k = 0; k < kNumLevels; ++k) {
    std::copy_n(gradients.Row(k * count + r), kGroupSize, gradient[k]);
  }
  int64_t changed = 0;
  for (int j = 0; j < kGroupSize; ++j) {
    std::array<float, kNumLevels> value, target, cost;
    for (int k = 0; k < kNumLevels; ++k) {
      const float curvature = problem.stream(k + 1).hessian(first + j, first + j);
      value[k] = ValueAt(grids, codes[j], k + 1);
      target[k] = value[k] - gradient[k][j] / curvature;
      cost[k] = problem.level_weights[k] * curvature;
    }
    const int code = NearestCode(grids, target.data(), cost.data(), codes[j]);
    if (code == codes[j]) continue;
    ++changed;
    codes[j] = static_cast<uint8_t>(code);
    for (int k = 0; k < kNumLevels; ++k) {
      const float delta = ValueAt(grids, code, k + 1) - value[k];
      if (delta == 0) continue;
      change(k * count + r, j) = delta;
      AddScaledGroup(gradient[k], problem.stream(k + 1).hessian.Row(first + j) + first, delta);
    }
  }
  return changed;
}

}  // namespace

LevelGradients Gradients(const FittingProblem& problem, const NestedWeight& weight, int64_t begin,
                         int64_t count) {
  LevelGradients gradients(count, problem.cols());
  Matrix error = Matrix::Unfilled(count, problem.cols());
  for (int level = 1; level <= kNumLevels; ++level) {
    const StreamProblem& stream = problem.stream(level);
    for (int64_t r = 0; r < count; ++r) {
      DequantizeRow(weight, begin + r, level, error.Row(r));
      const float* target = stream.target.Row(begin + r);
      for (int64_t j = 0; j < problem.cols(); ++j) error(r, j) -= target[j];
    }
    Multiply(error, stream.hessian, gradients.Of(level));
  }
  return gradients;
}

double LevelLoss(const FittingProblem& problem, const NestedWeight& weight, int level,
                 int64_t begin, ConstMatrixView gradient) {
  std::vector<float> value(static_cast<size_t>(problem.cols()));
  double loss = 0;
  for (int64_t r = 0; r < gradient.rows; ++r) {
    DequantizeRow(weight, begin + r, level, value.data());
    const float* target = problem.stream(level).target.Row(begin + r);
    for (int64_t j = 0; j < problem.cols(); ++j) {
      loss += static_cast<double>(value[j] - target[j]) * gradient.Row(r)[j];
    }
  }
  return loss;
}

int64_t DescendCodes(const FittingProblem& problem, int64_t begin, int64_t count,
                     LevelGradients& gradients, NestedWeight& weight) {
  Matrix change(kNumLevels * count, kGroupSize);
  int64_t changed = 0;
  for (int64_t group = 0; group < weight.groups(); ++group) {
    change.Fill(0);
    const int64_t first = group * kGroupSize;
    const MatrixView in_columns = gradients.all().FetchColumns(first, kGroupSize);
    int64_t in_group = 0;
    for (int64_t r = 0; r < count; ++r) {
      in_group += DescendGroup(problem, begin + r, r, count, group, in_columns, change, weight);
    }
    changed += in_group;
    if (in_group == 0) continue;
    std::vector<ConstMatrixView> hessians;
    for (int level = 1; level <= kNumLevels; ++level) {
      hessians.push_back(ConstMatrixView(problem.stream(level).hessian).Rows(first, kGroupSize));
    }
    MultiplyParts(change, hessians, gradients.all(), 1, 1);
  }
  return changed;
}

}  // namespace mobi
