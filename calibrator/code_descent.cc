#include "calibrator/code_descent.h"

#include <algorithm>
#include <vector>

#include "calibrator/code_search.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/simd.h"

namespace mobi {
namespace {

MOBI_VECTORIZED void AddScaledGroup(float* out, const float* x, float scale) {
  for (int i = 0; i < kGroupSize; ++i) out[i] += scale * x[i];
}

// Of one group's columns, per level.
using GroupGradients = std::array<MatrixView, kNumLevels>;
using GroupChange = std::array<Matrix, kNumLevels>;

// Visits the columns of one group of one row. `change` receives each level's change of value.
int64_t DescendGroup(const FittingProblem& problem, int64_t row, int64_t r, int64_t group,
                     const GroupGradients& gradients, GroupChange& change, NestedWeight& weight) {
  const int64_t first = group * kGroupSize;
  const LevelGrids grids = GridsOf(weight, row, group);
  uint8_t* codes = weight.Codes(row) + first;
  float gradient[kNumLevels][kGroupSize];
  for (int k = 0; k < kNumLevels; ++k) {
    std::copy_n(gradients[k].Row(r), kGroupSize, gradient[k]);
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
      change[k](r, j) = delta;
      AddScaledGroup(gradient[k], problem.stream(k + 1).hessian.Row(first + j) + first, delta);
    }
  }
  return changed;
}

}  // namespace

LevelGradients Gradients(const FittingProblem& problem, const NestedWeight& weight, int64_t begin,
                         int64_t count) {
  LevelGradients gradients;
  Matrix error = Matrix::Unfilled(count, problem.cols());
  for (int level = 1; level <= kNumLevels; ++level) {
    const StreamProblem& stream = problem.stream(level);
    for (int64_t r = 0; r < count; ++r) {
      DequantizeRow(weight, begin + r, level, error.Row(r));
      const float* target = stream.target.Row(begin + r);
      for (int64_t j = 0; j < problem.cols(); ++j) error(r, j) -= target[j];
    }
    gradients[level - 1] = DeviceMatrix::Unfilled(count, problem.cols());
    Multiply(error, stream.hessian, gradients[level - 1]);
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
  GroupChange change;
  for (Matrix& m : change) m = Matrix(count, kGroupSize);
  int64_t changed = 0;
  for (int64_t group = 0; group < weight.groups(); ++group) {
    for (Matrix& m : change) m.Fill(0);
    GroupGradients in_columns;
    for (int k = 0; k < kNumLevels; ++k) {
      in_columns[k] = gradients[k].FetchColumns(group * kGroupSize, kGroupSize);
    }
    int64_t in_group = 0;
    for (int64_t r = 0; r < count; ++r) {
      in_group += DescendGroup(problem, begin + r, r, group, in_columns, change, weight);
    }
    changed += in_group;
    if (in_group == 0) continue;
    for (int k = 0; k < kNumLevels; ++k) {
      const ConstMatrixView hessian(problem.stream(k + 1).hessian);
      Multiply(change[k], hessian.Rows(group * kGroupSize, kGroupSize), gradients[k], 1, 1);
    }
  }
  return changed;
}

}  // namespace mobi
