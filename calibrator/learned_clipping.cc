#include "calibrator/learned_clipping.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/mixed_linear.h"
#include "calibrator/router_training.h"
#include "calibrator/routing.h"
#include "calibrator/simd.h"
#include "calibrator/vector_math.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint.h"

namespace mobi {
namespace {

constexpr float kFirstLogit = 4;  // nearly the whole range, as published
constexpr float kLeastRange = 1e-7f;

// The trained ends of one group's range: factors of the weights at its ends.
struct Clip {
  std::array<float, 2> end{};  // least and greatest weight
  std::array<float, 2> logit = {kFirstLogit, kFirstLogit};
  std::array<float, 2> gradient{}, first{}, second{};  // at the logits; Adam's moments

  float Value(int side) const { return Sigmoid(logit[side]) * end[side]; }
  LevelScale Range() const {
    const float range = std::max(Value(1) - Value(0), kLeastRange);
    return RoundedScale(range, Value(0) + 0.5f * range);
  }
  void Step(float rate, int step) {
    const float c1 = 1 - std::pow(0.9f, static_cast<float>(step));
    const float c2 = 1 - std::pow(0.999f, static_cast<float>(step));
    for (int p = 0; p < 2; ++p) {
      first[p] = 0.9f * first[p] + 0.1f * gradient[p];
      second[p] = 0.999f * second[p] + 0.001f * gradient[p] * gradient[p];
      logit[p] -= rate * (first[p] / c1) / (std::sqrt(second[p] / c2) + 1e-20f);
      gradient[p] = 0;
    }
  }
};

// By a range's ends, given d at the weights that `level` reads: within the range rounding counts as
// if it were not there, beyond it a weight follows its end.
MOBI_VECTORIZED void AddGroup(const float* w, const uint8_t* codes, const float* d, LevelScale pair,
                              int level, float* by_end) {
  const int shift = kSliceBits * (kNumLevels - level);
  const float scale = 1.0f / static_cast<float>(1 << BitsOfLevel(level));
  const float inverse = pair.range > 0 ? 1 / pair.range : 0.0f;
  float by_low = 0, by_high = 0;
  for (int j = 0; j < kGroupSize; ++j) {
    const float place = (w[j] - pair.offset) * inverse;
    const float read = (static_cast<float>(codes[j] >> shift) + 0.5f) * scale;
    const float within = place >= 0 && place <= 1 ? 1.0f : 0.0f;
    by_high += d[j] * (read - within * place);
    by_low += d[j] * (1 - read - within * (1 - place));
  }
  by_end[0] += by_low;
  by_end[1] += by_high;
}

class ClippingTrainer {
 public:
  ClippingTrainer(const BlockContext& context, const BlockWeights& weights,
                  const ClippingOptions& options)
      : context_(context), weights_(weights), options_(options) {
    const auto groups = RoutedGroupsOfLayer(context.config, 0);
    const auto segments = SegmentRows(context.config);
    for (int g = 0; g < kNumLinearGroups; ++g) {
      const Matrix& weight = weights.linear[g];
      for (int64_t i = 0; i < weight.size(); i += kGroupSize) {
        const auto [min, max] =
            std::minmax_element(weight.data() + i, weight.data() + i + kGroupSize);
        clips_[g].emplace_back().end = {*min, *max};
      }
      block_.linear[g] = NestedWeight(weight.rows(), weight.cols());
      Quantize(g);
      mixed_.emplace_back(block_.linear[g], segments[g]);
      costs_[g] = CostsOf(groups[g]);
    }
  }

  absl::Status Run(const ClippingStreams& streams, ClippingCallback on_epoch);
  FittedBlock Result() && { return std::move(block_); }

 private:
  int64_t length() const { return context_.seq_len; }
  // Codes and pairs of what the clips say now.
  void Quantize(int group);
  std::vector<uint8_t> LevelsOf(int group, ConstMatrixView x) const;
  void Forward(MatrixView hidden, BlockTrace& trace,
               std::array<std::vector<uint8_t>, kNumLinearGroups>& levels) const;
  // One sequence; returns the squared error of its output.
  double Learn(const Matrix& input, const Matrix& target, int64_t sequence);
  void AddGradients(int group, int64_t begin, int level, const Matrix& d_weight);
  void TrainAllGates(const Matrix& input);
  // errors[first + token] of `level`: what it leaves of every segment's output.
  void MeasureErrors(int group, int level, ConstMatrixView x, int64_t first, Matrix& errors) const;
  absl::Status Epoch(const std::string& name, const Matrix& input, const Matrix& target,
                     ClippingCallback on_epoch);

  const BlockContext& context_;
  const BlockWeights& weights_;
  const ClippingOptions& options_;
  std::array<std::vector<Clip>, kNumLinearGroups> clips_;  // [rows, groups]
  FittedBlock block_;
  std::vector<MixedLinear> mixed_;
  std::array<std::vector<SegmentCost>, kNumLinearGroups> costs_;
  std::vector<RouterWeights> gates_;  // per group; empty while the base slice is trained alone
  int steps_ = 0;
};

void ClippingTrainer::Quantize(int group) {
  NestedWeight& nested = block_.linear[group];
  for (int64_t row = 0; row < nested.rows; ++row) {
    for (int64_t g = 0; g < nested.groups(); ++g) {
      const LevelScale pair = clips_[group][row * nested.groups() + g].Range();
      for (int level = 1; level <= kNumLevels; ++level) nested.Scale(level, row, g) = pair;
      EncodeGroup(weights_.linear[group].Row(row) + g * kGroupSize, pair,
                  nested.Codes(row) + g * kGroupSize);
    }
  }
}

std::vector<uint8_t> ClippingTrainer::LevelsOf(int group, ConstMatrixView x) const {
  std::vector<uint8_t> levels(costs_[group].size() * static_cast<size_t>(x.rows), 1);
  if (gates_.empty()) return levels;
  Matrix losses = RouterScores(gates_[group], x);
  for (int64_t i = 0; i < losses.size(); ++i) losses.data()[i] = std::exp(losses.data()[i]);
  ChooseLevels(losses, costs_[group], std::exp(kGateLogPrice), {}, levels.data());
  return levels;
}

void ClippingTrainer::Forward(MatrixView hidden, BlockTrace& trace,
                              std::array<std::vector<uint8_t>, kNumLinearGroups>& levels) const {
  TraceBlock(
      context_, weights_,
      [&](LinearGroup group, ConstMatrixView x, MatrixView out) {
        const int g = static_cast<int>(group);
        levels[g] = LevelsOf(g, x);
        mixed_[g].Forward(x, levels[g].data(), out);
      },
      hidden, trace);
}

void ClippingTrainer::AddGradients(int group, int64_t begin, int level, const Matrix& d_weight) {
  const NestedWeight& nested = block_.linear[group];
  for (int64_t r = 0; r < d_weight.rows(); ++r) {
    const int64_t row = begin + r;
    for (int64_t g = 0; g < nested.groups(); ++g) {
      const int64_t first = g * kGroupSize;
      std::array<float, 2> by_end{};
      AddGroup(weights_.linear[group].Row(row) + first, nested.Codes(row) + first,
               d_weight.Row(r) + first, nested.Scale(level, row, g), level, by_end.data());
      Clip& clip = clips_[group][row * nested.groups() + g];
      for (int p = 0; p < 2; ++p) {
        const float factor = Sigmoid(clip.logit[p]);
        clip.gradient[p] += by_end[p] * clip.end[p] * factor * (1 - factor);
      }
    }
  }
}

double ClippingTrainer::Learn(const Matrix& input, const Matrix& target, int64_t sequence) {
  Matrix hidden(length(), input.cols());
  std::copy_n(input.Row(sequence * length()), hidden.size(), hidden.data());
  BlockTrace trace;
  std::array<std::vector<uint8_t>, kNumLinearGroups> levels;
  Forward(hidden, trace, levels);
  AddScaled(hidden.data(), target.Row(sequence * length()), -1, hidden.size());
  const double error = DotProduct(hidden.data(), hidden.data(), hidden.size());
  Scale(hidden.data(), 2.0f / static_cast<float>(hidden.size()), hidden.size());
  const int top = gates_.empty() ? 1 : kNumLevels;
  BackwardBlock(
      context_, weights_, trace,
      [&](LinearGroup group, ConstMatrixView d_out, MatrixView d_x) {
        const int g = static_cast<int>(group);
        mixed_[g].Backward(d_out, levels[g].data(), d_x);
      },
      [&](LinearGroup group, ConstMatrixView x, ConstMatrixView d_out) {
        const int g = static_cast<int>(group);
        for (int level = 1; level <= top; ++level) {
          for (int s = 0; s < mixed_[g].num_segments(); ++s) {
            AddGradients(g, mixed_[g].SegmentBegin(s), level,
                         mixed_[g].WeightGradient(s, x, d_out, levels[g].data(), level));
          }
        }
      },
      hidden);
  ++steps_;
  for (int g = 0; g < kNumLinearGroups; ++g) {
    for (Clip& clip : clips_[g]) clip.Step(options_.learning_rate, steps_);
    Quantize(g);
    for (int level = 1; level <= top; ++level) mixed_[g].Refresh(block_.linear[g], level);
  }
  return error;
}

void ClippingTrainer::MeasureErrors(int group, int level, ConstMatrixView x, int64_t first,
                                    Matrix& errors) const {
  const MixedLinear& mixed = mixed_[group];
  Matrix gap = mixed.level(level), error(x.rows, mixed.rows());
  AddScaled(gap.data(), weights_.linear[group].data(), -1, gap.size());
  MultiplyTransposed(x, gap, error);
  for (int s = 0; s < mixed.num_segments(); ++s) {
    for (int64_t t = 0; t < x.rows; ++t) {
      const float* e = error.Row(t) + mixed.SegmentBegin(s);
      errors(first + t, s * kNumLevels + level - 1) = DotProduct(e, e, mixed.SegmentRows(s));
    }
  }
}

// Every group's gates, on what its linears' levels leave of their outputs now.
void ClippingTrainer::TrainAllGates(const Matrix& input) {
  const int64_t sequences = std::min(options_.gate_sequences, input.rows() / length());
  const int64_t tokens = sequences * length();
  std::array<RoutingSamples, kNumLinearGroups> samples;
  for (int g = 0; g < kNumLinearGroups; ++g) {
    for (int level = 1; level <= kNumLevels; ++level) mixed_[g].Refresh(block_.linear[g], level);
    samples[g].inputs = Matrix(tokens, mixed_[g].cols());
    samples[g].errors = Matrix(tokens, int64_t{mixed_[g].num_segments()} * kNumLevels);
  }
  for (int64_t s = 0; s < sequences; ++s) {
    Matrix hidden(length(), input.cols());
    std::copy_n(input.Row(s * length()), hidden.size(), hidden.data());
    BlockTrace trace;
    std::array<std::vector<uint8_t>, kNumLinearGroups> levels;
    Forward(hidden, trace, levels);
    for (int g = 0; g < kNumLinearGroups; ++g) {
      const Matrix& x = trace.InputOf(static_cast<LinearGroup>(g));
      std::copy_n(x.data(), x.size(), samples[g].inputs.Row(s * length()));
      for (int level = 1; level <= kNumLevels; ++level) {
        MeasureErrors(g, level, x, s * length(), samples[g].errors);
      }
    }
  }
  std::vector<RouterWeights> gates;
  gates.reserve(kNumLinearGroups);
  for (int g = 0; g < kNumLinearGroups; ++g) {
    gates.push_back(TrainGates(samples[g], costs_[g], options_.gate_training, options_.gates));
  }
  gates_ = std::move(gates);
}

absl::Status ClippingTrainer::Epoch(const std::string& name, const Matrix& input,
                                    const Matrix& target, ClippingCallback on_epoch) {
  double error = 0, size = 0;
  for (int64_t s = 0; s < input.rows() / length(); ++s) {
    error += Learn(input, target, s);
    size +=
        DotProduct(target.Row(s * length()), target.Row(s * length()), length() * target.cols());
  }
  return on_epoch(name, size > 0 ? error / size : 0);
}

absl::Status ClippingTrainer::Run(const ClippingStreams& streams, ClippingCallback on_epoch) {
  for (int epoch = 1; epoch <= options_.base_epochs; ++epoch) {
    MOBI_RETURN_IF_ERROR(Epoch(absl::StrCat("base epoch ", epoch, "/", options_.base_epochs),
                               streams.base, streams.target, on_epoch));
  }
  const int epochs_in_round =
      (options_.joint_epochs + options_.gate_rounds - 1) / options_.gate_rounds;
  for (int epoch = 0; epoch < options_.joint_epochs; ++epoch) {
    if (epoch % epochs_in_round == 0) TrainAllGates(streams.joint);
    MOBI_RETURN_IF_ERROR(Epoch(absl::StrCat("joint epoch ", epoch + 1, "/", options_.joint_epochs),
                               streams.joint, streams.target, on_epoch));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<FittedBlock> LearnClipping(const BlockContext& context, const BlockWeights& weights,
                                          const ClippingStreams& streams,
                                          const ClippingOptions& options,
                                          ClippingCallback on_epoch) {
  ClippingTrainer trainer(context, weights, options);
  MOBI_RETURN_IF_ERROR(trainer.Run(streams, on_epoch));
  return std::move(trainer).Result();
}

}  // namespace mobi
