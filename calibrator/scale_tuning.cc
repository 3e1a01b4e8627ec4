#include "calibrator/scale_tuning.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <random>
#include <utility>

#include "calibrator/level_allocation.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/mixed_linear.h"
#include "calibrator/parallel.h"
#include "calibrator/routing_samples.h"
#include "calibrator/simd.h"
#include "calibrator/vector_math.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

// The trained pairs of one level of one linear group, with Adam's moments. A pair is held as its
// range and its centre, both in units of what they were at the start.
class PairTrainer {
 public:
  PairTrainer(const NestedWeight& weight, int level) : level_(level) {
    for (const LevelScale& scale : weight.scales[level - 1]) {
      start_.push_back(scale);
    }
    moments_.resize(start_.size());
  }

  // gradient[pair]: of the loss by range and by centre.
  void Step(const std::vector<std::array<float, 2>>& gradient, float rate, int step,
            NestedWeight& weight) {
    const float c1 = 1 - std::pow(kBeta1, static_cast<float>(step));
    const float c2 = 1 - std::pow(kBeta2, static_cast<float>(step));
    std::vector<LevelScale>& scales = weight.scales[level_ - 1];
    for (size_t i = 0; i < scales.size(); ++i) {
      float change[2];
      for (int p = 0; p < 2; ++p) {
        auto& [first, second] = moments_[i][p];
        const float g = gradient[i][p];
        first = kBeta1 * first + (1 - kBeta1) * g;
        second = kBeta2 * second + (1 - kBeta2) * g * g;
        change[p] = -rate * (first / c1) / (std::sqrt(second / c2) + 1e-20f);
      }
      const float centre = scales[i].offset + 0.5f * scales[i].range + change[1] * UnitOf(i);
      scales[i].range = std::max(scales[i].range + change[0] * start_[i].range, 0.0f);
      scales[i].offset = centre - 0.5f * scales[i].range;
    }
  }

 private:
  static constexpr float kBeta1 = 0.9f, kBeta2 = 0.98f;
  float UnitOf(size_t i) const { return start_[i].range / (1 << kSliceBits); }

  struct Moments {
    float first = 0;
    float second = 0;
  };
  int level_;
  std::vector<LevelScale> start_;
  std::vector<std::array<Moments, 2>> moments_;
};

// By range: the centred fraction of the code; by centre: one.
MOBI_VECTORIZED void AddGroup(const uint8_t* codes, const float* d, int shift, float scale,
                              float* gradient) {
  float by_range = 0, by_centre = 0;
  for (int j = 0; j < kGroupSize; ++j) {
    by_range += d[j] * ((static_cast<float>(codes[j] >> shift) + 0.5f) * scale - 0.5f);
    by_centre += d[j];
  }
  gradient[0] += by_range;
  gradient[1] += by_centre;
}

// Gradients of one window: [layer][group][level - 1][pair].
using PairGradients = std::vector<
    std::array<std::array<std::vector<std::array<float, 2>>, kNumLevels>, kNumLinearGroups>>;

class ScaleTuner {
 public:
  ScaleTuner(const FloatModel& model, absl::Span<const int32_t> ids, int64_t seq_len,
             const ScaleTuningOptions& options, Matrix float_hidden,
             std::vector<FittedBlock>& blocks)
      : model_(model),
        ids_(ids),
        seq_len_(seq_len),
        length_(std::min<int64_t>(options.positions, seq_len)),
        num_sequences_(static_cast<int64_t>(ids.size()) / seq_len),
        num_windows_(
            std::min(num_sequences_ * (seq_len / length_), int64_t{options.steps} * options.batch)),
        options_(options),
        blocks_(blocks),
        segments_(SegmentRows(model.config())),
        float_hidden_(std::move(float_hidden)) {}

  absl::Status Run(const TuningCallback& on_step);

 private:
  // The float model's answers that are not there yet and what tuning needs of each block.
  absl::Status LoadBlocks();
  absl::Status MeasureAllocation();
  // The first window of every sequence, then the second of every one, and so on.
  absl::Span<const int32_t> IdsOf(int64_t window) const {
    const int64_t first = window % num_sequences_ * seq_len_ + window / num_sequences_ * length_;
    return ids_.subspan(static_cast<size_t>(first), static_cast<size_t>(length_));
  }
  // Levels of every token and segment of a turn's window, [layer][group].
  ModelLevels LevelsOf(int64_t turn) const;
  double RunWindow(int64_t window, const ModelLevels& levels, PairGradients& gradients) const;
  void AddGradients(int layer, int group, ConstMatrixView x, ConstMatrixView d_out,
                    const std::vector<uint8_t>& levels, PairGradients& gradients) const;
  void Step(const std::vector<PairGradients>& gradients, float rate, int step);
  bool trained(int level) const { return options_.train[level - 1]; }
  int lowest_trained() const {
    int level = 1;
    while (level < kNumLevels && !trained(level)) ++level;
    return level;
  }

  const FloatModel& model_;
  const absl::Span<const int32_t> ids_;
  const int64_t seq_len_;
  const int64_t length_;  // tokens of a window
  const int64_t num_sequences_;
  const int64_t num_windows_;  // that are ever read
  const ScaleTuningOptions& options_;
  std::vector<FittedBlock>& blocks_;
  const std::array<std::vector<int64_t>, kNumLinearGroups> segments_;
  Matrix float_hidden_;                // behind the last block, [num_windows_ * length_, hidden]
  std::vector<BlockWeights> weights_;  // for their norms
  std::vector<std::vector<MixedLinear>> mixed_;
  std::vector<std::array<std::vector<PairTrainer>, kNumLinearGroups>> trainers_;
  std::optional<LevelAllocation> allocation_;
};

absl::Status ScaleTuner::LoadBlocks() {
  const BlockContext context{model_.config(), model_.rope(), length_};
  const Matrix known =
      std::exchange(float_hidden_, Matrix(num_windows_ * length_, model_.config().hidden_size));
  std::copy_n(known.data(), std::min(known.size(), float_hidden_.size()), float_hidden_.data());
  const int64_t num_known = std::min(known.rows() / length_, num_windows_);
  const auto window_of = [&](int64_t i) {
    return MatrixView(float_hidden_).Rows(i * length_, length_);
  };
  for (int64_t i = num_known; i < num_windows_; ++i) model_.Embed(IdsOf(i), window_of(i));
  for (int layer = 0; layer < model_.num_layers(); ++layer) {
    MOBI_ASSIGN_OR_RETURN(BlockWeights weights, model_.LoadBlock(layer));
    {
      const std::vector<DeviceCopy> copies = weights.DeviceCopies();
      ParallelFor(options_.num_threads, num_windows_ - num_known,
                  [&](int64_t i) { ForwardBlock(context, weights, window_of(num_known + i)); });
    }
    for (Matrix& linear : weights.linear) linear = Matrix(linear.rows(), 0);
    weights_.push_back(std::move(weights));
    auto& mixed = mixed_.emplace_back();
    auto& trainers = trainers_.emplace_back();
    for (int g = 0; g < kNumLinearGroups; ++g) {
      mixed.emplace_back(blocks_[layer].linear[g], segments_[g], options_.num_threads);
      for (int level = 1; level <= kNumLevels; ++level) {
        if (trained(level)) trainers[g].emplace_back(blocks_[layer].linear[g], level);
      }
    }
  }
  return absl::OkStatus();
}

absl::Status ScaleTuner::MeasureAllocation() {
  if (options_.allocated_share <= 0) return absl::OkStatus();
  const int64_t sequences = std::min(options_.allocated_sequences, num_sequences_);
  RoutingSampleOptions sampling;
  sampling.seed = options_.seed;
  sampling.num_threads = options_.num_threads;
  MOBI_ASSIGN_OR_RETURN(
      allocation_, LevelAllocation::Measure(
                       model_, blocks_, ids_.subspan(0, static_cast<size_t>(sequences * seq_len_)),
                       seq_len_, sampling));
  return absl::OkStatus();
}

void ScaleTuner::AddGradients(int layer, int group, ConstMatrixView x, ConstMatrixView d_out,
                              const std::vector<uint8_t>& levels, PairGradients& gradients) const {
  const NestedWeight& weight = blocks_[layer].linear[group];
  const MixedLinear& mixed = mixed_[layer][group];
  for (int level = 1; level <= kNumLevels; ++level) {
    if (!trained(level)) continue;
    auto& out = gradients[layer][group][level - 1];
    out.resize(weight.scales[level - 1].size());
    const int shift = kSliceBits * (kNumLevels - level);
    const float scale = 1.0f / static_cast<float>(1 << BitsOfLevel(level));
    for (int s = 0; s < mixed.num_segments(); ++s) {
      const Matrix d_weight = mixed.WeightGradient(s, x, d_out, levels.data(), level);
      for (int64_t r = 0; r < d_weight.rows(); ++r) {
        const int64_t row = mixed.SegmentBegin(s) + r;
        for (int64_t g = 0; g < weight.groups(); ++g) {
          AddGroup(weight.Codes(row) + g * kGroupSize, d_weight.Row(r) + g * kGroupSize, shift,
                   scale, out[row * weight.groups() + g].data());
        }
      }
    }
  }
}

ModelLevels ScaleTuner::LevelsOf(int64_t turn) const {
  const uint64_t draw = options_.seed * 1000003 + static_cast<uint64_t>(turn);
  const bool pure = options_.pure_every > 0 && turn % options_.pure_every == 0;
  std::array<double, kNumLevels> shares = options_.level_shares;
  if (pure) shares = {}, shares[lowest_trained() - 1] = 1;
  std::mt19937_64 random(draw);
  const auto uniform = [&] { return static_cast<double>(random() >> 11) * 0x1.0p-53; };
  ModelLevels allocated;
  if (allocation_ && !pure && uniform() < options_.allocated_share) {
    const auto [fewest, most] = options_.allocated_bits;
    allocated =
        allocation_->Draw(std::lerp(fewest, most, uniform()), options_.allocated_jitter, random());
  }
  ModelLevels levels(static_cast<size_t>(model_.num_layers()));
  for (int layer = 0; layer < model_.num_layers(); ++layer) {
    for (int g = 0; g < kNumLinearGroups; ++g) {
      const size_t count = segments_[g].size() * static_cast<size_t>(length_);
      if (allocated.empty()) {
        levels[layer][g] = DrawLevels(
            {draw, static_cast<uint64_t>(layer), static_cast<uint64_t>(g)}, shares, count);
        continue;
      }
      for (const uint8_t level : allocated[layer][g]) {
        levels[layer][g].insert(levels[layer][g].end(), static_cast<size_t>(length_), level);
      }
    }
  }
  return levels;
}

double ScaleTuner::RunWindow(int64_t window, const ModelLevels& levels,
                             PairGradients& gradients) const {
  const BlockContext context{model_.config(), model_.rope(), length_};
  Matrix hidden(length_, model_.config().hidden_size);
  model_.Embed(IdsOf(window), hidden);
  std::vector<BlockTrace> traces(static_cast<size_t>(model_.num_layers()));
  for (int layer = 0; layer < model_.num_layers(); ++layer) {
    TraceBlock(
        context, weights_[layer],
        [&](LinearGroup group, ConstMatrixView x, MatrixView out) {
          const int g = static_cast<int>(group);
          mixed_[layer][g].Forward(x, levels[layer][g].data(), out);
        },
        hidden, traces[layer]);
  }
  // KL(float || fitted) and its gradient at the logits, q - p over the tokens of the batch.
  const int64_t vocab = model_.config().vocab_size;
  Matrix logits(length_, vocab), target(length_, vocab);
  model_.Logits(hidden, logits);
  model_.Logits(ConstMatrixView(float_hidden_).Rows(window * length_, length_), target);
  const float scale = 1.0f / static_cast<float>(length_ * options_.batch);
  double kl = 0;
  for (int64_t t = 0; t < length_; ++t) {
    kl += DistributionGap(target.Row(t), logits.Row(t), scale, vocab);
  }
  Matrix gradient(length_, hidden.cols());
  model_.LogitsBackward(hidden, logits, gradient);
  for (int layer = model_.num_layers() - 1; layer >= 0; --layer) {
    BackwardBlock(
        context, weights_[layer], traces[layer],
        [&](LinearGroup group, ConstMatrixView d_out, MatrixView d_x) {
          const int g = static_cast<int>(group);
          mixed_[layer][g].Backward(d_out, levels[layer][g].data(), d_x);
        },
        [&](LinearGroup group, ConstMatrixView x, ConstMatrixView d_out) {
          const int g = static_cast<int>(group);
          AddGradients(layer, g, x, d_out, levels[layer][g], gradients);
        },
        gradient);
    traces[layer] = BlockTrace();
  }
  return kl / static_cast<double>(length_);
}

void ScaleTuner::Step(const std::vector<PairGradients>& gradients, float rate, int step) {
  const int64_t jobs = static_cast<int64_t>(blocks_.size()) * kNumLinearGroups;
  ParallelFor(options_.num_threads, jobs, [&](int64_t job) {
    const int64_t layer = job / kNumLinearGroups, g = job % kNumLinearGroups;
    size_t trainer = 0;
    for (int level = 1; level <= kNumLevels; ++level) {
      if (!trained(level)) continue;
      auto sum = gradients[0][layer][g][level - 1];
      for (size_t s = 1; s < gradients.size(); ++s) {
        const auto& more = gradients[s][layer][g][level - 1];
        for (size_t i = 0; i < sum.size(); ++i) sum[i][0] += more[i][0], sum[i][1] += more[i][1];
      }
      trainers_[layer][g][trainer++].Step(sum, rate, step, blocks_[layer].linear[g]);
      mixed_[layer][g].Refresh(blocks_[layer].linear[g], level);
    }
  });
}

absl::Status ScaleTuner::Run(const TuningCallback& on_step) {
  MOBI_RETURN_IF_ERROR(MeasureAllocation());
  MOBI_RETURN_IF_ERROR(LoadBlocks());
  for (int step = 0; step < options_.steps; ++step) {
    std::vector<PairGradients> gradients(static_cast<size_t>(options_.batch),
                                         PairGradients(blocks_.size()));
    std::vector<double> kl(static_cast<size_t>(options_.batch));
    ParallelFor(options_.num_threads, options_.batch, [&](int64_t i) {
      const int64_t turn = int64_t{step} * options_.batch + i;
      kl[i] = RunWindow(turn % num_windows_, LevelsOf(turn), gradients[i]);
    });
    const float progress = static_cast<float>(step) / static_cast<float>(options_.steps);
    const float rate = options_.learning_rate * 0.5f * (1 + std::cos(3.14159265f * progress));
    Step(gradients, rate, step + 1);
    double mean = 0;
    for (const double value : kl) mean += value / options_.batch;
    MOBI_RETURN_IF_ERROR(on_step(step, mean));
  }
  for (FittedBlock& block : blocks_) {
    for (NestedWeight& weight : block.linear) {
      for (auto& scales : weight.scales) {
        for (LevelScale& s : scales) s = RoundedScale(s.range, s.offset + 0.5 * s.range);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

double TuningGib(const ModelConfig& config, const ScaleTuningOptions& options) {
  double weights = 0, trace = 4.0 * config.hidden_size;
  for (const RoutedGroup& group : RoutedGroupsOfLayer(config, 0)) {
    for (const LinearShape& linear : group.linears) {
      weights += static_cast<double>(linear.rows) * static_cast<double>(linear.cols);
    }
    trace += static_cast<double>(group.linears.front().cols);
  }
  trace += 3.0 * config.intermediate_size;
  const double tokens = static_cast<double>(options.batch) * options.positions;
  return config.num_hidden_layers * (kNumLevels * weights + tokens * trace) * sizeof(float) /
         (1 << 30);
}

absl::Status TuneScales(const FloatModel& model, absl::Span<const int32_t> ids, int64_t seq_len,
                        const ScaleTuningOptions& options, Matrix float_hidden,
                        const TuningCallback& on_step, std::vector<FittedBlock>& blocks) {
  return ScaleTuner(model, ids, seq_len, options, std::move(float_hidden), blocks).Run(on_step);
}

}  // namespace mobi
