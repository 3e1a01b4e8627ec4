// A linear group whose tokens read different levels, in fp32 on the host: every level dequantized,
// tokens gathered by level, one product each. The calibrator's counterpart of SlicedMatmul, with
// the backward pass. Thread-safe but for Refresh.
#ifndef MOBI_CALIBRATOR_MIXED_LINEAR_H_
#define MOBI_CALIBRATOR_MIXED_LINEAR_H_

#include <array>
#include <cstdint>
#include <vector>

#include "calibrator/linear_algebra.h"
#include "calibrator/matrix.h"
#include "calibrator/nested_weight.h"

namespace mobi {

class MixedLinear {
 public:
  // `segment_rows`: out-features of the linears stacked in `weight`.
  MixedLinear(const NestedWeight& weight, std::vector<int64_t> segment_rows, int num_threads = 1);

  int num_segments() const { return static_cast<int>(segment_rows_.size()); }
  int64_t rows() const { return levels_[0].get().rows(); }
  int64_t cols() const { return levels_[0].get().cols(); }
  const Matrix& level(int level) const { return levels_[level - 1]; }
  // Rows [first, first + count) of a segment.
  int64_t SegmentBegin(int segment) const;
  int64_t SegmentRows(int segment) const { return segment_rows_[segment]; }

  // out [tokens, rows] = x through levels[segment * x.rows + token] in 1..4.
  void Forward(ConstMatrixView x, const uint8_t* levels, MatrixView out) const;
  // d_x = d_out through the same levels.
  void Backward(ConstMatrixView d_out, const uint8_t* levels, MatrixView d_x) const;
  // The gradient at a segment's weights of `level`: over the tokens that read it; empty where none
  // does.
  Matrix WeightGradient(int segment, ConstMatrixView x, ConstMatrixView d_out,
                        const uint8_t* levels, int level) const;
  // Takes over the level's values after a change of its pairs. Not while others read.
  void Refresh(const NestedWeight& weight, int level);

 private:
  std::vector<int64_t> segment_rows_;
  std::array<KeptMatrix, kNumLevels> levels_;
};

// Levels for `count` places drawn by `shares`, the same whenever the key is.
std::vector<uint8_t> DrawLevels(const std::array<uint64_t, 3>& key,
                                const std::array<double, kNumLevels>& shares, size_t count);

// Tokens of each level, ascending.
std::array<std::vector<int64_t>, kNumLevels> TokensByLevel(const uint8_t* levels, int64_t tokens);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_MIXED_LINEAR_H_
