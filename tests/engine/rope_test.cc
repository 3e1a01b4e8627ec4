#include "engine/rope.h"

#include <gtest/gtest.h>

#include <cmath>

namespace mobi {
namespace {

ModelConfig Llama31() {
  ModelConfig config;
  config.head_dim = 128;
  config.rope_theta = 500000.0;
  config.rope_scaling = RopeScaling{8.0f, 1.0f, 4.0f, 8192};
  return config;
}

TEST(Rope, UnscaledFrequenciesAreAGeometricSeries) {
  ModelConfig config = Llama31();
  config.rope_scaling.reset();
  const auto frequencies = RopeInverseFrequencies(config);
  ASSERT_EQ(frequencies.size(), 64u);
  EXPECT_FLOAT_EQ(frequencies[0], 1.0f);
  EXPECT_FLOAT_EQ(frequencies[32], static_cast<float>(1 / std::sqrt(500000.0)));
}

// Values of transformers' _compute_llama3_parameters for Llama 3.1: the first kept, the last
// divided by 8, those between interpolated.
TEST(Rope, Llama3ScalingKeepsShortAndStretchesLongWavelengths) {
  const auto frequencies = RopeInverseFrequencies(Llama31());
  const std::vector<std::pair<int, double>> expected = {{0, 1},
                                                        {20, 0.0165604401},
                                                        {28, 0.00321144599},
                                                        {29, 0.00216657076},
                                                        {30, 0.00137189357},
                                                        {33, 0.00031269375},
                                                        {35, 9.55621235e-05},
                                                        {40, 3.4281022e-05},
                                                        {63, 3.06892599e-07}};
  for (const auto& [index, value] : expected) {
    EXPECT_NEAR(frequencies[index], value, value * 1e-6) << index;
  }
}

TEST(Rope, TableHoldsCosAndSinOfPositionTimesFrequency) {
  const ModelConfig config = Llama31();
  const RopeValues values = ComputeRope(config, 7);
  const auto frequencies = RopeInverseFrequencies(config);
  ASSERT_EQ(values.cos.size(), 7u * 64);
  for (int p = 0; p < 7; ++p) {
    for (int i = 0; i < 64; ++i) {
      EXPECT_NEAR(values.cos[p * 64 + i], std::cos(p * double{frequencies[i]}), 1e-6);
      EXPECT_NEAR(values.sin[p * 64 + i], std::sin(p * double{frequencies[i]}), 1e-6);
    }
  }
}

}  // namespace
}  // namespace mobi
