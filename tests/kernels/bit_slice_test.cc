#include "kernels/bit_slice.h"

#include <cstring>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace mobi {
namespace {

struct Packed {
  std::vector<uint8_t> bytes[kNumSlices];

  Packed(int64_t rows, int64_t cols) {
    for (auto& slice : bytes) slice.assign(SliceBytes(rows, cols), 0xAA);
  }
  std::array<uint8_t*, kNumSlices> Mutable() {
    return {bytes[0].data(), bytes[1].data(), bytes[2].data(), bytes[3].data()};
  }
  std::array<const uint8_t*, kNumSlices> View() const {
    return {bytes[0].data(), bytes[1].data(), bytes[2].data(), bytes[3].data()};
  }
};

std::vector<uint8_t> RandomCodes(std::mt19937& random, int64_t count) {
  std::vector<uint8_t> codes(count);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random());
  return codes;
}

TEST(BitSlice, EveryWeightOfATileHasItsOwnBits) {
  std::set<std::pair<int, int>> taken;
  for (int row = 0; row < kTileRows; ++row) {
    for (int col = 0; col < kGroupSize; ++col) {
      const BitPosition at = PositionInTile(row, col);
      ASSERT_GE(at.word, 0);
      ASSERT_LT(at.word, kTileWords);
      ASSERT_EQ(at.shift % kSliceBits, 0);
      ASSERT_LT(at.shift, 32);
      ASSERT_TRUE(taken.emplace(at.word, at.shift).second) << row << "," << col;
    }
  }
  EXPECT_EQ(taken.size() * kSliceBits, size_t{kTileBytes} * 8);
}

TEST(BitSlice, LanesAndWordsHoldWhatTheHeaderSays) {
  for (int row = 0; row < kTileRows; ++row) {
    for (int col = 0; col < kGroupSize; ++col) {
      const int word = PositionInTile(row, col).word;
      const int lane = word / 4;
      EXPECT_EQ(lane / 4, row % 8);
      EXPECT_EQ(32 * (lane % 4) + 8 * (word % 4), col / 8 * 8);
    }
  }
}

class BitSliceRandom : public testing::TestWithParam<int> {};

TEST_P(BitSliceRandom, RoundTripsAndDroppingSlicesEqualsReadingFewer) {
  std::mt19937 random(GetParam());
  const int64_t rows = 1 + random() % 70, cols = kGroupSize * (1 + random() % 4);
  const std::vector<uint8_t> codes = RandomCodes(random, rows * cols);
  Packed packed(rows, cols);
  PackSlices(codes.data(), rows, cols, packed.Mutable().data());
  for (int level = 1; level <= kNumLevels; ++level) {
    std::vector<uint8_t> read(codes.size(), 0x55);
    UnpackSlices(packed.View().data(), rows, cols, level, read.data());
    for (size_t i = 0; i < codes.size(); ++i) {
      const int unread = kSliceBits * (kNumSlices - level);
      ASSERT_EQ(read[i], codes[i] >> unread << unread) << "level " << level << " at " << i;
      ASSERT_EQ(read[i] >> unread, CodeAtLevel(codes[i], level));
    }
    // Slices past the level may be absent: they are not looked at.
    std::array<const uint8_t*, kNumSlices> absent = packed.View();
    for (int s = level; s < kNumSlices; ++s) absent[s] = nullptr;
    std::vector<uint8_t> again(codes.size());
    UnpackSlices(absent.data(), rows, cols, level, again.data());
    ASSERT_EQ(again, read);
  }
}

TEST_P(BitSliceRandom, RowsStackByConcatenation) {
  std::mt19937 random(1000 + GetParam());
  const int64_t cols = kGroupSize * (1 + random() % 3);
  const int64_t top = kTileRows * (1 + random() % 3), bottom = 1 + random() % 40;
  const std::vector<uint8_t> codes = RandomCodes(random, (top + bottom) * cols);
  Packed whole(top + bottom, cols), first(top, cols), second(bottom, cols);
  PackSlices(codes.data(), top + bottom, cols, whole.Mutable().data());
  PackSlices(codes.data(), top, cols, first.Mutable().data());
  PackSlices(codes.data() + top * cols, bottom, cols, second.Mutable().data());
  for (int s = 0; s < kNumSlices; ++s) {
    std::vector<uint8_t> joined = first.bytes[s];
    joined.insert(joined.end(), second.bytes[s].begin(), second.bytes[s].end());
    EXPECT_EQ(joined, whole.bytes[s]);
  }
}

TEST_P(BitSliceRandom, PaddingRowsAreZero) {
  std::mt19937 random(2000 + GetParam());
  const int64_t rows = 1 + random() % 15, cols = kGroupSize;
  const std::vector<uint8_t> codes(rows * cols, 0xFF);
  Packed packed(rows, cols);
  PackSlices(codes.data(), rows, cols, packed.Mutable().data());
  std::vector<uint8_t> read(kTileRows * cols);
  UnpackSlices(packed.View().data(), kTileRows, cols, kNumLevels, read.data());
  for (size_t i = 0; i < read.size(); ++i) {
    ASSERT_EQ(read[i], i < codes.size() ? 0xFF : 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, BitSliceRandom, testing::Range(0, 20));

TEST(BitSlice, EncodingIsTheNearestMidpointAtEveryLevel) {
  std::mt19937 random(7);
  std::uniform_real_distribution<float> uniform(-1.5f, 1.5f);
  const float lo = -1.0f, range = 2.0f;
  for (int i = 0; i < 20000; ++i) {
    const float w = uniform(random);
    const int code = EncodeWeight(w, lo, range);
    ASSERT_GE(code, 0);
    ASSERT_LE(code, 255);
    const float inside = std::clamp(w, lo, lo + range);
    for (int level = 1; level <= kNumLevels; ++level) {
      const float step = range / static_cast<float>(1 << BitsOfLevel(level));
      const float read = lo + range * FractionAtLevel(code, level);
      ASSERT_LE(std::abs(read - inside), step * 0.5001f) << w << " at level " << level;
    }
  }
}

TEST(BitSlice, SlicesAreTheDigitsOfTheCode) {
  for (int code = 0; code < 256; ++code) {
    int joined = 0;
    for (int s = 0; s < kNumSlices; ++s) joined = joined * 4 + SliceOfCode(code, s);
    EXPECT_EQ(joined, code);
  }
}

}  // namespace
}  // namespace mobi
