#include "calibrator/block_calibration.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/parallel.h"
#include "calibrator/statistics.h"
#include "calibrator/vector_math.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr int64_t kStatisticsParts = 16, kPartedCols = 4096;
// Tokens that go into the sums at once: enough to be worth moving the sums to a device and back.
constexpr int64_t kTokensAtOnce = 16384;

std::vector<float> MeanSquares(ConstMatrixView x, int num_threads) {
  std::vector<float> means(static_cast<size_t>(x.cols));
  ParallelFor(num_threads, (x.cols + kGroupSize - 1) / kGroupSize, [&](int64_t group) {
    const int64_t first = group * kGroupSize, count = std::min<int64_t>(kGroupSize, x.cols - first);
    double sums[kGroupSize] = {};
    for (int64_t t = 0; t < x.rows; ++t) {
      const float* row = x.Row(t) + first;
      for (int64_t j = 0; j < count; ++j) sums[j] += row[j] * row[j];
    }
    for (int64_t j = 0; j < count; ++j) {
      means[first + j] = static_cast<float>(sums[j] / static_cast<double>(x.rows));
    }
  });
  return means;
}

bool AddsToResidual(LinearGroup group) {
  return group == LinearGroup::kO || group == LinearGroup::kDown;
}

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

  // Computes every stream's input of `group` from the group before it, whose fit is `previous`;
  // the float residual stream is taken behind `group` at once, for the others to aim at.
  void Advance(LinearGroup group, const NestedWeight* previous);
  // Adds the fitted down projection's output to the residual streams.
  void Finish(const NestedWeight& down);
  absl::StatusOr<FittingProblem> Problem(LinearGroup group) const;

 private:
  StreamStatistics Statistics(int64_t stream, int64_t cols, int64_t residual_rows) const;
  int64_t num_streams() const { return static_cast<int64_t>(inputs_.size()); }
  int64_t num_sequences() const { return streams_.float_hidden.rows() / streams_.seq_len; }
  // Stream 0 is the float model.
  Matrix& Hidden(int64_t s) { return s == 0 ? streams_.float_hidden : streams_.hidden[s - 1]; }
  void AdvanceSequence(LinearGroup group, int64_t stream, int64_t sequence, const Matrix* weight,
                       ConstMatrixView input, MatrixView out);
  // Adds what `weight` makes of the stream's inputs to its residual.
  void AddOutput(const Matrix& weight, int64_t stream);

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
      if (stream > 0) MultiplyTransposed(input, *weight, hidden, 1, 1);
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
    const DeviceCopy copy = weight != nullptr ? DeviceCopy(*weight) : DeviceCopy();
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
  if (AddsToResidual(group)) AddOutput(weights_.of(group), 0);
}

void BlockPass::AddOutput(const Matrix& weight, int64_t stream) {
  const int64_t length = streams_.seq_len;
  const DeviceCopy copy(weight);
  ParallelFor(options_.num_threads, num_sequences(), [&](int64_t sequence) {
    MultiplyTransposed(ConstMatrixView(inputs_[stream]).Rows(sequence * length, length), weight,
                       MatrixView(Hidden(stream)).Rows(sequence * length, length), 1, 1);
  });
}

void BlockPass::Finish(const NestedWeight& down) {
  for (int64_t s = 1; s < num_streams(); ++s) {
    AddOutput(Dequantize(down, options_.stream_levels[s - 1]), s);
  }
}

// Tokens are summed in a fixed number of parts, so that sums do not depend on the threads. Wide
// inputs are summed in one part: its matrices are large, and its products keep every thread busy.
StreamStatistics BlockPass::Statistics(int64_t stream, int64_t cols, int64_t residual_rows) const {
  const int64_t length = streams_.seq_len;
  const int64_t parts = cols > kPartedCols ? 1 : std::min(kStatisticsParts, num_sequences());
  std::vector<StreamStatistics> sums(static_cast<size_t>(parts),
                                     StreamStatistics(cols, residual_rows));
  ParallelFor(options_.num_threads, parts, [&](int64_t part) {
    const int64_t end = (part + 1) * num_sequences() / parts * length;
    int64_t count = 0;
    for (int64_t first = part * num_sequences() / parts * length; first < end; first += count) {
      count = std::min(kTokensAtOnce, end - first);
      const ConstMatrixView input = ConstMatrixView(inputs_[stream]).Rows(first, count);
      if (stream == 0) {
        sums[part].Add(input);
      } else if (residual_rows == 0) {
        sums[part].Add(input, ConstMatrixView(inputs_[0]).Rows(first, count));
      } else {
        Matrix wanted(count, residual_rows);
        std::copy_n(streams_.float_hidden.Row(first), wanted.size(), wanted.data());
        AddScaled(wanted.data(), streams_.hidden[stream - 1].Row(first), -1, wanted.size());
        sums[part].AddWanted(input, wanted);
      }
    }
  });
  for (int64_t part = 1; part < parts; ++part) sums[0].Add(sums[part]);
  return std::move(sums[0]);
}

absl::StatusOr<FittingProblem> BlockPass::Problem(LinearGroup group) const {
  FittingProblem problem;
  problem.weight = weights_.of(group);
  const int64_t cols = problem.cols();
  problem.importance = MeanSquares(inputs_[0], options_.num_threads);
  const auto add_stream = [&](int64_t stream, int64_t residual_rows) -> absl::Status {
    const StreamStatistics statistics = Statistics(stream, cols, residual_rows);
    MOBI_ASSIGN_OR_RETURN(problem.streams.emplace_back(),
                          statistics.Problem(problem.weight, options_.damping));
    return absl::OkStatus();
  };
  for (int64_t s = 1; s < num_streams(); ++s) {
    MOBI_RETURN_IF_ERROR(add_stream(s, AddsToResidual(group) ? problem.rows() : 0));
  }
  if (options_.float_from_level <= kNumLevels) MOBI_RETURN_IF_ERROR(add_stream(0, 0));
  problem.level_weights = options_.level_weights;
  for (int level = 1; level <= kNumLevels; ++level) {
    int& stream = problem.stream_of_level[level - 1];
    if (level >= options_.float_from_level) {
      stream = static_cast<int>(problem.streams.size()) - 1;
      continue;
    }
    for (size_t s = 0; s < options_.stream_levels.size(); ++s) {
      if (options_.stream_levels[s] <= level) stream = static_cast<int>(s);
    }
  }
  return problem;
}

// The paper's way: the base slice learns from what level 1 left of the inputs, the joint epochs
// from the last stream's level.
absl::StatusOr<FittedBlock> ClipBlock(const ModelConfig& config, const BlockWeights& weights,
                                      const RopeValues& rope,
                                      const BlockCalibrationOptions& options,
                                      CalibrationStreams& streams, PartCallback on_part) {
  const BlockContext context{config, rope, streams.seq_len};
  Matrix target = streams.float_hidden;
  ParallelFor(options.num_threads, target.rows() / streams.seq_len, [&](int64_t sequence) {
    ForwardBlock(context, weights,
                 MatrixView(target).Rows(sequence * streams.seq_len, streams.seq_len));
  });
  const double epochs = options.clipping.base_epochs + options.clipping.joint_epochs;
  MOBI_ASSIGN_OR_RETURN(
      FittedBlock fitted,
      LearnClipping(context, weights, {streams.hidden.front(), streams.hidden.back(), target},
                    options.clipping, [&](const std::string& epoch, double error) {
                      return on_part(absl::StrCat(epoch, " error ", absl::SixDigits(error)),
                                     1 / epochs);
                    }));
  AdvanceStreams(config, weights, rope, options, fitted, streams);
  return fitted;
}

}  // namespace

absl::StatusOr<FittedBlock> CalibrateBlock(const ModelConfig& config, const BlockWeights& weights,
                                           const RopeValues& rope,
                                           const BlockCalibrationOptions& options,
                                           CalibrationStreams& streams, PartCallback on_part) {
  const bool fixed = options.fixed.method != FixedMethod::kNone;
  if (!fixed && options.fit.base.method == BaseMethod::kClipping) {
    return ClipBlock(config, weights, rope, options, streams, on_part);
  }
  constexpr const char* kNames[] = {"qkv", "o", "gate_up", "down"};
  BlockPass pass(config, weights, rope, options, streams);
  FittedBlock fitted;
  const NestedWeight* previous = nullptr;
  for (int g = 0; g < kNumLinearGroups; ++g) {
    const auto group = static_cast<LinearGroup>(g);
    pass.Advance(group, previous);
    MOBI_ASSIGN_OR_RETURN(const FittingProblem problem, pass.Problem(group));
    MOBI_ASSIGN_OR_RETURN(fitted.linear[g],
                          fixed ? FitFixedWidth(problem, options.fixed, options.num_threads)
                                : FitLinear(problem, options.fit, options.num_threads));
    const auto losses = LevelLosses(problem, fitted.linear[g], options.num_threads);
    MOBI_RETURN_IF_ERROR(
        on_part(absl::StrCat(kNames[g], " loss ", absl::SixDigits(losses[0]), " ",
                             absl::SixDigits(losses[1]), " ", absl::SixDigits(losses[2]), " ",
                             absl::SixDigits(losses[3])),
                1.0 / kNumLinearGroups));
    previous = &fitted.linear[g];
  }
  pass.Finish(*previous);
  return fitted;
}

void AdvanceStreams(const ModelConfig& config, const BlockWeights& weights, const RopeValues& rope,
                    const BlockCalibrationOptions& options, const FittedBlock& fitted,
                    CalibrationStreams& streams) {
  BlockPass pass(config, weights, rope, options, streams);
  for (int g = 0; g < kNumLinearGroups; ++g) {
    pass.Advance(static_cast<LinearGroup>(g), g == 0 ? nullptr : &fitted.linear[g - 1]);
  }
  pass.Finish(fitted.linear.back());
}

}  // namespace mobi
