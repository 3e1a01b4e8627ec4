#include "calibrator/router_training.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "calibrator/linear_algebra.h"
#include "calibrator/vector_math.h"
#include "kernels/numeric.h"
#include "kernels/sliced_weight.h"

namespace mobi {
namespace {

// A normal draw by Box and Muller: the library's own differs between implementations.
float Normal(std::mt19937_64& random) {
  const double u = (static_cast<double>(random() >> 11) + 0.5) * 0x1.0p-53;
  const double v = static_cast<double>(random() >> 11) * 0x1.0p-53;
  return static_cast<float>(std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v));
}

float Sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

float LogRms(const float* x, int64_t cols) {
  const double mean = DotProduct(x, x, cols) / static_cast<double>(cols);
  return static_cast<float>(0.5 * std::log(std::max(mean, 1e-30)));
}

// One parameter tensor with Adam's moments.
class Parameter {
 public:
  Parameter(int64_t rows, int64_t cols) : value(rows, cols), gradient(rows, cols) {
    first_ = second_ = std::vector<float>(static_cast<size_t>(rows * cols));
  }

  void Step(float rate, int step) {
    const float c1 = 1 - std::pow(0.9f, static_cast<float>(step));
    const float c2 = 1 - std::pow(0.999f, static_cast<float>(step));
    for (int64_t i = 0; i < value.size(); ++i) {
      const float g = gradient.data()[i];
      first_[i] = 0.9f * first_[i] + 0.1f * g;
      second_[i] = 0.999f * second_[i] + 0.001f * g * g;
      value.data()[i] -= rate * (first_[i] / c1) / (std::sqrt(second_[i] / c2) + 1e-8f);
    }
    gradient.Fill(0);
  }

  Matrix value;
  Matrix gradient;

 private:
  std::vector<float> first_, second_;
};

// Samples brought to zero mean and unit size; one more column carries the log of the rms.
struct Standardised {
  Matrix inputs;                    // [tokens, cols + 1]
  Matrix targets;                   // [tokens, outputs]
  std::vector<float> channel_size;  // [cols]
  float log_rms_mean = 0, log_rms_size = 1;
  std::vector<float> target_mean, target_size;  // [outputs]
};

Standardised Standardise(const RoutingSamples& samples) {
  const int64_t tokens = samples.inputs.rows(), cols = samples.inputs.cols();
  const int64_t outputs = samples.errors.cols();
  Standardised s;
  std::vector<double> squares(static_cast<size_t>(cols));
  std::vector<double> log_rms;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < cols; ++j) squares[j] += std::pow(samples.inputs(t, j), 2);
    log_rms.push_back(LogRms(samples.inputs.Row(t), cols));
  }
  // A channel that hardly fires must not get a weight that fp16 cannot hold.
  const double n = static_cast<double>(tokens);
  const double mean_square = std::accumulate(squares.begin(), squares.end(), 0.0) / n / cols;
  for (int64_t j = 0; j < cols; ++j) {
    s.channel_size.push_back(
        static_cast<float>(std::sqrt(std::max({squares[j] / n, 1e-4 * mean_square, 1e-20}))));
  }
  double sum = 0, sum_squares = 0;
  for (const double v : log_rms) sum += v, sum_squares += v * v;
  s.log_rms_mean = static_cast<float>(sum / n);
  s.log_rms_size =
      static_cast<float>(std::sqrt(std::max(sum_squares / n - (sum / n) * (sum / n), 1e-6)));
  s.inputs = Matrix(tokens, cols + 1);
  s.targets = Matrix(tokens, outputs);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < cols; ++j) {
      s.inputs(t, j) = samples.inputs(t, j) / s.channel_size[j];
    }
    s.inputs(t, cols) = (static_cast<float>(log_rms[t]) - s.log_rms_mean) / s.log_rms_size;
  }
  for (int64_t o = 0; o < outputs; ++o) {
    double total = 0, mean = 0, square = 0;
    for (int64_t t = 0; t < tokens; ++t) total += samples.errors(t, o);
    const double floor = std::max(1e-6 * total / n, 1e-30);
    for (int64_t t = 0; t < tokens; ++t) {
      const double y = std::log(samples.errors(t, o) + floor);
      s.targets(t, o) = static_cast<float>(y);
      mean += y / n;
      square += y * y / n;
    }
    s.target_mean.push_back(static_cast<float>(mean));
    s.target_size.push_back(static_cast<float>(std::sqrt(std::max(square - mean * mean, 1e-6))));
    for (int64_t t = 0; t < tokens; ++t) {
      s.targets(t, o) = (s.targets(t, o) - s.target_mean[o]) / s.target_size[o];
    }
  }
  return s;
}

struct Network {
  Network(int64_t inputs, int64_t hidden, int64_t outputs, std::mt19937_64& random)
      : w1(hidden, inputs), b1(1, hidden), w2(outputs, hidden), b2(1, outputs) {
    const float scale1 = 1.0f / std::sqrt(static_cast<float>(inputs));
    const float scale2 = 1.0f / std::sqrt(static_cast<float>(hidden));
    for (int64_t i = 0; i < w1.value.size(); ++i) w1.value.data()[i] = scale1 * Normal(random);
    for (int64_t i = 0; i < w2.value.size(); ++i) w2.value.data()[i] = scale2 * Normal(random);
  }

  // One step on a batch of rows: mean squared error.
  void Train(ConstMatrixView x, ConstMatrixView y, float rate, int step) {
    const int64_t n = x.rows, hidden = w1.value.rows(), outputs = w2.value.rows();
    Matrix pre(n, hidden), act(n, hidden), d_out(n, outputs), d_act(n, hidden);
    MultiplyTransposed(x, w1.value, pre);
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t h = 0; h < hidden; ++h) {
        pre(t, h) += b1.value(0, h);
        act(t, h) = pre(t, h) * Sigmoid(pre(t, h));
      }
    }
    MultiplyTransposed(act, w2.value, d_out);
    const float scale = 2.0f / static_cast<float>(n * outputs);
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t o = 0; o < outputs; ++o) {
        d_out(t, o) = scale * (d_out(t, o) + b2.value(0, o) - y.Row(t)[o]);
        b2.gradient(0, o) += d_out(t, o);
      }
    }
    TransposedMultiply(d_out, act, w2.gradient);
    Multiply(d_out, w2.value, d_act);
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t h = 0; h < hidden; ++h) {
        const float s = Sigmoid(pre(t, h));
        d_act(t, h) *= s * (1 + pre(t, h) * (1 - s));
        b1.gradient(0, h) += d_act(t, h);
      }
    }
    TransposedMultiply(d_act, x, w1.gradient);
    for (Parameter* p : {&w1, &b1, &w2, &b2}) p->Step(rate, step);
  }

  Parameter w1, b1, w2, b2;
};

// The network on raw inputs and raw log errors.
RouterWeights Unstandardised(const Network& network, const Standardised& s) {
  const int64_t hidden = network.w1.value.rows(), cols = network.w1.value.cols() - 1;
  const int64_t outputs = network.w2.value.rows();
  RouterWeights router;
  router.w1 = Matrix(hidden, cols);
  router.w2 = Matrix(outputs, hidden);
  for (int64_t h = 0; h < hidden; ++h) {
    for (int64_t j = 0; j < cols; ++j) {
      const float value = network.w1.value(h, j) / s.channel_size[j];
      router.w1(h, j) = HalfToFloat(FloatToHalf(std::clamp(value, -60000.0f, 60000.0f)));
    }
    const float slope = network.w1.value(h, cols) / s.log_rms_size;
    router.u.push_back(slope);
    router.b1.push_back(network.b1.value(0, h) - slope * s.log_rms_mean);
  }
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t h = 0; h < hidden; ++h) {
      router.w2(o, h) = network.w2.value(o, h) * s.target_size[o];
    }
    router.b2.push_back(network.b2.value(0, o) * s.target_size[o] + s.target_mean[o]);
  }
  return router;
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
  const Standardised s = Standardise(samples);
  const int64_t tokens = s.inputs.rows();
  const int64_t batch = std::min<int64_t>(options.batch, tokens);
  std::mt19937_64 random(options.seed);
  Network network(s.inputs.cols(), options.num_hidden, s.targets.cols(), random);
  std::vector<int64_t> order(static_cast<size_t>(tokens));
  std::iota(order.begin(), order.end(), 0);
  const int64_t batches = tokens / batch;
  const int steps = static_cast<int>(batches * options.epochs);
  Matrix x(batch, s.inputs.cols()), y(batch, s.targets.cols());
  for (int step = 0; step < steps; ++step) {
    const int64_t at = step % batches * batch;
    if (at == 0) {
      for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
    }
    for (int64_t t = 0; t < batch; ++t) {
      std::copy_n(s.inputs.Row(order[at + t]), x.cols(), x.Row(t));
      std::copy_n(s.targets.Row(order[at + t]), y.cols(), y.Row(t));
    }
    const float progress = static_cast<float>(step) / static_cast<float>(steps);
    const float rate = options.learning_rate * 0.5f * (1 + std::cos(3.14159265f * progress));
    network.Train(x, y, rate, step + 1);
  }
  RouterWeights router = Unstandardised(network, s);
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
