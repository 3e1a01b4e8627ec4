#include "calibrator/router_network.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "calibrator/vector_math.h"
#include "kernels/numeric.h"

namespace mobi {
namespace {

// Adam moves a weight by about the rate, however small its gradient: the sum over more inputs than
// this would go too far at a time, to where a unit's slope is zero and it learns no more.
constexpr float kFullRateInputs = 2048;

void Shuffle(std::vector<int64_t>& values, std::mt19937_64& random) {
  for (size_t i = values.size() - 1; i > 0; --i) std::swap(values[i], values[random() % (i + 1)]);
}

}  // namespace

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

RouterInputs::RouterInputs(const Matrix& inputs, std::mt19937_64& random)
    : order_(static_cast<size_t>(inputs.rows())) {
  const int64_t tokens = inputs.rows(), cols = inputs.cols();
  std::iota(order_.begin(), order_.end(), 0);
  Shuffle(order_, random);
  std::vector<double> squares(static_cast<size_t>(cols));
  std::vector<float> log_rms;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = inputs.Row(t);
    for (int64_t j = 0; j < cols; ++j) squares[j] += double{row[j]} * row[j];
    log_rms.push_back(LogRms(row, cols));
  }
  // A channel that hardly fires must not get a weight that fp16 cannot hold.
  const double n = static_cast<double>(tokens);
  const double mean_square = std::accumulate(squares.begin(), squares.end(), 0.0) / n / cols;
  for (int64_t j = 0; j < cols; ++j) {
    channel_size_.push_back(
        static_cast<float>(std::sqrt(std::max({squares[j] / n, 1e-4 * mean_square, 1e-20}))));
  }
  double sum = 0, sum_squares = 0;
  for (const double v : log_rms) sum += v, sum_squares += v * v;
  log_rms_mean_ = static_cast<float>(sum / n);
  log_rms_size_ =
      static_cast<float>(std::sqrt(std::max(sum_squares / n - (sum / n) * (sum / n), 1e-6)));
  Matrix values = Matrix::Unfilled(tokens, cols + 1);
  for (int64_t i = 0; i < tokens; ++i) {
    const float* from = inputs.Row(order_[i]);
    float* to = values.Row(i);
    for (int64_t j = 0; j < cols; ++j) to[j] = from[j] / channel_size_[j];
    to[cols] = (log_rms[order_[i]] - log_rms_mean_) / log_rms_size_;
  }
  values_ = KeptMatrix(std::move(values));
}

void RouterInputs::Unstandardise(const Matrix& w1, const Matrix& b1, RouterWeights& router) const {
  const int64_t hidden = w1.rows(), cols = w1.cols() - 1;
  router.w1 = Matrix(hidden, cols);
  for (int64_t h = 0; h < hidden; ++h) {
    for (int64_t j = 0; j < cols; ++j) {
      const float value = w1(h, j) / channel_size_[j];
      router.w1(h, j) = HalfToFloat(FloatToHalf(std::clamp(value, -60000.0f, 60000.0f)));
    }
    const float slope = w1(h, cols) / log_rms_size_;
    router.u.push_back(slope);
    router.b1.push_back(b1(0, h) - slope * log_rms_mean_);
  }
}

Parameter::Parameter(int64_t rows, int64_t cols) : value(rows, cols), gradient(rows, cols) {
  first_ = second_ = std::vector<float>(static_cast<size_t>(rows * cols));
}

void Parameter::Step(float rate, int step) {
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

RouterNetwork::RouterNetwork(int64_t inputs, int64_t hidden, int64_t outputs,
                             std::mt19937_64& random)
    : w1(hidden, inputs), b1(1, hidden), w2(outputs, hidden), b2(1, outputs) {
  const float scale1 = 1.0f / std::sqrt(static_cast<float>(inputs));
  const float scale2 = 1.0f / std::sqrt(static_cast<float>(hidden));
  for (int64_t i = 0; i < w1.value.size(); ++i) w1.value.data()[i] = scale1 * Normal(random);
  for (int64_t i = 0; i < w2.value.size(); ++i) w2.value.data()[i] = scale2 * Normal(random);
}

void RouterNetwork::Train(const RouterInputs& inputs, const RouterTrainingOptions& options,
                          std::mt19937_64& random, LossFn loss) {
  const int64_t batch = std::min<int64_t>(options.batch, inputs.tokens());
  std::vector<int64_t> batches(static_cast<size_t>(inputs.tokens() / batch));
  std::iota(batches.begin(), batches.end(), 0);
  const int steps = static_cast<int>(std::ssize(batches) * options.epochs);
  for (int step = 0; step < steps; ++step) {
    const size_t of_epoch = static_cast<size_t>(step) % batches.size();
    if (of_epoch == 0) Shuffle(batches, random);
    const int64_t first = batches[of_epoch] * batch;
    const float progress = static_cast<float>(step) / static_cast<float>(steps);
    const float rate = options.learning_rate * 0.5f * (1 + std::cos(3.14159265f * progress));
    Step(inputs.Order() + first, inputs.Rows(first, batch), progress, rate, step + 1, loss);
  }
}

void RouterNetwork::Step(const int64_t* tokens, ConstMatrixView x, double progress, float rate,
                         int step, LossFn loss) {
  const int64_t n = x.rows, hidden = w1.value.rows(), outputs = w2.value.rows();
  Matrix pre(n, hidden), act(n, hidden), out(n, outputs), d_act(n, hidden);
  MultiplyTransposed(x, w1.value, pre);
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t h = 0; h < hidden; ++h) {
      pre(t, h) += b1.value(0, h);
      act(t, h) = pre(t, h) * Sigmoid(pre(t, h));
    }
  }
  MultiplyTransposed(act, w2.value, out);
  for (int64_t t = 0; t < n; ++t) AddScaled(out.Row(t), b2.value.data(), 1, outputs);
  loss(tokens, progress, out);
  for (int64_t t = 0; t < n; ++t) AddScaled(b2.gradient.data(), out.Row(t), 1, outputs);
  TransposedMultiply(out, act, w2.gradient);
  Multiply(out, w2.value, d_act);
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t h = 0; h < hidden; ++h) {
      const float s = Sigmoid(pre(t, h));
      d_act(t, h) *= s * (1 + pre(t, h) * (1 - s));
      b1.gradient(0, h) += d_act(t, h);
    }
  }
  TransposedMultiply(d_act, x, w1.gradient);
  w1.Step(rate * std::min(1.0f, kFullRateInputs / static_cast<float>(x.cols)), step);
  for (Parameter* p : {&b1, &w2, &b2}) p->Step(rate, step);
}

}  // namespace mobi
