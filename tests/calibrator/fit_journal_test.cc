#include "calibrator/fit_journal.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "engine/checkpoint.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

namespace fs = std::filesystem;

class FitJournalTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteTestModel(dir_.Sub("float")).ok());
    config_ = Checkpoint::Open(dir_.Sub("float"), {})->config();
  }

  FittedBlock RandomBlock(uint64_t seed) const {
    std::mt19937_64 random(seed);
    FittedBlock block;
    const auto groups = RoutedGroupsOfLayer(config_, 0);
    for (int g = 0; g < kNumLinearGroups; ++g) {
      int64_t rows = 0;
      for (const LinearShape& linear : groups[g].linears) rows += linear.rows;
      NestedWeight& weight = block.linear[g];
      weight = NestedWeight(rows, groups[g].linears.front().cols);
      for (uint8_t& code : weight.codes) code = static_cast<uint8_t>(random());
      for (auto& level : weight.scales) {
        for (LevelScale& s : level) s = {static_cast<float>(random() % 1000), -0.5f};
      }
    }
    return block;
  }

  std::string out() const { return dir_.Sub("out"); }

  TempDir dir_;
  ModelConfig config_;
};

TEST_F(FitJournalTest, GivesBackWhatWasSavedUnderTheSameKeyOnly) {
  auto journal = FitJournal::Open(out(), "run 1");
  ASSERT_TRUE(journal.ok()) << journal.status();
  EXPECT_FALSE(fs::exists(out() + ".progress"));
  EXPECT_FALSE(journal->Load("fitted", 0, config_).has_value());
  const FittedBlock block = RandomBlock(1);
  ASSERT_TRUE(journal->Save("fitted", 0, block).ok());
  const auto again = FitJournal::Open(out() + "/", "run 1");
  ASSERT_TRUE(again.ok());
  const auto loaded = again->Load("fitted", 0, config_);
  ASSERT_TRUE(loaded.has_value());
  for (int g = 0; g < kNumLinearGroups; ++g) {
    EXPECT_EQ(loaded->linear[g].codes, block.linear[g].codes);
    for (int k = 0; k < kNumLevels; ++k) {
      for (size_t i = 0; i < block.linear[g].scales[k].size(); ++i) {
        EXPECT_EQ(loaded->linear[g].scales[k][i].range, block.linear[g].scales[k][i].range);
      }
    }
  }
  EXPECT_FALSE(again->Load("fitted", 1, config_).has_value());
  EXPECT_FALSE(again->Load("tuned", 0, config_).has_value());
  const auto other = FitJournal::Open(out(), "run 2");
  ASSERT_TRUE(other.ok());
  EXPECT_FALSE(other->Load("fitted", 0, config_).has_value());
  EXPECT_FALSE(fs::exists(out() + ".progress"));
}

TEST_F(FitJournalTest, GivesBackPiecesOfTheirShapeOnly) {
  auto journal = FitJournal::Open(out(), "run 1");
  ASSERT_TRUE(journal.ok()) << journal.status();
  const NestedWeight weight = RandomBlock(2).linear[0];
  EXPECT_FALSE(journal->LoadWeight("lm_head", 3, weight.rows, weight.cols).has_value());
  ASSERT_TRUE(journal->SaveWeight("lm_head", 3, weight).ok());
  const auto loaded = journal->LoadWeight("lm_head", 3, weight.rows, weight.cols);
  ASSERT_TRUE(loaded.has_value());
  EXPECT_EQ(loaded->codes, weight.codes);
  EXPECT_EQ(loaded->Scale(2, 5, 0).range, weight.Scale(2, 5, 0).range);
  EXPECT_FALSE(journal->LoadWeight("lm_head", 2, weight.rows, weight.cols).has_value());
  EXPECT_FALSE(journal->LoadWeight("lm_head", 3, weight.rows - 16, weight.cols).has_value());
}

TEST_F(FitJournalTest, TornFilesCountAsMissing) {
  auto journal = FitJournal::Open(out(), "key");
  ASSERT_TRUE(journal->Save("fitted", 0, RandomBlock(2)).ok());
  const std::string path = out() + ".progress/fitted-0.safetensors";
  const auto size = fs::file_size(path);
  for (const auto cut : {size / 2, size - 1, uintmax_t{3}, uintmax_t{0}}) {
    fs::resize_file(path, cut);
    EXPECT_FALSE(journal->Load("fitted", 0, config_).has_value()) << cut;
  }
}

TEST_F(FitJournalTest, FoldersOfOthersAreLeftAlone) {
  fs::create_directory(out() + ".progress");
  std::ofstream(out() + ".progress/notes.txt") << "mine";
  EXPECT_EQ(FitJournal::Open(out(), "key").status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_TRUE(fs::exists(out() + ".progress/notes.txt"));
}

}  // namespace
}  // namespace mobi
