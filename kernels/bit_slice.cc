#include "kernels/bit_slice.h"

#include <cstring>

namespace mobi {
namespace {

// Bytes, not words, are addressed so that a mapped file needs no alignment and the format is
// little-endian everywhere.
struct BytePosition {
  size_t byte;
  int shift;
};

BytePosition Locate(int64_t row, int64_t col, int64_t cols) {
  const int64_t tile = (row / kTileRows) * (cols / kGroupSize) + col / kGroupSize;
  const BitPosition in_tile =
      PositionInTile(static_cast<int>(row % kTileRows), static_cast<int>(col % kGroupSize));
  return {static_cast<size_t>(tile * kTileBytes + in_tile.word * 4 + in_tile.shift / 8),
          in_tile.shift % 8};
}

}  // namespace

void PackSlices(const uint8_t* codes, int64_t rows, int64_t cols,
                uint8_t* const slices[kNumSlices]) {
  for (int s = 0; s < kNumSlices; ++s) std::memset(slices[s], 0, SliceBytes(rows, cols));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      const BytePosition at = Locate(row, col, cols);
      const int code = codes[row * cols + col];
      for (int s = 0; s < kNumSlices; ++s) {
        slices[s][at.byte] |= static_cast<uint8_t>(SliceOfCode(code, s) << at.shift);
      }
    }
  }
}

void UnpackSlices(const uint8_t* const slices[kNumSlices], int64_t rows, int64_t cols, int level,
                  uint8_t* codes) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      const BytePosition at = Locate(row, col, cols);
      int code = 0;
      for (int s = 0; s < level; ++s)
        code = code << kSliceBits | ((slices[s][at.byte] >> at.shift) & 3);
      codes[row * cols + col] = static_cast<uint8_t>(code << (kSliceBits * (kNumSlices - level)));
    }
  }
}

}  // namespace mobi
