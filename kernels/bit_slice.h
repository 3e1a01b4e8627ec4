// THE packing of 2-bit slices: the one place that knows where a weight's bits lie. The calibrator
// writes it, the CPU and CUDA kernels read it. Pure functions, safe from any thread.
// Source: MoBiQuant (arXiv 2602.20191) for the nested code; the order of bits is ours, chosen so
// that one 16-byte load per GPU lane is exactly one operand tile of mma.m16n8k16 for one group.
//
// A weight matrix [rows, cols] is cut into tiles of 16 rows x 128 columns (one group of columns).
// One slice of one tile is 512 bytes: 32 lanes of four 32-bit words. Tiles are stored row tile by
// row tile, the groups of a row tile one after another, so rows stack by concatenation.
//   lane = 4 g + t holds rows g and g + 8, columns 32 t .. 32 t + 31;
//   word w of the lane holds columns 32 t + 8 w .. + 7 of both rows;
//   in a word, column pair p (columns 2p, 2p + 1) of row g + 8 h sits at bit kPairShift[p][h] (even
//   column) and 16 bits above it (odd column).
#ifndef MOBI_KERNELS_BIT_SLICE_H_
#define MOBI_KERNELS_BIT_SLICE_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace mobi {

inline constexpr int kNumSlices = 4;
inline constexpr int kSliceBits = 2;
inline constexpr int kNumLevels = kNumSlices;  // level k = 1..4 reads the first k slices
inline constexpr int kGroupSize = 128;
inline constexpr int kTileRows = 16;
inline constexpr int kTileWords = kTileRows * kGroupSize * kSliceBits / 32;  // 128
inline constexpr int kTileBytes = kTileWords * 4;                            // 512

// Bit position of column pair p in row g + 8 h. A field at bit b in {8, 6, 4, 2, 0} of a half with
// exponent 2^(8 - b) reads as 2^(8 - b) + q / 4: see kernels/cuda. Fields at 10, 12 and 14 become
// such fields after one shift by 6.
inline constexpr int kPairShift[4][2] = {{8, 6}, {4, 2}, {0, 14}, {12, 10}};

constexpr int BitsOfLevel(int level) { return kSliceBits * level; }

// The leading `level` slices of an 8-bit code: truncation, never re-rounding.
constexpr int CodeAtLevel(int code, int level) {
  return code >> (kSliceBits * (kNumSlices - level));
}

// The 2-bit field of slice 0 (most significant) .. 3.
constexpr int SliceOfCode(int code, int slice) {
  return (code >> (kSliceBits * (kNumSlices - 1 - slice))) & 3;
}

// The fraction (Q_k + 1/2) / 4^k of its range at which a code is reconstructed at a level.
constexpr float FractionAtLevel(int code, int level) {
  return (static_cast<float>(CodeAtLevel(code, level)) + 0.5f) /
         static_cast<float>(1 << (kSliceBits * level));
}

// The 8-bit code of weight w in a range [lo, lo + range), range > 0.
inline int EncodeWeight(float w, float lo, float range) {
  const float q = std::floor((w - lo) / range * 256.0f);
  return static_cast<int>(std::clamp(q, 0.0f, 255.0f));
}

struct BitPosition {
  int word;   // in the tile's kTileWords words
  int shift;  // of the 2-bit field's low bit
};

// Where weight (row, col) of a tile lies; row in [0, 16), col in [0, 128).
constexpr BitPosition PositionInTile(int row, int col) {
  const int g = row % 8, h = row / 8, t = col / 32, w = (col / 8) % 4;
  return {(4 * g + t) * 4 + w, kPairShift[(col / 2) % 4][h] + 16 * (col % 2)};
}

constexpr int64_t PaddedRows(int64_t rows) {
  return (rows + kTileRows - 1) / kTileRows * kTileRows;
}

// Bytes of one slice of a [rows, cols] weight; cols is a multiple of kGroupSize.
constexpr size_t SliceBytes(int64_t rows, int64_t cols) {
  return static_cast<size_t>(PaddedRows(rows) * cols / 4);
}

// Packs codes[rows, cols] into four slices of SliceBytes(rows, cols) each; rows of padding are 0.
void PackSlices(const uint8_t* codes, int64_t rows, int64_t cols,
                uint8_t* const slices[kNumSlices]);

// Reads `level` slices back into codes[rows, cols]; bits below the level come back as 0.
void UnpackSlices(const uint8_t* const slices[kNumSlices], int64_t rows, int64_t cols, int level,
                  uint8_t* codes);

}  // namespace mobi

#endif  // MOBI_KERNELS_BIT_SLICE_H_
