#include "calibrator/joint_codes.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "calibrator/code_search.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/parallel.h"
#include "calibrator/simd.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

// Columns whose feedback is applied at once; the columns behind them get one product per block.
constexpr int64_t kBlock = 128;

Matrix Permuted(const Matrix& m, const std::vector<int64_t>& order, int num_threads) {
  Matrix out = Matrix::Unfilled(m.rows(), m.cols());
  ParallelFor(num_threads, m.rows(), [&](int64_t i) {
    const float* row = m.Row(order[i]);
    for (int64_t j = 0; j < m.cols(); ++j) out(i, j) = row[order[j]];
  });
  return out;
}

MOBI_VECTORIZED void SubtractScaled(float* out, const float* x, float scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] -= scale * x[i];
}

// Feedback to the rows, level after level: their current targets in walking order, those of the
// block's columns, and the errors there.
struct Feedback {
  std::array<const Matrix*, kNumLevels> factors;
  DeviceMatrix targets;
  MatrixView block;
  Matrix errors;
};

// Every level's targets of rows [begin, begin + count), their columns in walking order.
Matrix TargetsInOrder(const FittingProblem& problem, const std::vector<int64_t>& order,
                      int64_t begin, int64_t count) {
  Matrix out = Matrix::Unfilled(kNumLevels * count, problem.cols());
  for (int64_t i = 0; i < out.rows(); ++i) {
    const int level = static_cast<int>(i / count) + 1;
    const float* target = problem.stream(level).target.Row(begin + i % count);
    for (int64_t j = 0; j < out.cols(); ++j) out(i, j) = target[order[j]];
  }
  return out;
}

void WalkBlock(const FittingProblem& problem, const FeedbackPlan& plan, int64_t begin, int64_t r,
               int64_t count, int64_t first, int64_t last, const std::vector<LevelGrids>& grids,
               Feedback& feedback, NestedWeight& weight) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t column = plan.order[i];
    std::array<float, kNumLevels> target, cost, pivot;
    for (int k = 0; k < kNumLevels; ++k) {
      pivot[k] = (*feedback.factors[k])(i, i);
      target[k] = feedback.block.Row(k * count + r)[i - first];
      cost[k] = problem.level_weights[k] / (pivot[k] * pivot[k]);
    }
    const LevelGrids& grid = grids[column / kGroupSize];
    uint8_t& code = weight.Codes(begin + r)[column];
    code = static_cast<uint8_t>(NearestCode(grid, target.data(), cost.data(), code));
    for (int k = 0; k < kNumLevels; ++k) {
      const float error = (target[k] - ValueAt(grid, code, k + 1)) / pivot[k];
      feedback.errors(k * count + r, i - first) = error;
      SubtractScaled(feedback.block.Row(k * count + r) + i - first + 1,
                     feedback.factors[k]->Row(i) + i + 1, error, last - i - 1);
    }
  }
}

}  // namespace

absl::StatusOr<FeedbackPlan> PlanFeedback(const FittingProblem& problem, int num_threads) {
  FeedbackPlan plan;
  plan.order.resize(static_cast<size_t>(problem.cols()));
  std::iota(plan.order.begin(), plan.order.end(), 0);
  std::stable_sort(plan.order.begin(), plan.order.end(), [&](int64_t a, int64_t b) {
    return problem.importance[a] > problem.importance[b];
  });
  for (const StreamProblem& stream : problem.streams) {
    Matrix& factor = plan.factors.emplace_back();
    MOBI_RETURN_IF_ERROR(InverseFactor(Permuted(stream.hessian, plan.order, num_threads), factor));
  }
  return plan;
}

void ChooseJointCodes(const FittingProblem& problem, const FeedbackPlan& plan, int64_t begin,
                      int64_t count, NestedWeight& weight) {
  const int64_t cols = problem.cols();
  Feedback feedback;
  for (int k = 0; k < kNumLevels; ++k) {
    feedback.factors[k] = &plan.factors[problem.stream_of_level[k]];
  }
  feedback.targets = DeviceMatrix(TargetsInOrder(problem, plan.order, begin, count));
  feedback.errors = Matrix(kNumLevels * count, kBlock);
  std::vector<std::vector<LevelGrids>> grids(static_cast<size_t>(count));
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t g = 0; g < weight.groups(); ++g) {
      grids[r].push_back(GridsOf(weight, begin + r, g));
    }
  }
  for (int64_t first = 0; first < cols; first += kBlock) {
    const int64_t last = std::min(first + kBlock, cols);
    feedback.block = feedback.targets.FetchColumns(first, last - first);
    for (int64_t r = 0; r < count; ++r) {
      WalkBlock(problem, plan, begin, r, count, first, last, grids[r], feedback, weight);
    }
    if (last == cols) break;
    std::vector<ConstMatrixView> behind;
    for (const Matrix* factor : feedback.factors) {
      behind.push_back(
          ConstMatrixView(*factor).Rows(first, last - first).Columns(last, cols - last));
    }
    MultiplyParts(ConstMatrixView(feedback.errors).Columns(0, last - first), behind,
                  MatrixView(feedback.targets).Columns(last, cols - last), -1, 1);
  }
}

}  // namespace mobi
