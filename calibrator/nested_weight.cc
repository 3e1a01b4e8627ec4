#include "calibrator/nested_weight.h"

#include <algorithm>

#include "calibrator/parallel.h"
#include "calibrator/simd.h"
#include "kernels/numeric.h"

namespace mobi {
namespace {

constexpr double kHalfMax = 65504;

float RoundToHalf(double value) {
  return HalfToFloat(FloatToHalf(static_cast<float>(std::clamp(value, -kHalfMax, kHalfMax))));
}

}  // namespace

LevelGrid GridOf(LevelScale scale, int level) {
  const float step = scale.range / static_cast<float>(1 << BitsOfLevel(level));
  return {scale.offset + 0.5f * step, step};
}

LevelScale RoundedScale(double range, double center) {
  const float rounded = RoundToHalf(std::max(range, 0.0));
  return {rounded, RoundToHalf(center - 0.5 * rounded)};
}

NestedWeight::NestedWeight(int64_t rows, int64_t cols)
    : rows(rows), cols(cols), codes(static_cast<size_t>(rows * cols)) {
  for (auto& level : scales) level.resize(static_cast<size_t>(rows * groups()));
}

MOBI_VECTORIZED void EncodeGroup(const float* weights, LevelScale pair, uint8_t* codes) {
  const float scale = pair.range > 0 ? 256.0f / pair.range : 0.0f;
  for (int j = 0; j < kGroupSize; ++j) {
    const float q = std::clamp((weights[j] - pair.offset) * scale, 0.0f, 255.0f);
    codes[j] = static_cast<uint8_t>(static_cast<int>(q));
  }
}

void DequantizeRow(const NestedWeight& weight, int64_t row, int level, float* out) {
  const uint8_t* codes = weight.Codes(row);
  const int shift = kSliceBits * (kNumLevels - level);
  for (int64_t g = 0; g < weight.groups(); ++g) {
    const LevelGrid grid = GridOf(weight.Scale(level, row, g), level);
    for (int64_t j = g * kGroupSize; j < (g + 1) * kGroupSize; ++j) {
      out[j] = grid.base + grid.step * static_cast<float>(codes[j] >> shift);
    }
  }
}

Matrix Dequantize(const NestedWeight& weight, int level, int num_threads) {
  Matrix out = Matrix::Unfilled(weight.rows, weight.cols);
  ParallelFor(num_threads, weight.rows,
              [&](int64_t row) { DequantizeRow(weight, row, level, out.Row(row)); });
  return out;
}

}  // namespace mobi
