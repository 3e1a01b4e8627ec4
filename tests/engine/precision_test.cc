#include "engine/precision.h"

#include <gtest/gtest.h>

#include <cmath>
#include <utility>

namespace mobi {
namespace {

PriceTable Table() { return PriceTable({{2.0f, 100.0f}, {4.0f, 1.0f}, {8.0f, 1e-4f}}); }

TEST(PriceTable, InterpolatesInTheLogarithmAndClampsAtItsEnds) {
  const PriceTable table = Table();
  EXPECT_FLOAT_EQ(table.PriceOf(3.0f), 10.0f);
  EXPECT_NEAR(table.PriceOf(6.0f), 1e-2f, 1e-6f);
  EXPECT_FLOAT_EQ(table.PriceOf(1.0f), 100.0f);
  EXPECT_FLOAT_EQ(table.PriceOf(9.0f), 1e-4f);
}

TEST(PriceTable, TheEndsReadOneLevelWhateverTheScores) {
  const TokenPrecision low = Table().Resolve(2.0f, 0.0f), high = Table().Resolve(8.0f, 0.0f);
  EXPECT_EQ(low.min_level, 1);
  EXPECT_EQ(low.max_level, 1);
  EXPECT_EQ(high.min_level, 4);
  EXPECT_EQ(high.max_level, 4);
  const TokenPrecision mid = Table().Resolve(3.0f, std::log(2.0f));
  EXPECT_EQ(mid.min_level, 1);
  EXPECT_EQ(mid.max_level, 4);
  EXPECT_NEAR(mid.price, 20.0f, 1e-4f);
}

TEST(PriceTable, RequestsKeepTheirBandAndPinnedOnesIgnoreTheTarget) {
  const PriceTable table = Table();
  const PrecisionTarget target{3.0f, {{0.5f, 0.5f, 0.0f}}};
  EXPECT_EQ(PriceTable::BitsOf({4.0f, 8.0f, 0}, target), 4.0f);
  EXPECT_EQ(PriceTable::BitsOf({2.0f, 2.5f, 0}, target), 2.5f);
  EXPECT_FLOAT_EQ(table.Resolve({3.5f, 3.5f, 0}, 3.0f, 0.5f).price, table.PriceOf(3.5f));
  const TokenPrecision level = table.Resolve({2.0f, 8.0f, 3}, 3.0f, 0.5f);
  EXPECT_EQ(level.min_level, 3);
  EXPECT_EQ(level.max_level, 3);
  EXPECT_EQ(PriceTable::BitsOf({2.0f, 8.0f, 3}, target), 6.0f);
}

TEST(PriceTable, AFloatModelIsNeverRouted) {
  const TokenPrecision precision = PriceTable({}).Resolve({2.0f, 8.0f, 0}, 3.0f, 0.0f);
  EXPECT_EQ(precision.min_level, precision.max_level);
}

TEST(Prices, EveryRegimeHasItsTrimAndSharedLevelsArePricedByHowManyShareThem) {
  const PriceTable coherent({{2.0f, 1e-3f}, {8.0f, 1e-9f}});
  const Prices prices{Table(), coherent, 16};
  const PrecisionTarget target{3.0f, {{0.25f, 0.75f, 0.5f}}};
  const PrecisionBand any;
  const auto price = [&](Regime regime, int tokens) {
    return prices.Resolve(any, target, regime, tokens).price;
  };
  EXPECT_FLOAT_EQ(price(Regime::kPrompt, 16), Table().Resolve(3.0f, 0.25f).price);
  EXPECT_FLOAT_EQ(price(Regime::kDecode, 16), Table().Resolve(3.0f, 0.75f).price);
  EXPECT_FLOAT_EQ(price(Regime::kCoherent, 16), coherent.Resolve(3.0f, 0.5f).price);
  for (const int tokens : {1, 4, 64}) {
    EXPECT_NEAR(price(Regime::kCoherent, tokens),
                coherent.Resolve(3.0f, 0.5f).price * static_cast<float>(tokens) / 16,
                coherent.PriceOf(3.0f) * 1e-4f);
  }
}

TEST(PriceTable, ACapTakesLevelsAwayAndGivesWhatIsLeftInFull) {
  const TokenPrecision routed = Table().Resolve(3.0f, 0.0f, /*max_level=*/2);
  EXPECT_EQ(routed.min_level, 1);
  EXPECT_EQ(routed.max_level, 2);
  EXPECT_NEAR(routed.price, 10.0f, 1e-4f);
  for (const float bits : {6.0f, 7.0f, 8.0f}) {
    const TokenPrecision capped = Table().Resolve(bits, 0.0f, /*max_level=*/3);
    EXPECT_EQ(capped.min_level, 3);
    EXPECT_EQ(capped.max_level, 3);
  }
  EXPECT_EQ(Table().Resolve({2.0f, 8.0f, 2}, 8.0f, 0.0f, 3).min_level, 2);
}

TEST(WholeLevel, IsTheLowestWithTheBitsThatTheBandAllows) {
  const auto level = [](PrecisionBand band, float bits, int max_level) {
    return WholeLevel(band, {.target_bits = bits}, max_level);
  };
  const PrecisionBand any;
  EXPECT_EQ(level(any, 2.0f, 4), 1);
  EXPECT_EQ(level(any, 2.1f, 4), 2);
  EXPECT_EQ(level(any, 4.0f, 4), 2);
  EXPECT_EQ(level(any, 6.5f, 4), 4);
  EXPECT_EQ(level(any, 6.5f, 3), 3) << "what is in memory";
  EXPECT_EQ(level({.min_bits = 4.5f}, 2.0f, 4), 3);
  EXPECT_EQ(level({.max_bits = 4.0f}, 8.0f, 4), 2);
  EXPECT_EQ(level({.max_bits = 3.5f}, 3.0f, 4), 0) << "4 bits are not allowed, 2 are too few";
  EXPECT_EQ(level({.min_bits = 3, .max_bits = 3}, 3.0f, 4), 0);
  EXPECT_EQ(level({.level = 2}, 3.0f, 4), 0);
}

TEST(NeededLevels, FloorsWantRoomAboveThemAndPinnedBitsEverything) {
  EXPECT_EQ(NeededLevels(PrecisionBand{}), 1);
  for (int level = 1; level <= kNumLevels; ++level) {
    EXPECT_EQ(NeededLevels(PrecisionBand{2, 8, level}), level);
  }
  EXPECT_EQ(NeededLevels(PrecisionBand{2, 2, 0}), 1) << "reads level 1 alone";
  for (const float bits : {2.1f, 4.0f, 8.0f}) {
    EXPECT_EQ(NeededLevels(PrecisionBand{bits, bits, 0}), kNumLevels);
  }
  const std::pair<float, int> floors[] = {{2.0f, 1}, {2.5f, 2}, {3.0f, 2}, {3.5f, 3},
                                          {4.5f, 3}, {5.0f, 3}, {5.5f, 4}, {8.0f, 4}};
  for (const auto& [floor, levels] : floors) {
    EXPECT_EQ(NeededLevels(floor), levels) << floor;
    EXPECT_EQ(NeededLevels(PrecisionBand{floor, 8.5f, 0}), levels) << floor;
  }
}

}  // namespace
}  // namespace mobi
