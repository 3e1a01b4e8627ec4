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

// One feedback state per level: current targets of the rows in walking order, those of the block's
// columns, and the errors there.
struct LevelState {
  const Matrix* factor;
  DeviceMatrix target;
  MatrixView block;
  Matrix error;
};

// The level's targets of rows [begin, begin + count), their columns in walking order.
Matrix TargetsInOrder(const Matrix& targets, const std::vector<int64_t>& order, int64_t begin,
                      int64_t count) {
  Matrix out = Matrix::Unfilled(count, targets.cols());
  for (int64_t r = 0; r < count; ++r) {
    const float* target = targets.Row(begin + r);
    for (int64_t i = 0; i < out.cols(); ++i) out(r, i) = target[order[i]];
  }
  return out;
}

void WalkBlock(const FittingProblem& problem, const FeedbackPlan& plan, int64_t begin, int64_t r,
               int64_t first, int64_t last, const std::vector<LevelGrids>& grids,
               std::array<LevelState, kNumLevels>& states, NestedWeight& weight) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t column = plan.order[i];
    std::array<float, kNumLevels> target, cost, pivot;
    for (int k = 0; k < kNumLevels; ++k) {
      pivot[k] = (*states[k].factor)(i, i);
      target[k] = states[k].block.Row(r)[i - first];
      cost[k] = problem.level_weights[k] / (pivot[k] * pivot[k]);
    }
    const LevelGrids& grid = grids[column / kGroupSize];
    uint8_t& code = weight.Codes(begin + r)[column];
    code = static_cast<uint8_t>(NearestCode(grid, target.data(), cost.data(), code));
    for (int k = 0; k < kNumLevels; ++k) {
      const float error = (target[k] - ValueAt(grid, code, k + 1)) / pivot[k];
      states[k].error(r, i - first) = error;
      SubtractScaled(states[k].block.Row(r) + i - first + 1, states[k].factor->Row(i) + i + 1,
                     error, last - i - 1);
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
  std::array<LevelState, kNumLevels> states;
  for (int k = 0; k < kNumLevels; ++k) {
    states[k].factor = &plan.factors[problem.stream_of_level[k]];
    states[k].target =
        DeviceMatrix(TargetsInOrder(problem.stream(k + 1).target, plan.order, begin, count));
    states[k].error = Matrix(count, kBlock);
  }
  std::vector<std::vector<LevelGrids>> grids(static_cast<size_t>(count));
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t g = 0; g < weight.groups(); ++g) {
      grids[r].push_back(GridsOf(weight, begin + r, g));
    }
  }
  for (int64_t first = 0; first < cols; first += kBlock) {
    const int64_t last = std::min(first + kBlock, cols);
    for (LevelState& state : states) {
      state.block = state.target.FetchColumns(first, last - first);
    }
    for (int64_t r = 0; r < count; ++r) {
      WalkBlock(problem, plan, begin, r, first, last, grids[r], states, weight);
    }
    if (last == cols) break;
    for (LevelState& state : states) {
      Multiply(ConstMatrixView(state.error).Columns(0, last - first),
               ConstMatrixView(*state.factor).Rows(first, last - first).Columns(last, cols - last),
               MatrixView(state.target).Columns(last, cols - last), -1, 1);
    }
  }
}

}  // namespace mobi
