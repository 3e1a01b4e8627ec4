#include "calibrator/block_calibration.h"

#include <algorithm>
#include <optional>
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
// Tokens that go into the sums at once.
constexpr int64_t kTokensAtOnce = 16384;

// sums[j] += the squares of column j, in the order of the rows.
void AddSquares(ConstMatrixView x, int num_threads, std::vector<double>& sums) {
  ParallelFor(num_threads, (x.cols + kGroupSize - 1) / kGroupSize, [&](int64_t group) {
    const int64_t first = group * kGroupSize, count = std::min<int64_t>(kGroupSize, x.cols - first);
    for (int64_t t = 0; t < x.rows; ++t) {
      const float* row = x.Row(t) + first;
      for (int64_t j = 0; j < count; ++j) sums[first + j] += row[j] * row[j];
    }
  });
}

bool AddsToResidual(LinearGroup group) {
  return group == LinearGroup::kO || group == LinearGroup::kDown;
}

// What fitting a group needs of all tokens of one stream's inputs.
struct InputSums {
  StreamStatistics statistics;
  std::vector<double> squares;  // of each column; of the float stream alone

  InputSums(int64_t cols, int64_t residual_rows)
      : statistics(cols, residual_rows), squares(static_cast<size_t>(cols)) {}
  void Add(const InputSums& more) {
    statistics.Add(more.statistics);
    for (size_t j = 0; j < squares.size(); ++j) squares[j] += more.squares[j];
  }
};

// Where one linear group's inputs and, for o and down, its place in the residual stream are.
class BlockPass {
 public:
  // `fits`: a Problem will be asked of every group.
  BlockPass(const ModelConfig& config, const BlockWeights& weights, const RopeValues& rope,
            const BlockCalibrationOptions& options, CalibrationStreams& streams, bool fits)
      : config_(config),
        weights_(weights),
        rope_(rope),
        options_(options),
        streams_(streams),
        fits_(fits),
        inputs_(1 + streams.hidden.size()) {}

  // Computes every stream's input of `group` from the group before it, whose fit is `previous`;
  // the float residual stream is taken behind `group` at once, for the others to aim at.
  void Advance(LinearGroup group, const NestedWeight* previous);
  // Adds the fitted down projection's output to the residual streams.
  void Finish(const NestedWeight& down);
  // Once for each group.
  absl::StatusOr<FittingProblem> Problem(LinearGroup group);

 private:
  // Adds tokens [first, first + count), whole sequences, to `sums`, on `threads` threads.
  using AddTokens =
      absl::FunctionRef<void(int64_t first, int64_t count, int threads, InputSums& sums)>;
  InputSums Sum(int64_t cols, int64_t residual_rows, AddTokens add) const;
  InputSums FloatSums(int64_t cols) const;
  InputSums StreamSums(int64_t stream, int64_t cols, int64_t residual_rows) const;
  void AddFloat(ConstMatrixView input, int threads, InputSums& sums) const;
  // Takes the float stream through down a few sequences at a time. Its inputs are as wide as three
  // others and nothing needs them afterwards, so only their sums are kept.
  void AdvanceFloatDown();
  int64_t num_streams() const { return static_cast<int64_t>(inputs_.size()); }
  int64_t num_sequences() const { return streams_.float_hidden.rows() / streams_.seq_len; }
  bool fits_float() const { return options_.float_from_level <= kNumLevels; }
  // Stream 0 is the float model.
  Matrix& Hidden(int64_t s) { return s == 0 ? streams_.float_hidden : streams_.hidden[s - 1]; }
  // The stream's rows of a sequence.
  MatrixView HiddenOf(int64_t stream, int64_t sequence) {
    return MatrixView(Hidden(stream)).Rows(sequence * streams_.seq_len, streams_.seq_len);
  }
  ConstMatrixView InputOf(int64_t stream, int64_t sequence) const {
    return ConstMatrixView(inputs_[stream]).Rows(sequence * streams_.seq_len, streams_.seq_len);
  }
  void AdvanceSequence(LinearGroup group, int64_t stream, int64_t sequence, const Matrix* weight,
                       MatrixView out);
  // Adds what `weight` makes of the stream's inputs to its residual.
  void AddOutput(const Matrix& weight, int64_t stream);

  const ModelConfig& config_;
  const BlockWeights& weights_;
  const RopeValues& rope_;
  const BlockCalibrationOptions& options_;
  CalibrationStreams& streams_;
  const bool fits_;
  std::vector<Matrix> inputs_;  // of the current group, [tokens, cols]; at down not the float ones
  std::optional<InputSums> float_down_;  // their sums
};

// `weight` is that of the group before, whose inputs inputs_ still holds.
void BlockPass::AdvanceSequence(LinearGroup group, int64_t stream, int64_t sequence,
                                const Matrix* weight, MatrixView out) {
  const int64_t length = streams_.seq_len;
  const MatrixView hidden = HiddenOf(stream, sequence);
  switch (group) {
    case LinearGroup::kQkv:
      RmsNorm(hidden, weights_.input_norm, config_.rms_norm_eps, out);
      break;
    case LinearGroup::kO: {
      Matrix qkv = Matrix::Unfilled(length, weight->rows());
      MultiplyTransposed(InputOf(stream, sequence), *weight, qkv);
      Attend({config_, rope_, length}, qkv, out);
      break;
    }
    case LinearGroup::kGateUp:
      if (stream > 0) MultiplyTransposed(InputOf(stream, sequence), *weight, hidden, 1, 1);
      RmsNorm(hidden, weights_.post_attention_norm, config_.rms_norm_eps, out);
      break;
    case LinearGroup::kDown: {
      DeviceMatrix gate_up = DeviceMatrix::Unfilled(length, weight->rows());
      MultiplyTransposed(InputOf(stream, sequence), *weight, gate_up);
      SwiGlu(gate_up, out);
      break;
    }
  }
}

void BlockPass::AdvanceFloatDown() {
  const Matrix& gate_up = weights_.of(LinearGroup::kGateUp);
  const Matrix& down = weights_.of(LinearGroup::kDown);
  const DeviceCopy gate_up_copy(gate_up), down_copy(down);
  const int64_t length = streams_.seq_len;
  float_down_ =
      Sum(down.cols(), 0, [&](int64_t first, int64_t count, int threads, InputSums& sums) {
        DeviceMatrix input = DeviceMatrix::Unfilled(count, down.cols());
        ParallelFor(threads, count / length, [&](int64_t i) {
          const int64_t sequence = first / length + i;
          const MatrixView rows = MatrixView(input).Rows(i * length, length);
          AdvanceSequence(LinearGroup::kDown, 0, sequence, &gate_up, rows);
          MultiplyTransposed(rows, down, HiddenOf(0, sequence), 1, 1);
          if (fits_) input.FetchRows(i * length, length);  // whose squares the host sums
        });
        if (fits_) AddFloat(input, threads, sums);
      });
  inputs_[0] = Matrix();
}

void BlockPass::Advance(LinearGroup group, const NestedWeight* previous) {
  const int64_t cols = weights_.of(group).cols();
  for (int64_t s = 0; s < num_streams(); ++s) {
    if (group == LinearGroup::kDown && s == 0) {
      AdvanceFloatDown();
      continue;
    }
    Matrix dequantized;
    const Matrix* weight = nullptr;
    if (previous != nullptr) {
      weight = &weights_.linear[static_cast<int>(group) - 1];
      if (s > 0) {
        dequantized = Dequantize(*previous, options_.stream_levels[s - 1], options_.num_threads);
        weight = &dequantized;
      }
    }
    const DeviceCopy copy = weight != nullptr ? DeviceCopy(*weight) : DeviceCopy();
    Matrix out = Matrix::Unfilled(streams_.float_hidden.rows(), cols);
    ParallelFor(options_.num_threads, num_sequences(), [&](int64_t sequence) {
      AdvanceSequence(group, s, sequence, weight,
                      MatrixView(out).Rows(sequence * streams_.seq_len, streams_.seq_len));
    });
    inputs_[s] = std::move(out);
  }
  if (group == LinearGroup::kO) AddOutput(weights_.of(group), 0);
}

void BlockPass::AddOutput(const Matrix& weight, int64_t stream) {
  const DeviceCopy copy(weight);
  ParallelFor(options_.num_threads, num_sequences(), [&](int64_t sequence) {
    MultiplyTransposed(InputOf(stream, sequence), weight, HiddenOf(stream, sequence), 1, 1);
  });
}

void BlockPass::Finish(const NestedWeight& down) {
  for (int64_t s = 1; s < num_streams(); ++s) {
    AddOutput(Dequantize(down, options_.stream_levels[s - 1], options_.num_threads), s);
  }
}

// Tokens are summed in a fixed number of parts, so that sums do not depend on the threads. Wide
// inputs are summed in one part: its matrices are large, and its products keep every thread busy.
InputSums BlockPass::Sum(int64_t cols, int64_t residual_rows, AddTokens add) const {
  const int64_t length = streams_.seq_len;
  const int64_t parts = cols > kPartedCols ? 1 : std::min(kStatisticsParts, num_sequences());
  const int threads = parts == 1 ? options_.num_threads : 1;
  const int64_t at_once = std::max<int64_t>(1, kTokensAtOnce / length) * length;
  std::vector<InputSums> sums;
  for (int64_t part = 0; part < parts; ++part) {
    sums.emplace_back(fits_ ? cols : 0, residual_rows);
  }
  ParallelFor(options_.num_threads, parts, [&](int64_t part) {
    const int64_t end = (part + 1) * num_sequences() / parts * length;
    int64_t count = 0;
    for (int64_t first = part * num_sequences() / parts * length; first < end; first += count) {
      count = std::min(at_once, end - first);
      add(first, count, threads, sums[part]);
    }
  });
  for (int64_t part = 1; part < parts; ++part) sums[0].Add(sums[part]);
  return std::move(sums[0]);
}

void BlockPass::AddFloat(ConstMatrixView input, int threads, InputSums& sums) const {
  AddSquares(input, threads, sums.squares);
  if (fits_float()) sums.statistics.Add(input);
}

InputSums BlockPass::FloatSums(int64_t cols) const {
  return Sum(cols, 0, [&](int64_t first, int64_t count, int threads, InputSums& sums) {
    AddFloat(ConstMatrixView(inputs_[0]).Rows(first, count), threads, sums);
  });
}

InputSums BlockPass::StreamSums(int64_t stream, int64_t cols, int64_t residual_rows) const {
  return Sum(cols, residual_rows, [&](int64_t first, int64_t count, int threads, InputSums& sums) {
    const ConstMatrixView input = ConstMatrixView(inputs_[stream]).Rows(first, count);
    const DeviceCopy copy(input, threads);  // for both products
    if (residual_rows == 0) {
      sums.statistics.Add(input, ConstMatrixView(inputs_[0]).Rows(first, count));
      return;
    }
    Matrix wanted = Matrix::Unfilled(count, residual_rows);
    ParallelFor(threads, count, [&](int64_t i) {
      std::copy_n(streams_.float_hidden.Row(first + i), residual_rows, wanted.Row(i));
      AddScaled(wanted.Row(i), streams_.hidden[stream - 1].Row(first + i), -1, residual_rows);
    });
    sums.statistics.AddWanted(input, wanted);
  });
}

absl::StatusOr<FittingProblem> BlockPass::Problem(LinearGroup group) {
  FittingProblem problem;
  problem.weight = weights_.of(group);
  const int64_t cols = problem.cols();
  const InputSums of_float =
      group == LinearGroup::kDown ? *std::exchange(float_down_, std::nullopt) : FloatSums(cols);
  for (const double sum : of_float.squares) {
    problem.importance.push_back(
        static_cast<float>(sum / static_cast<double>(streams_.float_hidden.rows())));
  }
  const auto add_stream = [&](const InputSums& sums) -> absl::Status {
    MOBI_ASSIGN_OR_RETURN(
        problem.streams.emplace_back(),
        sums.statistics.Problem(problem.weight, options_.damping, options_.num_threads));
    return absl::OkStatus();
  };
  for (int64_t s = 1; s < num_streams(); ++s) {
    const int64_t residual_rows = AddsToResidual(group) ? problem.rows() : 0;
    MOBI_RETURN_IF_ERROR(add_stream(StreamSums(s, cols, residual_rows)));
  }
  if (fits_float()) MOBI_RETURN_IF_ERROR(add_stream(of_float));
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
  BlockPass pass(config, weights, rope, options, streams, /*fits=*/true);
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
  BlockPass pass(config, weights, rope, options, streams, /*fits=*/false);
  for (int g = 0; g < kNumLinearGroups; ++g) {
    pass.Advance(static_cast<LinearGroup>(g), g == 0 ? nullptr : &fitted.linear[g - 1]);
  }
  pass.Finish(fitted.linear.back());
}

}  // namespace mobi
