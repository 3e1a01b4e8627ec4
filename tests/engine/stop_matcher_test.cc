#include "engine/stop_matcher.h"

#include <gtest/gtest.h>

#include <ctime>
#include <random>

#include "engine/tokenizer_utf8.h"

namespace mobi {
namespace {

struct Outcome {
  std::string text;
  std::optional<int> matched;
};

// The definition: the first byte at which a stop is complete ends the text; the longest that is
// complete there is cut off, the first of the list where two are equal.
Outcome Expected(const std::vector<std::string>& stops, const std::string& text) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::optional<int> best;
    for (size_t s = 0; s < stops.size(); ++s) {
      const std::string& stop = stops[s];
      if (stop.empty() || stop.size() > end) continue;
      if (text.compare(end - stop.size(), stop.size(), stop) != 0) continue;
      if (!best.has_value() || stop.size() > stops[*best].size()) best = static_cast<int>(s);
    }
    if (best.has_value()) return {text.substr(0, end - stops[*best].size()), best};
  }
  return {text, std::nullopt};
}

// How much of `text` could still become a stop.
size_t LongestOpen(const std::vector<std::string>& stops, const std::string& text) {
  size_t longest = 0;
  for (const std::string& stop : stops) {
    for (size_t n = 1; n < stop.size() && n <= text.size(); ++n) {
      if (text.compare(text.size() - n, n, stop, 0, n) == 0) longest = std::max(longest, n);
    }
  }
  return longest;
}

TEST(StopMatcher, EqualsTheDefinitionHoweverTheTextIsCut) {
  std::mt19937 random(5);
  const auto random_text = [&](size_t max) {
    static const char* const kCharacters[] = {"a", "b", "\xC3\xA9", "\xC3\xA8", "\n"};
    std::string text;
    for (size_t n = std::uniform_int_distribution<size_t>(0, max)(random); n > 0; --n) {
      text += kCharacters[std::uniform_int_distribution<size_t>(0, 4)(random)];
    }
    return text;
  };
  int matches = 0;
  for (int round = 0; round < 4000; ++round) {
    std::vector<std::string> stops(std::uniform_int_distribution<size_t>(0, 4)(random));
    for (std::string& stop : stops) stop = random_text(5);
    StopMatcher matcher(stops);
    std::string pushed;
    std::string out;
    for (int pieces = 0; pieces < 8; ++pieces) {
      const std::string piece = random_text(6);
      const std::string increment = matcher.Push(piece);
      ASSERT_TRUE(IsValidUtf8(increment));
      pushed += piece;
      out += increment;
      const Outcome expected = Expected(stops, pushed);
      ASSERT_EQ(matcher.matched(), expected.matched);
      if (expected.matched.has_value()) {
        ASSERT_EQ(out, expected.text);
        ASSERT_EQ(matcher.Push(piece), "");
      } else {
        // Neither a byte too many nor one too few.
        ASSERT_EQ(out, pushed.substr(0, pushed.size() - LongestOpen(stops, pushed)));
      }
    }
    out += matcher.Flush();
    ASSERT_EQ(out, Expected(stops, pushed).text);
    matches += matcher.matched().has_value() ? 1 : 0;
  }
  EXPECT_GT(matches, 1000);  // the rounds are worth something
  EXPECT_LT(matches, 3500);
}

TEST(StopMatcher, NothingOfASplitStopLeaks) {
  StopMatcher matcher(std::vector<std::string>{"</answer>", "\n\nUser:"});
  EXPECT_EQ(matcher.Push("Yes."), "Yes.");
  EXPECT_EQ(matcher.Push(" <"), " ");
  EXPECT_EQ(matcher.Push("/ans"), "");
  EXPECT_EQ(matcher.Push("x"), "</ansx");
  EXPECT_EQ(matcher.Push("\n"), "");
  EXPECT_EQ(matcher.Push("\n\nUs"), "\n");
  EXPECT_EQ(matcher.Push("er: hi"), "");
  EXPECT_EQ(matcher.matched(), 1);
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcher, HeldTextIsFlushedWhenNoStopComes) {
  StopMatcher matcher(std::vector<std::string>{"abcd"});
  EXPECT_EQ(matcher.Push("xabc"), "x");
  EXPECT_EQ(matcher.Flush(), "abc");
  EXPECT_EQ(matcher.Flush(), "");
  EXPECT_EQ(matcher.matched(), std::nullopt);
}

TEST(StopMatcher, WithoutStopsEverythingPasses) {
  StopMatcher matcher({});
  EXPECT_EQ(matcher.Push("text"), "text");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcher, LongTextsOfAlmostMatchesAreLinear) {
  // Quadratic matching would take minutes. The processor's time: others may keep it from us.
  const std::vector<std::string> stops(8, std::string(63, 'a') + "b");
  StopMatcher matcher(stops);
  const std::clock_t begin = std::clock();
  size_t out = 0;
  const std::string piece(1 << 12, 'a');
  for (int i = 0; i < 256; ++i) out += matcher.Push(piece).size();
  EXPECT_EQ(out, (1 << 20) - 63u);
  EXPECT_LT(static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC, 5.0);
}

}  // namespace
}  // namespace mobi
