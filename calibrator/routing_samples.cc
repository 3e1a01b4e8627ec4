#include "calibrator/routing_samples.h"

#include <algorithm>
#include <memory>
#include <random>
#include <utility>

#include "calibrator/linear_algebra.h"
#include "calibrator/mixed_linear.h"
#include "calibrator/parallel.h"
#include "calibrator/vector_math.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

double UnitUniform(std::mt19937_64& random) {
  return static_cast<double>(random() >> 11) * 0x1.0p-53;
}

// The fitted layer at work: mixed levels forward and back, and every level's error.
struct LayerLinears {
  BlockWeights weights;
  std::vector<MixedLinear> mixed;                                        // per group
  std::array<std::array<KeptMatrix, kNumLevels>, kNumLinearGroups> gap;  // W_k - W
};

absl::StatusOr<std::unique_ptr<LayerLinears>> LoadLayer(const FloatModel& model, int layer,
                                                        const FittedBlock& fitted, int num_threads,
                                                        bool with_gap) {
  auto linears = std::make_unique<LayerLinears>();
  MOBI_ASSIGN_OR_RETURN(linears->weights, model.LoadBlock(layer));
  const auto segments = SegmentRows(model.config());
  for (int g = 0; g < kNumLinearGroups; ++g) {
    const MixedLinear& mixed =
        linears->mixed.emplace_back(fitted.linear[g], segments[g], num_threads);
    const Matrix& weight = linears->weights.linear[g];
    for (int k = 0; with_gap && k < kNumLevels; ++k) {
      Matrix gap = Matrix::Unfilled(weight.rows(), weight.cols());
      ParallelFor(num_threads, weight.rows(), [&](int64_t row) {
        std::copy_n(mixed.level(k + 1).Row(row), gap.cols(), gap.Row(row));
        AddScaled(gap.Row(row), weight.Row(row), -1, gap.cols());
      });
      linears->gap[g][k] = KeptMatrix(std::move(gap));
    }
  }
  return linears;
}

class RoutingSampler {
 public:
  RoutingSampler(const FloatModel& model, const std::vector<FittedBlock>& blocks,
                 absl::Span<const int32_t> ids, int64_t seq_len,
                 const RoutingSampleOptions& options)
      : model_(model),
        blocks_(blocks),
        ids_(ids),
        seq_len_(seq_len),
        options_(options),
        num_sequences_(static_cast<int64_t>(ids.size()) / seq_len),
        gradient_(num_sequences_ * seq_len, model.config().hidden_size) {}

  absl::Status Run(LayerSamplesFn on_layer);

 private:
  MatrixView SequenceOf(Matrix& m, int64_t sequence) const {
    return MatrixView(m).Rows(sequence * seq_len_, seq_len_);
  }
  // The same levels whenever the same place of the same sequence is computed again.
  std::vector<uint8_t> LevelsOf(int layer, int group, int64_t sequence, int segments) const;
  void Forward(int layer, const LayerLinears& linears, int64_t sequence, MatrixView hidden,
               BlockTrace& trace) const;
  void SeedGradient(ConstMatrixView hidden, int64_t sequence);
  void Backward(int layer, const LayerLinears& linears, int64_t sequence,
                std::array<RoutingSamples, kNumLinearGroups>& samples,
                std::array<Matrix, kNumLinearGroups>& losses);

  const FloatModel& model_;
  const std::vector<FittedBlock>& blocks_;
  const absl::Span<const int32_t> ids_;
  const int64_t seq_len_;
  const RoutingSampleOptions& options_;
  const int64_t num_sequences_;
  std::vector<Matrix> inputs_;  // residual stream entering each layer
  Matrix gradient_;             // at the residual stream, moving from the last layer to the first
};

std::vector<uint8_t> RoutingSampler::LevelsOf(int layer, int group, int64_t sequence,
                                              int segments) const {
  return DrawLevels({options_.seed + static_cast<uint64_t>(sequence) * 1000003,
                     static_cast<uint64_t>(layer), static_cast<uint64_t>(group)},
                    options_.level_shares, static_cast<size_t>(segments * seq_len_));
}

void RoutingSampler::Forward(int layer, const LayerLinears& linears, int64_t sequence,
                             MatrixView hidden, BlockTrace& trace) const {
  TraceBlock(
      {model_.config(), model_.rope(), seq_len_}, linears.weights,
      [&](LinearGroup group, ConstMatrixView x, MatrixView out) {
        const int g = static_cast<int>(group);
        const auto levels = LevelsOf(layer, g, sequence, linears.mixed[g].num_segments());
        linears.mixed[g].Forward(x, levels.data(), out);
      },
      hidden, trace);
}

// The gradient of the loss of labels drawn from the model's own distribution.
void RoutingSampler::SeedGradient(ConstMatrixView hidden, int64_t sequence) {
  Matrix logits(seq_len_, model_.config().vocab_size);
  model_.Logits(hidden, logits);
  std::seed_seq seed{options_.seed, uint64_t{0x1abe1}, static_cast<uint64_t>(sequence)};
  std::mt19937_64 random(seed);
  for (int64_t t = 0; t < seq_len_; ++t) {
    float* row = logits.Row(t);
    Scale(row, 1.0f / ExpMinusMax(row, logits.cols()), logits.cols());
    double left = UnitUniform(random);
    int64_t label = 0;
    while (label + 1 < logits.cols() && left >= row[label]) left -= row[label++];
    row[label] -= 1;
  }
  model_.LogitsBackward(hidden, logits, SequenceOf(gradient_, sequence));
}

void RoutingSampler::Backward(int layer, const LayerLinears& linears, int64_t sequence,
                              std::array<RoutingSamples, kNumLinearGroups>& samples,
                              std::array<Matrix, kNumLinearGroups>& losses) {
  BlockTrace trace;
  Matrix hidden(seq_len_, inputs_[layer].cols());
  std::copy_n(SequenceOf(inputs_[layer], sequence).data, hidden.size(), hidden.data());
  Forward(layer, linears, sequence, hidden, trace);
  const auto backward = [&](LinearGroup group, ConstMatrixView d_out, MatrixView d_x) {
    const int g = static_cast<int>(group);
    const auto levels = LevelsOf(layer, g, sequence, linears.mixed[g].num_segments());
    linears.mixed[g].Backward(d_out, levels.data(), d_x);
  };
  const auto measure = [&](LinearGroup group, ConstMatrixView x, ConstMatrixView d_out) {
    const int g = static_cast<int>(group);
    const int64_t first = sequence * seq_len_;
    const MixedLinear& mixed = linears.mixed[g];
    for (int64_t t = 0; t < seq_len_; ++t) {
      std::copy_n(x.Row(t), x.cols, samples[g].inputs.Row(first + t));
    }
    Matrix error(seq_len_, mixed.rows());
    for (int k = 0; k < kNumLevels; ++k) {
      MultiplyTransposed(x, linears.gap[g][k].get(), error);
      for (int s = 0; s < mixed.num_segments(); ++s) {
        const int64_t begin = mixed.SegmentBegin(s), rows = mixed.SegmentRows(s);
        const int64_t column = s * kNumLevels + k;
        for (int64_t t = 0; t < seq_len_; ++t) {
          const float* e = error.Row(t) + begin;
          const float slope = DotProduct(d_out.Row(t) + begin, e, rows);
          samples[g].errors(first + t, column) = DotProduct(e, e, rows);
          losses[g](first + t, column) = 0.5f * slope * slope;
        }
      }
    }
  };
  BackwardBlock({model_.config(), model_.rope(), seq_len_}, linears.weights, trace, backward,
                measure, SequenceOf(gradient_, sequence));
}

absl::Status RoutingSampler::Run(LayerSamplesFn on_layer) {
  const int64_t tokens = num_sequences_ * seq_len_;
  Matrix hidden(tokens, model_.config().hidden_size);
  model_.Embed(ids_.subspan(0, static_cast<size_t>(tokens)), hidden);
  for (int layer = 0; layer < model_.num_layers(); ++layer) {
    inputs_.push_back(hidden);
    MOBI_ASSIGN_OR_RETURN(const auto linears,
                          LoadLayer(model_, layer, blocks_[layer], options_.num_threads, false));
    ParallelFor(options_.num_threads, num_sequences_, [&](int64_t sequence) {
      BlockTrace trace;
      Forward(layer, *linears, sequence, SequenceOf(hidden, sequence), trace);
    });
  }
  ParallelFor(options_.num_threads, num_sequences_,
              [&](int64_t sequence) { SeedGradient(SequenceOf(hidden, sequence), sequence); });
  for (int layer = model_.num_layers() - 1; layer >= 0; --layer) {
    MOBI_ASSIGN_OR_RETURN(const auto linears,
                          LoadLayer(model_, layer, blocks_[layer], options_.num_threads, true));
    std::array<RoutingSamples, kNumLinearGroups> samples;
    std::array<Matrix, kNumLinearGroups> losses;
    for (int g = 0; g < kNumLinearGroups; ++g) {
      const int64_t columns = int64_t{linears->mixed[g].num_segments()} * kNumLevels;
      samples[g].inputs = Matrix(tokens, linears->mixed[g].cols());
      samples[g].errors = Matrix(tokens, columns);
      losses[g] = Matrix(tokens, columns);
    }
    ParallelFor(options_.num_threads, num_sequences_,
                [&](int64_t sequence) { Backward(layer, *linears, sequence, samples, losses); });
    for (int g = 0; g < kNumLinearGroups; ++g) {
      for (int64_t column = 0; column < losses[g].cols(); ++column) {
        double loss = 0, error = 0;
        for (int64_t t = 0; t < tokens; ++t) {
          loss += losses[g](t, column);
          error += samples[g].errors(t, column);
        }
        samples[g].loss_factor.push_back(error > 0 ? loss / error : 0.0);
      }
    }
    inputs_.pop_back();
    MOBI_RETURN_IF_ERROR(on_layer(layer, samples));
  }
  return absl::OkStatus();
}

}  // namespace

std::array<std::vector<int64_t>, kNumLinearGroups> SegmentRows(const ModelConfig& config) {
  std::array<std::vector<int64_t>, kNumLinearGroups> rows;
  const auto groups = RoutedGroupsOfLayer(config, 0);
  for (int g = 0; g < kNumLinearGroups; ++g) {
    for (const LinearShape& linear : groups[g].linears) rows[g].push_back(linear.rows);
  }
  return rows;
}

absl::Status SampleRouting(const FloatModel& model, const std::vector<FittedBlock>& blocks,
                           absl::Span<const int32_t> ids, int64_t seq_len,
                           const RoutingSampleOptions& options, LayerSamplesFn on_layer) {
  return RoutingSampler(model, blocks, ids, seq_len, options).Run(on_layer);
}

}  // namespace mobi
