// Runs one fuzz target over deterministic mutations of its seeds, without libFuzzer.
#include <algorithm>
#include <random>

#include "gtest/gtest.h"
#include "tests/fuzz/fuzz_target.h"

namespace mobi {
namespace {

constexpr int kIterations = 20000;

// Pieces that parsers of text and of sizes stumble over.
const char* const kTokens[] = {"[",
                               "]",
                               "{",
                               "}",
                               "\"",
                               ",",
                               ":",
                               "null",
                               "-1",
                               "0",
                               "1e9",
                               "1e999",
                               "0.5",
                               "\\u",
                               "\xff",
                               "\xed\xa0\x80",
                               "4294967296",
                               "9223372036854775807",
                               "9223372036854775808",
                               "18446744073709551615",
                               "true",
                               "NaN"};

std::string Mutate(std::string bytes, const std::vector<std::string>& seeds, std::mt19937& random) {
  const auto below = [&random](size_t bound) { return bound == 0 ? 0 : random() % bound; };
  for (size_t edits = 1 + below(4); edits > 0; --edits) {
    const size_t at = below(bytes.size() + 1);
    const size_t length = std::min(bytes.size() - at, below(32));
    switch (below(7)) {
      case 0:
        if (at < bytes.size()) bytes[at] = static_cast<char>(random());
        break;
      case 1:
        if (at < bytes.size()) bytes[at] ^= static_cast<char>(1 << below(8));
        break;
      case 2:
        bytes.erase(at, length);
        break;
      case 3:
        bytes.insert(at, bytes.substr(below(bytes.size()), below(64)));
        break;
      case 4:
        bytes.replace(at, length, kTokens[below(std::size(kTokens))]);
        break;
      case 5: {  // digits and structure come in runs
        const std::string& other = seeds[below(seeds.size())];
        bytes.replace(at, length, other.substr(below(other.size()), below(64)));
        break;
      }
      case 6:
        if (below(8) == 0) bytes.resize(at);
        break;
    }
  }
  return bytes;
}

bool Accepts(const std::string& bytes) {
  return FuzzOne(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
}

TEST(MutationTest, SeedsAreAccepted) {
  for (const std::string& seed : FuzzSeeds()) EXPECT_TRUE(Accepts(seed)) << seed;
}

TEST(MutationTest, SurvivesDamage) {
  const std::vector<std::string> seeds = FuzzSeeds();
  std::mt19937 random(20260220);
  int accepted = 0;
  for (int i = 0; i < kIterations; ++i) {
    accepted += Accepts(Mutate(seeds[random() % seeds.size()], seeds, random));
  }
  // Damage that goes unnoticed is as much of a test as damage that is refused.
  EXPECT_GT(accepted, kIterations / 100);
  EXPECT_LT(accepted, kIterations);
}

}  // namespace
}  // namespace mobi
