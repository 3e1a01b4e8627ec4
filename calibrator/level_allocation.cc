#include "calibrator/level_allocation.h"

#include <cmath>
#include <random>
#include <utility>

#include "calibrator/router_network.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr double kLogPriceLow = -80, kLogPriceHigh = 20;

// Average bits at a price.
double Allocate(const std::vector<std::array<LevelAllocation::Group, kNumLinearGroups>>& layers,
                double price, ModelLevels& levels) {
  double bits = 0, weights = 0;
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    for (int g = 0; g < kNumLinearGroups; ++g) {
      const LevelAllocation::Group& group = layers[layer][g];
      bits += ChooseLevels(group.losses, group.costs, price, {}, levels[layer][g].data());
      for (const SegmentCost& cost : group.costs) weights += static_cast<double>(cost.weights);
    }
  }
  return bits / weights;
}

}  // namespace

absl::StatusOr<LevelAllocation> LevelAllocation::Measure(const FloatModel& model,
                                                         const std::vector<FittedBlock>& blocks,
                                                         absl::Span<const int32_t> ids,
                                                         int64_t seq_len,
                                                         const RoutingSampleOptions& options) {
  std::vector<std::array<Group, kNumLinearGroups>> layers(blocks.size());
  const auto on_layer = [&](int layer, std::array<RoutingSamples, kNumLinearGroups>& samples) {
    const auto groups = RoutedGroupsOfLayer(model.config(), layer);
    for (int g = 0; g < kNumLinearGroups; ++g) {
      const Matrix& errors = samples[g].errors;
      Group& group = layers[layer][g];
      group.losses = Matrix(1, errors.cols());
      for (int64_t o = 0; o < errors.cols(); ++o) {
        double error = 0;
        for (int64_t t = 0; t < errors.rows(); ++t) error += errors(t, o);
        group.losses(0, o) = static_cast<float>(samples[g].loss_factor[o] * error /
                                                static_cast<double>(errors.rows()));
      }
      group.costs = CostsOf(groups[g]);
    }
    return absl::OkStatus();
  };
  MOBI_RETURN_IF_ERROR(SampleRouting(model, blocks, ids, seq_len, options, on_layer));
  return LevelAllocation(std::move(layers));
}

ModelLevels LevelAllocation::Draw(double bits, double jitter, uint64_t key) const {
  std::mt19937_64 random(key);
  auto jittered = layers_;
  ModelLevels levels(layers_.size());
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    for (int g = 0; g < kNumLinearGroups; ++g) {
      Group& group = jittered[layer][g];
      levels[layer][g].resize(group.costs.size());
      for (size_t s = 0; s < group.costs.size(); ++s) {
        const auto factor = static_cast<float>(std::exp(jitter * double{Normal(random)}));
        for (size_t k = 0; k < kNumLevels; ++k) {
          group.losses(0, static_cast<int64_t>(s * kNumLevels + k)) *= factor;
        }
      }
    }
  }
  double low = kLogPriceLow, high = kLogPriceHigh;
  for (int i = 0; i < 40; ++i) {
    const double middle = 0.5 * (low + high);
    (Allocate(jittered, std::exp(middle), levels) > bits ? low : high) = middle;
  }
  Allocate(jittered, std::exp(high), levels);
  return levels;
}

}  // namespace mobi
