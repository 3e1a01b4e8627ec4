// One routed linear's weight as kernels see it: four slice streams and, per level, a range and an
// offset for every group. Several linears that share an input (q, k, v; gate, up) are stacked by
// rows into one weight; each of them is a segment with a level of its own.
// Views only: the memory belongs to whoever allocated it. Source: MoBiQuant (arXiv 2602.20191) with
// a (range, offset) pair refitted for each level, and routing by predicted loss.
#ifndef MOBI_KERNELS_SLICED_WEIGHT_H_
#define MOBI_KERNELS_SLICED_WEIGHT_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "kernels/bit_slice.h"
#include "kernels/tensor.h"

namespace mobi {

inline constexpr int kMaxSegments = 3;

// The weight at level k:  W = offset_k + range_k * (Q_k + 1/2) / 4^k,  per row and group of 128.
// Ranges are stored instead of steps so that every level's values keep fp16's full precision.
struct SlicedWeight {
  int64_t rows = 0;  // all segments together; a multiple of kTileRows
  int64_t cols = 0;  // a multiple of kGroupSize
  // slices[s]: SliceBytes(rows, cols) in the packing of bit_slice.h.
  std::array<const uint8_t*, kNumSlices> slices{};
  // scales[k - 1]: fp16 pairs {range, offset} in the order [row tile][group][row of tile][2].
  std::array<const uint16_t*, kNumLevels> scales{};
  int num_segments = 1;
  std::array<int64_t, kMaxSegments> segment_end{};  // rows; the last one is `rows`
};

constexpr size_t ScaleBytes(int64_t rows, int64_t cols) {
  return static_cast<size_t>(PaddedRows(rows) * (cols / kGroupSize)) * 4;
}

// Index of the {range, offset} pair of (row, group) in scales[k - 1], in pairs.
constexpr int64_t ScaleIndex(int64_t row, int64_t group, int64_t cols) {
  return ((row / kTileRows) * (cols / kGroupSize) + group) * kTileRows + row % kTileRows;
}

// The router of one distinct input: a two-layer MLP
//   hidden = silu(W1 x + b1 + u log(rms(x)))        [num_hidden]
//   score  = W2 hidden + b2                         [num_segments * kNumLevels]
// exp(score) of (segment, level) is the loss predicted to remain when the segment's linear is read
// at that level. A token reads the level that minimises exp(score) + price * bytes (see
// Backend::Route).
struct Router {
  int num_hidden = 0;
  Tensor w1;  // [num_hidden, cols], fp16
  Tensor b1;  // [1, num_hidden], fp32
  Tensor u;   // [1, num_hidden], fp32
  Tensor w2;  // [num_segments * kNumLevels, num_hidden], fp32
  Tensor b2;  // [1, num_segments * kNumLevels], fp32
  // What reading a segment at level 1..4 moves: slices and one level's scales.
  std::array<std::array<float, kNumLevels>, kMaxSegments> bytes{};
};

struct RoutedWeight {
  SlicedWeight weight;
  Router router;
};

// Bytes that one read of `rows` x `cols` at `level` moves.
constexpr double BytesAtLevel(int64_t rows, int64_t cols, int level) {
  return static_cast<double>(SliceBytes(rows, cols)) * level +
         static_cast<double>(ScaleBytes(rows, cols));
}

}  // namespace mobi

#endif  // MOBI_KERNELS_SLICED_WEIGHT_H_
