#include "calibrator/bits_aim.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace mobi {
namespace {

// What `windows` windows use on average that use `slope` times what they are asked for, less
// `shift`, and some noise; as many are under way at once as in an evaluation.
double MeanUsed(float wanted, int in_flight, int windows, double slope, double shift) {
  BitsAim aim(wanted, in_flight);
  std::mt19937_64 random(1);
  std::vector<double> asked;
  double sum = 0;
  for (int next = 0; next < windows; ++next) {
    while (static_cast<int>(asked.size()) < std::min(windows, next + in_flight)) {
      asked.push_back(aim.Next());
    }
    const double noise = static_cast<double>(random() % 1000) / 1000 - 0.5;
    const double used = 2 + slope * (asked[next] - 2) - shift + 0.1 * noise;
    aim.Saw(asked[next], used);
    sum += used;
  }
  return sum / windows;
}

TEST(BitsAimTest, MeetsTheMeanOfTextThatThePriceTableMisses) {
  for (const int in_flight : {4, 16}) {
    for (const double slope : {0.8, 1.0, 1.2}) {
      for (const double shift : {-0.15, 0.0, 0.15}) {
        EXPECT_NEAR(MeanUsed(3.5f, in_flight, 333, slope, shift), 3.5, 0.02)
            << in_flight << " in flight, slope " << slope << ", shift " << shift;
      }
    }
  }
}

TEST(BitsAimTest, AsksForTheTargetFirstAndStaysWithinWhatCanBeAsked) {
  BitsAim aim(2.1f, 1);
  EXPECT_EQ(aim.Next(), 2.1f);
  for (int i = 0; i < 10; ++i) aim.Saw(aim.Next(), 3);
  EXPECT_EQ(aim.Next(), 2.0f);
  for (const float end : {2.0f, 8.0f}) {
    BitsAim exact(end, 1);
    exact.Saw(end, 5);
    EXPECT_EQ(exact.Next(), end);
  }
}

}  // namespace
}  // namespace mobi
