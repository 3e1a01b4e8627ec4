#include "calibrator/router_training.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "calibrator/linear_algebra.h"
#include "calibrator/vector_math.h"
#include "kernels/sliced_weight.h"

namespace mobi {
namespace {

// Log errors, every output brought to zero mean and unit size.
struct LogErrors {
  explicit LogErrors(const Matrix& errors);

  Matrix values;                  // [tokens, outputs]
  std::vector<float> mean, size;  // [outputs]
};

LogErrors::LogErrors(const Matrix& errors) : values(errors.rows(), errors.cols()) {
  const int64_t tokens = errors.rows();
  const double n = static_cast<double>(tokens);
  for (int64_t o = 0; o < errors.cols(); ++o) {
    double total = 0, sum = 0, square = 0;
    for (int64_t t = 0; t < tokens; ++t) total += errors(t, o);
    const double floor = std::max(1e-6 * total / n, 1e-30);
    for (int64_t t = 0; t < tokens; ++t) {
      const double y = std::log(errors(t, o) + floor);
      values(t, o) = static_cast<float>(y);
      sum += y / n;
      square += y * y / n;
    }
    mean.push_back(static_cast<float>(sum));
    size.push_back(static_cast<float>(std::sqrt(std::max(square - sum * sum, 1e-6))));
    for (int64_t t = 0; t < tokens; ++t) values(t, o) = (values(t, o) - mean[o]) / size[o];
  }
}

// Shifts every output so that predictions sum to the measured losses.
void MatchMeans(const RoutingSamples& samples, RouterWeights& router) {
  const Matrix scores = RouterScores(router, samples.inputs);
  for (int64_t o = 0; o < scores.cols(); ++o) {
    double measured = 0, predicted = 0;
    for (int64_t t = 0; t < scores.rows(); ++t) {
      measured += samples.errors(t, o);
      predicted += std::exp(static_cast<double>(scores(t, o)));
    }
    const double loss = std::max(measured * samples.loss_factor[o], 1e-30);
    router.b2[o] += static_cast<float>(std::log(loss / std::max(predicted, 1e-30)));
  }
}

}  // namespace

RouterWeights TrainRouter(const RoutingSamples& samples, const RouterTrainingOptions& options) {
  std::mt19937_64 random(options.seed);
  const RouterInputs inputs(samples.inputs, random);
  const LogErrors targets(samples.errors);
  const int64_t outputs = targets.values.cols();
  RouterNetwork network(inputs.cols(), options.num_hidden, outputs, random);
  network.Train(inputs, options, random, [&](const int64_t* tokens, double, Matrix& out) {
    const float scale = 2.0f / static_cast<float>(out.size());
    for (int64_t t = 0; t < out.rows(); ++t) {
      for (int64_t o = 0; o < outputs; ++o) {
        out(t, o) = scale * (out(t, o) - targets.values(tokens[t], o));
      }
    }
  });
  RouterWeights router;
  inputs.Unstandardise(network.w1.value, network.b1.value, router);
  router.w2 = Matrix(outputs, options.num_hidden);
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t h = 0; h < options.num_hidden; ++h) {
      router.w2(o, h) = network.w2.value(o, h) * targets.size[o];
    }
    router.b2.push_back(network.b2.value(0, o) * targets.size[o] + targets.mean[o]);
  }
  MatchMeans(samples, router);
  return router;
}

Matrix RouterScores(const RouterWeights& router, ConstMatrixView x) {
  const int64_t hidden = router.w1.rows(), outputs = router.w2.rows();
  Matrix act(x.rows, hidden), scores(x.rows, outputs);
  MultiplyTransposed(x, router.w1, act);
  for (int64_t t = 0; t < x.rows; ++t) {
    const float log_rms = LogRms(x.Row(t), x.cols);
    for (int64_t h = 0; h < hidden; ++h) {
      const float pre = act(t, h) + router.b1[h] + router.u[h] * log_rms;
      act(t, h) = pre * Sigmoid(pre);
    }
  }
  MultiplyTransposed(act, router.w2, scores);
  for (int64_t t = 0; t < x.rows; ++t) AddScaled(scores.Row(t), router.b2.data(), 1, outputs);
  return scores;
}

int RouterHiddenUnits(const ModelConfig& config, double bits, double share, int limit) {
  double read = 0, per_unit = 0, fixed = 0;
  for (const RoutedGroup& group : RoutedGroupsOfLayer(config, 0)) {
    for (const LinearShape& linear : group.linears) {
      read += static_cast<double>(SliceBytes(linear.rows, linear.cols)) * bits / kSliceBits +
              static_cast<double>(ScaleBytes(linear.rows, linear.cols));
    }
    const auto outputs = static_cast<double>(group.linears.size() * kNumLevels);
    per_unit += 2.0 * static_cast<double>(group.linears.front().cols) + 8 + 4 * outputs;
    fixed += 4 * outputs;
  }
  return std::clamp(static_cast<int>((share * read - fixed) / per_unit), 1, limit);
}

}  // namespace mobi
