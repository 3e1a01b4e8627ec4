// What CUDA kernels make of slice words, on the host: the same functions.
#ifdef MOBI_WITH_CUDA

#include <cstdint>
#include <random>

#include "gtest/gtest.h"
#include "kernels/bit_slice.h"
#include "kernels/cuda/sliced_matmul_unpack.cuh"
#include "kernels/numeric.h"

namespace mobi::cuda {
namespace {

// A tile of random codes and its words, slice by slice.
struct Tile {
  uint8_t codes[kTileRows][kGroupSize];
  uint32_t words[kNumSlices][kTileWords];

  explicit Tile(uint32_t seed) {
    std::mt19937 random(seed);
    for (auto& row : codes) {
      for (uint8_t& code : row) code = static_cast<uint8_t>(random());
    }
    uint8_t* slices[kNumSlices];
    for (int s = 0; s < kNumSlices; ++s) slices[s] = reinterpret_cast<uint8_t*>(words[s]);
    PackSlices(codes[0], kTileRows, kGroupSize, slices);
  }

  template <int level>
  void Take(int word, uint32_t (&slices)[level]) const {
    for (int s = 0; s < level; ++s) slices[s] = words[s][word];
  }
};

// Calls with row g, the first of the word's eight columns, and the word.
template <typename Call>
void ForEachWord(const Call& call) {
  for (int word = 0; word < kTileWords; ++word) {
    const int lane = word / 4;
    call(lane / 4, 32 * (lane % 4) + 8 * (word % 4), word);
  }
}

template <int level>
void CheckBytes(const Tile& tile) {
  ForEachWord([&](int row, int col, int word) {
    uint32_t slices[level], four[kNumLevels], a[4], all[4];
    tile.Take(word, slices);
    UnpackBytes<level>(slices, a);
    tile.Take(word, four);
    UnpackBytes<kNumLevels>(four, all);
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(all[i] & BytesOfLevel(level), a[i]);
      for (int b = 0; b < 4; ++b) {
        const int code = tile.codes[row + i % 2 * 8][col + ByteColumn(i / 2 * 4 + b)];
        EXPECT_EQ(a[i] >> (8 * b) & 0xFF, code & (0xFF << (8 - BitsOfLevel(level)) & 0xFF))
            << "level " << level << ", word " << word << ", register " << i << ", byte " << b;
      }
    }
  });
}

TEST(Unpack, BytesAreCodesInTheOrderOfTheirColumns) {
  for (uint32_t seed = 0; seed < 4; ++seed) {
    const Tile tile(seed);
    CheckBytes<1>(tile);
    CheckBytes<2>(tile);
    CheckBytes<3>(tile);
    CheckBytes<4>(tile);
  }
}

template <int level>
void CheckHalves(const Tile& tile) {
  ForEachWord([&](int row, int col, int word) {
    uint32_t slices[level], fragments[8];
    tile.Take(word, slices);
    Unpack<level>(slices, fragments);
    for (int i = 0; i < 8; ++i) {
      const int pair = i / 2, h = i % 2;
      for (int e = 0; e < 2; ++e) {
        const int code = CodeAtLevel(tile.codes[row + 8 * h][col + 2 * pair + e], level);
        const float bias = level == 1 ? LevelOneBias(pair, h) : 4.0f;
        EXPECT_EQ(HalfToFloat(static_cast<uint16_t>(fragments[i] >> (16 * e))),
                  bias + static_cast<float>(code) / static_cast<float>(1 << BitsOfLevel(level)))
            << "level " << level << ", word " << word << ", fragment " << i << ", element " << e;
      }
    }
  });
}

TEST(Unpack, HalvesAreCodesBesideTheirBias) {
  const Tile tile(11);
  CheckHalves<1>(tile);
  CheckHalves<2>(tile);
  CheckHalves<3>(tile);
  CheckHalves<4>(tile);
}

}  // namespace
}  // namespace mobi::cuda

#endif  // MOBI_WITH_CUDA
