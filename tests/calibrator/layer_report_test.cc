#include "calibrator/layer_report.h"

#include <gtest/gtest.h>

#include <cmath>

#include "calibrator/packing.h"
#include "tests/calibrator/random_matrix.h"
#include "tests/paths.h"

namespace mobi {
namespace {

TEST(LayerReportTest, OverlapCountsTheWorstTenth) {
  std::vector<float> a, b;
  for (int i = 0; i < 100; ++i) {
    a.push_back(static_cast<float>(i));
    b.push_back(static_cast<float>(i < 95 ? i : -i));
  }
  EXPECT_EQ(WorstTenthOverlap(a, a), 1);
  EXPECT_EQ(WorstTenthOverlap(a, b), 0.5);  // 90..94 of 90..99
  std::vector<float> reversed(a.rbegin(), a.rend());
  EXPECT_EQ(WorstTenthOverlap(a, reversed), 0);
}

TEST(LayerReportTest, UnpackedLinearsAreWhatWasPacked) {
  std::mt19937_64 random(1);
  NestedWeight weight(48, 256);
  for (uint8_t& code : weight.codes) code = static_cast<uint8_t>(random());
  for (auto& level : weight.scales) {
    for (LevelScale& s : level) s = {static_cast<float>(random() % 64) / 64, -0.25f};
  }
  NestedWeight again(48, 256);
  UnpackLinear(PackLinear(weight, 0, 16).view(), 0, again);
  UnpackLinear(PackLinear(weight, 16, 32).view(), 16, again);
  EXPECT_EQ(again.codes, weight.codes);
  for (int k = 0; k < kNumLevels; ++k) {
    for (size_t i = 0; i < weight.scales[k].size(); ++i) {
      EXPECT_EQ(again.scales[k][i].range, weight.scales[k][i].range);
      EXPECT_EQ(again.scales[k][i].offset, weight.scales[k][i].offset);
    }
  }
}

// The shipped checkpoint: errors fall from level to level, bits follow the target.
TEST(LayerReportTest, DemoCheckpointDegradesGracefully) {
  const std::string demo = std::string(MOBI_SOURCE_DIR) + "/deploy/demo/";
  LayerReportOptions options;
  options.model_dir = demo + "checkpoint";
  options.float_dir = demo + "model";
  options.data_path = demo + "README.md";
  options.bits = {3, 5};
  options.window = 128;
  options.windows = 1;
  options.num_threads = 2;
  const auto reports = ReportLayers(options);
  ASSERT_TRUE(reports.ok()) << reports.status();
  ASSERT_EQ(reports->size(), 6u * 7u);
  for (const LinearReport& r : *reports) {
    EXPECT_LT(r.error[1], 0.5 * r.error[0]) << r.name;
    EXPECT_LT(r.error[2], 0.5 * r.error[1]) << r.name;
    EXPECT_LE(r.error[3], r.error[2]) << r.name;
    EXPECT_EQ(r.overlap[2][2], 1);
    EXPECT_LE(r.bits[0], r.bits[1]) << r.name;
    EXPECT_GE(r.bits[0], 2);
    EXPECT_LE(r.bits[1], 8);
  }
  options.float_dir = demo + "checkpoint";
  EXPECT_FALSE(ReportLayers(options).ok());
}

}  // namespace
}  // namespace mobi
