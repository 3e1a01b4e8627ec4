#include "calibrator/linear_fit.h"

#include <algorithm>
#include <array>
#include <vector>

#include "calibrator/code_descent.h"
#include "calibrator/joint_codes.h"
#include "calibrator/level_fit.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/parallel.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr int64_t kRowBlock = 64;

// Every block of rows meets the same Hessians.
std::vector<DeviceCopy> HessianCopies(const FittingProblem& problem) {
  std::vector<DeviceCopy> copies;
  copies.reserve(problem.streams.size());
  for (const StreamProblem& stream : problem.streams) copies.emplace_back(stream.hessian);
  return copies;
}

int64_t NumBlocks(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

// What all blocks of rows share.
struct SharedByRows {
  FeedbackPlan plan;                            // empty where codes are not chosen jointly
  std::vector<std::vector<double>> group_sums;  // of each stream's Hessian
};

void Refit(const FittingProblem& problem, const SharedByRows& shared, double ridge, int64_t begin,
           int64_t count, NestedWeight& weight) {
  const LevelGradients gradients = Gradients(problem, weight, begin, count);
  for (int level = 1; level <= kNumLevels; ++level) {
    RefitLevel(problem.stream(level).hessian, shared.group_sums[problem.stream_of_level[level - 1]],
               level, begin, gradients.Fetch(level), ridge, weight);
  }
}

void FitRows(const FittingProblem& problem, const LinearFitOptions& options,
             const SharedByRows& shared, int64_t begin, int64_t count, NestedWeight& weight) {
  FitBase(problem, options.base, begin, count, weight);
  if (options.joint_codes) ChooseJointCodes(problem, shared.plan, begin, count, weight);
  if (options.joint_codes || options.rounds > 0) {
    Refit(problem, shared, options.ridge, begin, count, weight);
  }
  for (int round = 0; round < options.rounds; ++round) {
    LevelGradients gradients = Gradients(problem, weight, begin, count);
    for (int pass = 0; pass < options.passes; ++pass) {
      if (DescendCodes(problem, begin, count, gradients, weight) == 0) break;
    }
    Refit(problem, shared, options.ridge, begin, count, weight);
  }
}

}  // namespace

absl::StatusOr<NestedWeight> FitLinear(const FittingProblem& problem,
                                       const LinearFitOptions& options, int num_threads) {
  SharedByRows shared;
  if (options.joint_codes) {
    MOBI_ASSIGN_OR_RETURN(shared.plan, PlanFeedback(problem, num_threads));
  }
  for (const StreamProblem& stream : problem.streams) {
    shared.group_sums.push_back(GroupSums(stream.hessian, num_threads));
  }
  std::vector<DeviceCopy> copies = HessianCopies(problem);
  for (const Matrix& factor : shared.plan.factors) copies.emplace_back(factor);
  NestedWeight weight(problem.rows(), problem.cols());
  ParallelFor(num_threads, NumBlocks(problem.rows()), [&](int64_t block) {
    const int64_t begin = block * kRowBlock;
    FitRows(problem, options, shared, begin, std::min(kRowBlock, problem.rows() - begin), weight);
  });
  return weight;
}

std::array<double, kNumLevels> LevelLosses(const FittingProblem& problem,
                                           const NestedWeight& weight, int num_threads) {
  const std::vector<DeviceCopy> copies = HessianCopies(problem);
  const int64_t blocks = NumBlocks(problem.rows());
  std::vector<std::array<double, kNumLevels>> parts(static_cast<size_t>(blocks));
  ParallelFor(num_threads, blocks, [&](int64_t block) {
    const int64_t begin = block * kRowBlock, count = std::min(kRowBlock, problem.rows() - begin);
    const LevelGradients gradients = Gradients(problem, weight, begin, count);
    for (int level = 1; level <= kNumLevels; ++level) {
      parts[block][level - 1] = LevelLoss(problem, weight, level, begin, gradients.Fetch(level));
    }
  });
  std::array<double, kNumLevels> losses{};
  for (const auto& part : parts) {
    for (int k = 0; k < kNumLevels; ++k) losses[k] += part[k];
  }
  return losses;
}

}  // namespace mobi
