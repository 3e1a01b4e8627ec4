#include "calibrator/perplexity_plot.h"

#include <gtest/gtest.h>

namespace mobi {
namespace {

constexpr const char* kJson =
    R"({"results": [{"effective_bits": 2.5, "perplexity": 21.5, "target_bits": 2.5},
                    {"effective_bits": 4.0, "perplexity": 18.8, "target_bits": 4}]})";

TEST(PerplexityPlotTest, ReadsWhatTheEvaluationPrints) {
  const auto series = ParseSeries("ours", kJson, "a.json", 0);
  ASSERT_TRUE(series.ok()) << series.status();
  ASSERT_EQ(series->points.size(), 2u);
  EXPECT_EQ(series->points[0].bits, 2.5);
  EXPECT_EQ(series->points[1].perplexity, 18.8);
  EXPECT_FALSE(series->is_float);
  EXPECT_EQ(ParseSeries("rtn", kJson, "a.json", 3)->points[0].bits, 3);
  const auto exact = ParseSeries(
      "float", R"({"results": [{"model": "float", "effective_bits": 16, "perplexity": 18.5}]})",
      "f.json", 0);
  EXPECT_TRUE(exact->is_float);
  for (const char* bad : {"", "[]", "{}", R"({"results": []})", R"({"results": [1]})",
                          R"({"results": [{"effective_bits": 3}]})"}) {
    const auto status = ParseSeries("x", bad, "bad.json", 0).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_NE(std::string(status.message()).find("bad.json"), std::string::npos);
  }
}

TEST(PerplexityPlotTest, DrawsEveryPointBelowTheLimitAndEscapesNames) {
  const PlotSeries ours{"ours <1>", false, {{4, 19}, {2, 25}, {3, 20}, {1, 1e6}}};
  const PlotSeries exact{"float", true, {{16, 18.5}}};
  const auto svg = PlotSvg({ours, exact}, "a & b", 100);
  ASSERT_TRUE(svg.ok()) << svg.status();
  size_t circles = 0;
  for (size_t at = svg->find("<circle"); at != std::string::npos;
       at = svg->find("<circle", at + 1)) {
    ++circles;
  }
  EXPECT_EQ(circles, 3u);
  EXPECT_NE(svg->find("ours &lt;1&gt;"), std::string::npos);
  EXPECT_NE(svg->find("a &amp; b"), std::string::npos);
  EXPECT_NE(svg->find("stroke-dasharray"), std::string::npos);
  EXPECT_EQ(svg->substr(svg->size() - 7), "</svg>\n");
  EXPECT_FALSE(PlotSvg({exact}, "", 100).ok());
  EXPECT_FALSE(PlotSvg({}, "", 100).ok());
}

}  // namespace
}  // namespace mobi
