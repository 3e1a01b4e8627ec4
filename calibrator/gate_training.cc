#include "calibrator/gate_training.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <random>

#include "kernels/sliced_weight.h"

namespace mobi {
namespace {

constexpr int kNumGates = kNumLevels - 1;
// The levels' losses are steep exponentials of the gates, so that the cheapest level is the one
// before the first gate that stays shut; the shift keeps them within what prices can be.
constexpr float kSteepness = 3, kShift = kGateLogPrice, kNoLoss = -85;

// errors[token][level - 1] over all segments, relative to the mean at level 1.
std::vector<std::array<float, kNumLevels>> RelativeErrors(const Matrix& errors) {
  std::vector<std::array<float, kNumLevels>> relative(static_cast<size_t>(errors.rows()));
  double mean = 0;
  for (int64_t t = 0; t < errors.rows(); ++t) {
    for (int64_t o = 0; o < errors.cols(); ++o) relative[t][o % kNumLevels] += errors(t, o);
    mean += relative[t][0] / static_cast<double>(errors.rows());
  }
  const auto scale = static_cast<float>(1 / std::max(mean, 1e-30));
  for (auto& of_token : relative) {
    for (float& error : of_token) error *= scale;
  }
  return relative;
}

// Replaces gates by the gradient there. Slice e counts as read by the product of gates 2 to e.
class GateLoss {
 public:
  GateLoss(const std::vector<std::array<float, kNumLevels>>& errors, const GateOptions& options)
      : errors_(errors), options_(options) {}

  void operator()(const int64_t* tokens, double progress, Matrix& gates) const {
    const auto temperature = static_cast<float>(
        options_.first_temperature *
        std::pow(options_.last_temperature / options_.first_temperature, progress));
    const int64_t n = gates.rows();
    double bits = 0;
    for (int64_t t = 0; t < n; ++t) {
      int level = 1;
      while (level < kNumLevels && gates(t, level - 1) > 0) ++level;
      bits += static_cast<double>(BitsOfLevel(level)) / static_cast<double>(n);
    }
    // By one more slice read by one token.
    const auto d_slice =
        static_cast<float>(2 * options_.budget_weight * (bits - options_.bits) * kSliceBits);
    for (int64_t t = 0; t < n; ++t) {
      const auto& error = errors_[tokens[t]];
      std::array<float, kNumGates> d_gate{};
      float read = 1;
      for (int e = 0; e < kNumGates; ++e) {
        read *= Sigmoid(gates(t, e) / temperature);
        const float d_read = error[e + 1] - error[e] + d_slice;
        // d read / d gate of each gate in the product: read (1 - sigmoid) / temperature.
        for (int g = 0; g <= e; ++g) {
          d_gate[g] += d_read * read * (1 - Sigmoid(gates(t, g) / temperature)) / temperature;
        }
      }
      for (int g = 0; g < kNumGates; ++g) gates(t, g) = d_gate[g] / static_cast<float>(n);
    }
  }

 private:
  const std::vector<std::array<float, kNumLevels>>& errors_;
  const GateOptions& options_;
};

}  // namespace

RouterWeights TrainGates(const RoutingSamples& samples, const std::vector<SegmentCost>& costs,
                         const RouterTrainingOptions& options, const GateOptions& gates) {
  std::mt19937_64 random(options.seed);
  const RouterInputs inputs(samples.inputs, random);
  const auto errors = RelativeErrors(samples.errors);
  RouterNetwork network(inputs.cols(), options.num_hidden, kNumGates, random);
  network.Train(inputs, options, random, GateLoss(errors, gates));
  RouterWeights router;
  inputs.Unstandardise(network.w1.value, network.b1.value, router);
  router.w2 = Matrix(static_cast<int64_t>(costs.size()) * kNumLevels, options.num_hidden);
  for (size_t s = 0; s < costs.size(); ++s) {
    for (int gate = 0; gate < kNumGates; ++gate) {
      const int64_t row = static_cast<int64_t>(s) * kNumLevels + gate;
      for (int64_t h = 0; h < options.num_hidden; ++h) {
        router.w2(row, h) = kSteepness * network.w2.value(gate, h);
      }
      const float bytes = costs[s].bytes[gate + 1] - costs[s].bytes[gate];
      router.b2.push_back(kSteepness * network.b2.value(0, gate) + kShift + std::log(bytes));
    }
    router.b2.push_back(kNoLoss);
  }
  return router;
}

}  // namespace mobi
