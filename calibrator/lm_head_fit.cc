#include "calibrator/lm_head_fit.h"

#include <algorithm>
#include <cmath>

#include "calibrator/linear_algebra.h"
#include "calibrator/linear_fit.h"
#include "calibrator/mixed_linear.h"
#include "calibrator/parallel.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr int64_t kPieceRows = 8192;
constexpr int64_t kMeasuredTokens = 2048;

// Moves a sum of exp(logit - max) to a max that holds for `logits`, too.
void RaiseMax(const float* logits, int64_t count, double& max, double& sum, double* other) {
  const double raised = std::max(max, double{*std::max_element(logits, logits + count)});
  const double factor = std::exp(max - raised);
  max = raised;
  sum *= factor;
  if (other != nullptr) *other *= factor;
}

}  // namespace

void LogitDivergence::Add(ConstMatrixView float_logits, ConstMatrixView logits, int num_threads) {
  ParallelFor(num_threads, logits.rows, [&](int64_t t) {
    Sums& s = sums_[t];
    const float* p = float_logits.Row(t);
    const float* q = logits.Row(t);
    RaiseMax(p, logits.cols, s.float_max, s.float_sum, &s.difference);
    RaiseMax(q, logits.cols, s.max, s.sum, nullptr);
    for (int64_t i = 0; i < logits.cols; ++i) {
      const double weight = std::exp(p[i] - s.float_max);
      s.float_sum += weight;
      s.difference += weight * (double{p[i]} - q[i]);
      s.sum += std::exp(q[i] - s.max);
    }
  });
}

double LogitDivergence::Mean() const {
  double total = 0;
  for (const Sums& s : sums_) {
    const double log_float = std::log(s.float_sum) + s.float_max;
    total += s.difference / s.float_sum - log_float + std::log(s.sum) + s.max;
  }
  // Rounding must not make it negative.
  return std::max(total / static_cast<double>(sums_.size()), 0.0);
}

absl::StatusOr<Matrix> QuantizedHidden(const FloatModel& model,
                                       const std::vector<FittedBlock>& blocks,
                                       absl::Span<const int32_t> ids, int64_t seq_len,
                                       const RoutingSampleOptions& options) {
  const auto tokens = static_cast<int64_t>(ids.size());
  const auto segments = SegmentRows(model.config());
  Matrix hidden(tokens, model.config().hidden_size);
  model.Embed(ids, hidden);
  for (int layer = 0; layer < model.num_layers(); ++layer) {
    MOBI_ASSIGN_OR_RETURN(const BlockWeights weights, model.LoadBlock(layer));
    std::vector<MixedLinear> mixed;
    mixed.reserve(kNumLinearGroups);
    for (int g = 0; g < kNumLinearGroups; ++g) {
      mixed.emplace_back(blocks[layer].linear[g], segments[g], options.num_threads);
    }
    ParallelFor(options.num_threads, tokens / seq_len, [&](int64_t sequence) {
      const auto linear = [&](LinearGroup group, ConstMatrixView x, MatrixView out) {
        const auto g = static_cast<size_t>(group);
        const auto levels =
            DrawLevels({options.seed + static_cast<uint64_t>(sequence) * 1000003,
                        static_cast<uint64_t>(layer), g},
                       options.level_shares, segments[g].size() * static_cast<size_t>(seq_len));
        mixed[g].Forward(x, levels.data(), out);
      };
      BlockTrace trace;
      TraceBlock({model.config(), model.rope(), seq_len}, weights, linear,
                 MatrixView(hidden).Rows(sequence * seq_len, seq_len), trace);
    });
  }
  return hidden;
}

LmHeadFit::LmHeadFit(const FloatModel& model, const LmHeadOptions& options,
                     const BlockCalibrationOptions& blocks, const Matrix& inputs)
    : head_(model.head()),
      options_(blocks),
      statistics_(inputs.cols(), 0),
      samples_(std::min(kMeasuredTokens, inputs.rows()), inputs.cols()),
      weight_(head_.rows(), head_.cols()),
      divergence_(kNumLevels, LogitDivergence(samples_.rows())) {
  statistics_.Add(inputs);
  for (int64_t i = 0; i < samples_.rows(); ++i) {
    std::copy_n(inputs.Row(i * inputs.rows() / samples_.rows()), inputs.cols(), samples_.Row(i));
  }
  // Levels that nobody reads have no say in the codes.
  for (int level = 1; level < options.min_level; ++level) {
    options_.level_weights[level - 1] = options_.fit.base.level_weights[level - 1] = 0;
  }
}

int LmHeadFit::num_pieces() const {
  return static_cast<int>((head_.rows() + kPieceRows - 1) / kPieceRows);
}

int64_t LmHeadFit::PieceRows(int piece) const {
  return std::min(kPieceRows, head_.rows() - piece * kPieceRows);
}

Matrix LmHeadFit::FloatRows(int piece) const {
  Matrix rows(PieceRows(piece), head_.cols());
  std::copy_n(head_.Row(piece * kPieceRows), rows.size(), rows.data());
  return rows;
}

absl::StatusOr<NestedWeight> LmHeadFit::Fit(int piece) const {
  FittingProblem problem;
  problem.weight = FloatRows(piece);
  MOBI_ASSIGN_OR_RETURN(
      problem.streams.emplace_back(),
      statistics_.Problem(problem.weight, options_.damping, options_.num_threads));
  for (int64_t j = 0; j < problem.cols(); ++j) {
    problem.importance.push_back(problem.streams[0].hessian(j, j));
  }
  problem.level_weights = options_.level_weights;
  return FitLinear(problem, options_.fit, options_.num_threads);
}

void LmHeadFit::Take(int piece, const NestedWeight& weight) {
  const int64_t rows = PieceRows(piece), begin = piece * kPieceRows;
  std::copy_n(weight.Codes(0), rows * weight.cols, weight_.Codes(begin));
  for (int k = 0; k < kNumLevels; ++k) {
    std::copy(weight.scales[k].begin(), weight.scales[k].end(),
              weight_.scales[k].begin() + begin * weight.groups());
  }
  Matrix float_logits(samples_.rows(), rows), logits(samples_.rows(), rows);
  MultiplyTransposed(samples_, ConstMatrixView(head_).Rows(begin, rows), float_logits);
  for (int level = 1; level <= kNumLevels; ++level) {
    MultiplyTransposed(samples_, Dequantize(weight, level, options_.num_threads), logits);
    divergence_[level - 1].Add(float_logits, logits, options_.num_threads);
  }
}

std::array<double, kNumLevels> LmHeadFit::Losses() const {
  std::array<double, kNumLevels> losses;
  for (int k = 0; k < kNumLevels; ++k) losses[k] = divergence_[k].Mean();
  return losses;
}

}  // namespace mobi
