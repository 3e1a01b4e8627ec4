// Levels that a whole batch reads: the bits asked for, spent where the loss is, drawn the same for
// a key.
#include "calibrator/level_allocation.h"

#include <gtest/gtest.h>

#include "tests/calibrator/float_model_fixture.h"

namespace mobi {
namespace {

// A model of `count` layers whose groups are one linear each, all of a size; a level divides a
// loss by ten, and loss grows from linear to linear.
LevelAllocation Linears(int count) {
  std::vector<std::array<LevelAllocation::Group, kNumLinearGroups>> layers(count);
  double loss = 1;
  for (auto& layer : layers) {
    for (LevelAllocation::Group& group : layer) {
      group.losses = Matrix(1, kNumLevels);
      for (int k = 0; k < kNumLevels; ++k) {
        group.losses(0, k) = static_cast<float>(loss * std::pow(0.1, k));
      }
      group.costs = CostsOf({"router", {{"a", 16, 128}}});
      loss *= 1.1;
    }
  }
  return LevelAllocation(std::move(layers));
}

double Bits(const ModelLevels& levels) {
  double bits = 0, linears = 0;
  for (const auto& layer : levels) {
    for (const auto& group : layer) {
      for (const uint8_t level : group) bits += BitsOfLevel(level), ++linears;
    }
  }
  return bits / linears;
}

TEST(LevelAllocationTest, MeetsTheBitsAndSpendsThemWhereTheLossIs) {
  constexpr int kLayers = 10;
  const LevelAllocation allocation = Linears(kLayers);
  for (const double bits : {2.0, 2.5, 3.0, 4.75, 8.0}) {
    const ModelLevels levels = allocation.Draw(bits, 0, 1);
    EXPECT_NEAR(Bits(levels), bits, 2.0 / (kLayers * kNumLinearGroups)) << bits;
    int last = 1;
    for (const auto& layer : levels) {
      for (const auto& group : layer) {
        ASSERT_EQ(group.size(), 1u);
        EXPECT_GE(group[0], last) << bits;
        last = group[0];
      }
    }
  }
}

TEST(LevelAllocationTest, JitterDiffersByKeyAlone) {
  const LevelAllocation allocation = Linears(10);
  EXPECT_EQ(allocation.Draw(3, 0.5, 1), allocation.Draw(3, 0.5, 1));
  EXPECT_NE(allocation.Draw(3, 0.5, 1), allocation.Draw(3, 0.5, 2));
  EXPECT_EQ(allocation.Draw(3, 0, 1), allocation.Draw(3, 0, 2));
  EXPECT_NEAR(Bits(allocation.Draw(3, 0.5, 1)), 3, 0.05);
}

class MeasuredAllocationTest : public FloatModelTest {};

// Weights that no level holds well but one: what is measured there must be the larger loss.
TEST_F(MeasuredAllocationTest, BitsGoToTheLayerWhoseFitIsBad) {
  constexpr int64_t kSeqLen = 32;
  ASSERT_NO_FATAL_FAILURE(OpenModel(kSeqLen));
  ASSERT_GT(model_->num_layers(), 1);
  std::vector<FittedBlock> blocks(static_cast<size_t>(model_->num_layers()));
  for (int layer = 0; layer < model_->num_layers(); ++layer) {
    const auto weights = model_->LoadBlock(layer);
    ASSERT_TRUE(weights.ok()) << weights.status();
    for (int g = 0; g < kNumLinearGroups; ++g) {
      const Matrix& w = weights->linear[g];
      NestedWeight& nested = blocks[layer].linear[g] = NestedWeight(w.rows(), w.cols());
      for (int64_t row = 0; row < w.rows(); ++row) {
        for (int64_t group = 0; group < nested.groups(); ++group) {
          const float* values = w.Row(row) + group * kGroupSize;
          const auto [low, high] = std::minmax_element(values, values + kGroupSize);
          // The first layer's ranges are four times too wide.
          const float wide = layer == 0 ? 4 : 1;
          const LevelScale pair{wide * (*high - *low), *low};
          EncodeGroup(values, pair, nested.Codes(row) + group * kGroupSize);
          for (int level = 1; level <= kNumLevels; ++level) nested.Scale(level, row, group) = pair;
        }
      }
    }
  }
  const auto allocation =
      LevelAllocation::Measure(*model_, blocks, RandomIds(4 * kSeqLen), kSeqLen, {});
  ASSERT_TRUE(allocation.ok()) << allocation.status();
  const ModelLevels levels = allocation->Draw(4, 0, 1);
  for (int g = 0; g < kNumLinearGroups; ++g) {
    for (size_t s = 0; s < levels[0][g].size(); ++s) {
      EXPECT_GE(levels[0][g][s], levels[1][g][s]) << "group " << g << " segment " << s;
    }
  }
  EXPECT_NE(levels[0], levels[1]);
}

}  // namespace
}  // namespace mobi
