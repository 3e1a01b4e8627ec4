#include "calibrator/packing.h"

#include "kernels/numeric.h"
#include "kernels/sliced_weight.h"

namespace mobi {

SlicedTensors PackedLinear::view() const {
  SlicedTensors tensors;
  tensors.rows = rows;
  tensors.cols = cols;
  for (int i = 0; i < kNumSlices; ++i) {
    tensors.slices[i] = slices[i];
    tensors.scales[i] = scales[i];
  }
  return tensors;
}

PackedLinear PackLinear(const NestedWeight& weight, int64_t begin, int64_t rows) {
  PackedLinear packed;
  packed.rows = rows;
  packed.cols = weight.cols;
  uint8_t* slices[kNumSlices];
  for (int i = 0; i < kNumSlices; ++i) {
    packed.slices[i].resize(SliceBytes(rows, weight.cols));
    slices[i] = packed.slices[i].data();
  }
  PackSlices(weight.Codes(begin), rows, weight.cols, slices);
  for (int level = 1; level <= kNumLevels; ++level) {
    std::vector<uint16_t>& scales = packed.scales[level - 1];
    scales.resize(ScaleBytes(rows, weight.cols) / sizeof(uint16_t));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t g = 0; g < weight.groups(); ++g) {
        const LevelScale scale = weight.Scale(level, begin + row, g);
        const int64_t at = 2 * ScaleIndex(row, g, weight.cols);
        scales[at] = FloatToHalf(scale.range);
        scales[at + 1] = FloatToHalf(scale.offset);
      }
    }
  }
  return packed;
}

void UnpackLinear(const SlicedTensors& linear, int64_t begin, NestedWeight& weight) {
  const uint8_t* slices[kNumSlices];
  for (int i = 0; i < kNumSlices; ++i) slices[i] = linear.slices[i].data();
  UnpackSlices(slices, linear.rows, linear.cols, kNumLevels, weight.Codes(begin));
  for (int level = 1; level <= kNumLevels; ++level) {
    const uint16_t* scales = linear.scales[level - 1].data();
    for (int64_t row = 0; row < linear.rows; ++row) {
      for (int64_t g = 0; g < weight.groups(); ++g) {
        const uint16_t* pair = scales + 2 * ScaleIndex(row, g, linear.cols);
        weight.Scale(level, begin + row, g) = {HalfToFloat(pair[0]), HalfToFloat(pair[1])};
      }
    }
  }
}

}  // namespace mobi
