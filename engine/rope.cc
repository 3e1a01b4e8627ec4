#include "engine/rope.h"

#include <cmath>
#include <numbers>

namespace mobi {
namespace {

// Long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
double ScaleLlama3(double frequency, const RopeScaling& scaling) {
  const double original = scaling.original_max_position_embeddings;
  const double wavelength = 2 * std::numbers::pi / frequency;
  if (wavelength < original / scaling.high_freq_factor) return frequency;
  if (wavelength > original / scaling.low_freq_factor) return frequency / scaling.factor;
  const double smooth = (original / wavelength - scaling.low_freq_factor) /
                        (scaling.high_freq_factor - scaling.low_freq_factor);
  return (1 - smooth) * frequency / scaling.factor + smooth * frequency;
}

}  // namespace

std::vector<float> RopeInverseFrequencies(const ModelConfig& config) {
  const int half = config.head_dim / 2;
  std::vector<float> frequencies(half);
  for (int i = 0; i < half; ++i) {
    double frequency = std::pow(config.rope_theta, -2.0 * i / config.head_dim);
    if (config.rope_scaling.has_value()) frequency = ScaleLlama3(frequency, *config.rope_scaling);
    frequencies[i] = static_cast<float>(frequency);
  }
  return frequencies;
}

RopeValues ComputeRope(const ModelConfig& config, int max_positions) {
  const std::vector<float> frequencies = RopeInverseFrequencies(config);
  RopeValues values;
  values.cos.reserve(max_positions * frequencies.size());
  values.sin.reserve(max_positions * frequencies.size());
  for (int position = 0; position < max_positions; ++position) {
    for (const float frequency : frequencies) {
      // The product is rounded to float first, as the model was trained with.
      const double angle = static_cast<float>(position) * frequency;
      values.cos.push_back(static_cast<float>(std::cos(angle)));
      values.sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  return values;
}

}  // namespace mobi
