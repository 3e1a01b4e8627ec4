// One linear's nested code while it is being fitted: an 8-bit code per weight and, for each level,
// a (range, offset) pair per row and group of 128 columns (kernels/sliced_weight.h has the
// formula). Pairs are floats that fp16 holds exactly. Rows are independent of each other.
#ifndef MOBI_CALIBRATOR_NESTED_WEIGHT_H_
#define MOBI_CALIBRATOR_NESTED_WEIGHT_H_

#include <array>
#include <cstdint>
#include <vector>

#include "calibrator/matrix.h"
#include "engine/model.h"
#include "kernels/bit_slice.h"

namespace mobi {

struct LevelScale {
  float range = 0;
  float offset = 0;
};

// The pair of a level as the search uses it: value(Q_k) = base + step * Q_k.
struct LevelGrid {
  float base = 0;
  float step = 0;
};

LevelGrid GridOf(LevelScale scale, int level);

// The fp16 pair nearest to `center`, the value in the middle of the range, and `range` >= 0.
LevelScale RoundedScale(double range, double center);

struct NestedWeight {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<uint8_t> codes;                              // [rows, cols]
  std::array<std::vector<LevelScale>, kNumLevels> scales;  // [rows, groups]

  NestedWeight() = default;
  NestedWeight(int64_t rows, int64_t cols);

  int64_t groups() const { return cols / kGroupSize; }
  uint8_t* Codes(int64_t row) { return codes.data() + row * cols; }
  const uint8_t* Codes(int64_t row) const { return codes.data() + row * cols; }
  LevelScale& Scale(int level, int64_t row, int64_t group) {
    return scales[level - 1][row * groups() + group];
  }
  LevelScale Scale(int level, int64_t row, int64_t group) const {
    return scales[level - 1][row * groups() + group];
  }
};

// The linear groups of one decoder block.
struct FittedBlock {
  std::array<NestedWeight, kNumLinearGroups> linear;
};

// codes [kGroupSize] of one group of weights in the pair's range; those beyond it are its ends.
void EncodeGroup(const float* weights, LevelScale pair, uint8_t* codes);

// out[rows, cols] = W_level; `row` into `out` [cols].
void DequantizeRow(const NestedWeight& weight, int64_t row, int level, float* out);
Matrix Dequantize(const NestedWeight& weight, int level, int num_threads = 1);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_NESTED_WEIGHT_H_
