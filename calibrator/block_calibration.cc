#include "calibrator/block_calibration.h"

#include <utility>

#include "calibrator/linear_algebra.h"
#include "calibrator/parallel.h"
#include "calibrator/statistics.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

// Where one linear group's inputs and, for o and down, its place in the residual stream are.
class BlockPass {
 public:
  BlockPass(const ModelConfig& config, const BlockWeights& weights, const RopeValues& rope,
            const BlockCalibrationOptions& options, CalibrationStreams& streams)
      : config_(config),
        weights_(weights),
        rope_(rope),
        options_(options),
        streams_(streams),
        inputs_(1 + streams.hidden.size()) {}

  // Computes every stream's input of `group` from the group before it, whose fit is `previous`.
  void Advance(LinearGroup group, const NestedWeight* previous);
  // Adds the fitted down projection's output to the residual streams.
  void Finish(const NestedWeight& down);
  absl::StatusOr<FittingProblem> Problem(LinearGroup group) const;

 private:
  int64_t num_streams() const { return static_cast<int64_t>(inputs_.size()); }
  int64_t num_sequences() const { return streams_.float_hidden.rows() / streams_.seq_len; }
  // Stream 0 is the float model.
  Matrix& Hidden(int64_t s) { return s == 0 ? streams_.float_hidden : streams_.hidden[s - 1]; }
  void AdvanceSequence(LinearGroup group, int64_t stream, int64_t sequence, const Matrix* weight,
                       ConstMatrixView input, MatrixView out);

  const ModelConfig& config_;
  const BlockWeights& weights_;
  const RopeValues& rope_;
  const BlockCalibrationOptions& options_;
  CalibrationStreams& streams_;
  std::vector<Matrix> inputs_;  // of the current group, [tokens, cols]
};

void BlockPass::AdvanceSequence(LinearGroup group, int64_t stream, int64_t sequence,
                                const Matrix* weight, ConstMatrixView input, MatrixView out) {
  const int64_t length = streams_.seq_len;
  const MatrixView hidden = MatrixView(Hidden(stream)).Rows(sequence * length, length);
  switch (group) {
    case LinearGroup::kQkv:
      RmsNorm(hidden, weights_.input_norm, config_.rms_norm_eps, out);
      break;
    case LinearGroup::kO: {
      Matrix qkv(length, weight->rows());
      MultiplyTransposed(input, *weight, qkv);
      Rotate(config_, rope_, length, qkv);
      CausalAttention(config_, qkv, out);
      break;
    }
    case LinearGroup::kGateUp:
      MultiplyTransposed(input, *weight, hidden, 1, 1);
      RmsNorm(hidden, weights_.post_attention_norm, config_.rms_norm_eps, out);
      break;
    case LinearGroup::kDown: {
      Matrix gate_up(length, weight->rows());
      MultiplyTransposed(input, *weight, gate_up);
      SwiGlu(gate_up, out);
      break;
    }
  }
}

void BlockPass::Advance(LinearGroup group, const NestedWeight* previous) {
  const int64_t cols = weights_.of(group).cols(), length = streams_.seq_len;
  for (int64_t s = 0; s < num_streams(); ++s) {
    Matrix dequantized;
    const Matrix* weight = nullptr;
    if (previous != nullptr) {
      weight = &weights_.linear[static_cast<int>(group) - 1];
      if (s > 0) {
        dequantized = Dequantize(*previous, options_.stream_levels[s - 1]);
        weight = &dequantized;
      }
    }
    Matrix out(streams_.float_hidden.rows(), cols);
    ParallelFor(options_.num_threads, num_sequences(), [&](int64_t sequence) {
      ConstMatrixView input;
      if (previous != nullptr) {
        input = ConstMatrixView(inputs_[s]).Rows(sequence * length, length);
      }
      AdvanceSequence(group, s, sequence, weight, input,
                      MatrixView(out).Rows(sequence * length, length));
    });
    inputs_[s] = std::move(out);
  }
}

void BlockPass::Finish(const NestedWeight& down) {
  for (int64_t s = 0; s < num_streams(); ++s) {
    const Matrix dequantized = s == 0 ? Matrix() : Dequantize(down, options_.stream_levels[s - 1]);
    const Matrix& weight = s == 0 ? weights_.of(LinearGroup::kDown) : dequantized;
    MultiplyTransposed(inputs_[s], weight, Hidden(s), 1, 1);
  }
}

absl::StatusOr<FittingProblem> BlockPass::Problem(LinearGroup group) const {
  FittingProblem problem;
  problem.weight = weights_.of(group);
  const bool residual = group == LinearGroup::kO || group == LinearGroup::kDown;
  const int64_t length = streams_.seq_len, cols = problem.cols();
  Matrix float_gram(cols, cols);
  AddGram(inputs_[0], float_gram, 1.0f / static_cast<float>(inputs_[0].rows()));
  for (int64_t j = 0; j < cols; ++j) problem.importance.push_back(float_gram(j, j));
  for (int64_t s = 1; s < num_streams(); ++s) {
    StreamStatistics statistics(cols, residual ? problem.rows() : 0);
    Matrix gap(residual ? length : 0, problem.rows());
    for (int64_t first = 0; first < inputs_[s].rows(); first += length) {
      for (int64_t i = 0; i < gap.size(); ++i) {
        const int64_t at = first * config_.hidden_size + i;
        gap.data()[i] = streams_.float_hidden.data()[at] - streams_.hidden[s - 1].data()[at];
      }
      statistics.Add(ConstMatrixView(inputs_[s]).Rows(first, length),
                     ConstMatrixView(inputs_[0]).Rows(first, length), gap);
    }
    MOBI_ASSIGN_OR_RETURN(StreamProblem stream,
                          statistics.Problem(problem.weight, options_.damping));
    problem.streams.push_back(std::move(stream));
  }
  problem.level_weights = options_.level_weights;
  for (int level = 1; level <= kNumLevels; ++level) {
    for (size_t s = 0; s < options_.stream_levels.size(); ++s) {
      if (options_.stream_levels[s] <= level) {
        problem.stream_of_level[level - 1] = static_cast<int>(s);
      }
    }
  }
  return problem;
}

}  // namespace

absl::StatusOr<FittedBlock> CalibrateBlock(const ModelConfig& config, const BlockWeights& weights,
                                           const RopeValues& rope,
                                           const BlockCalibrationOptions& options,
                                           CalibrationStreams& streams, GroupCallback on_group) {
  BlockPass pass(config, weights, rope, options, streams);
  FittedBlock fitted;
  const NestedWeight* previous = nullptr;
  for (int g = 0; g < kNumLinearGroups; ++g) {
    const auto group = static_cast<LinearGroup>(g);
    pass.Advance(group, previous);
    MOBI_ASSIGN_OR_RETURN(const FittingProblem problem, pass.Problem(group));
    MOBI_ASSIGN_OR_RETURN(fitted.linear[g], FitLinear(problem, options.fit, options.num_threads));
    on_group(group, LevelLosses(problem, fitted.linear[g], options.num_threads));
    previous = &fitted.linear[g];
  }
  pass.Finish(*previous);
  return fitted;
}

}  // namespace mobi
