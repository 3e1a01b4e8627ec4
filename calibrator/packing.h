// From a fitted linear to the tensors of a checkpoint: codes cut into slices, pairs in fp16, both
// in the order of kernels/bit_slice.h and kernels/sliced_weight.h. Pure.
#ifndef MOBI_CALIBRATOR_PACKING_H_
#define MOBI_CALIBRATOR_PACKING_H_

#include <array>
#include <cstdint>
#include <vector>

#include "calibrator/nested_weight.h"
#include "engine/checkpoint.h"

namespace mobi {

struct PackedLinear {
  int64_t rows = 0;
  int64_t cols = 0;
  std::array<std::vector<uint8_t>, kNumSlices> slices;
  std::array<std::vector<uint16_t>, kNumLevels> scales;

  SlicedTensors view() const;
};

// Rows [begin, begin + rows) of a group's stacked linears.
PackedLinear PackLinear(const NestedWeight& weight, int64_t begin, int64_t rows);
// The reverse: rows from `begin` on of `weight`, which is large enough, take over the linear.
void UnpackLinear(const SlicedTensors& linear, int64_t begin, NestedWeight& weight);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_PACKING_H_
