// Loading a folder: what is checked before weights move, while they move, and what is told of it.
#include "server/load_model.h"

#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

using ::testing::HasSubstr;

class LoadModelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteTestModels(dir_).ok());
    load_.dir = dir_.Sub("mobiquant");
    load_.threads = 1;
    load_.engine.num_kv_blocks = 200;
  }

  absl::Status Load() {
    bytes_ = of_ = 0;
    auto opened = OpenModel(load_);
    if (!opened.ok()) return opened.status();
    return LoadModel(load_, *std::move(opened), clock_,
                     [this](uint64_t bytes, uint64_t of) {
                       ++told_;
                       EXPECT_GT(bytes, bytes_);
                       bytes_ = bytes;
                       of_ = of;
                     })
        .status();
  }

  // One bit of the last tensor, which opening does not look at.
  void DamageWeights() {
    const std::string path = load_.dir + "/model.safetensors";
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(-7, std::ios::end);
    const auto byte = static_cast<char>(file.get() ^ 1);
    file.seekp(-7, std::ios::end);
    file.put(byte);
  }

  TempDir dir_;
  RealClock clock_;
  LoadOptions load_;
  uint64_t bytes_ = 0, of_ = 0;  // told last
  int told_ = 0;
};

TEST_F(LoadModelTest, TellsOfEveryByteOfTheFilesThatAreRead) {
  const uint64_t weights = std::filesystem::file_size(load_.dir + "/model.safetensors");
  ASSERT_EQ(Load(), absl::OkStatus());
  EXPECT_EQ(bytes_, of_);
  EXPECT_GT(of_, weights) << "MANIFEST names the other files, too";
  load_.verify_manifest = false;
  ASSERT_EQ(Load(), absl::OkStatus());
  EXPECT_EQ(bytes_, weights);
  EXPECT_EQ(of_, weights);
}

TEST_F(LoadModelTest, DamagedWeightsAreNeverServed) {
  DamageWeights();
  const absl::Status status = Load();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("model.safetensors: SHA-256 is"));
  load_.verify_manifest = false;
  EXPECT_EQ(Load(), absl::OkStatus()) << "nothing but its sum gives the damage away";
}

TEST_F(LoadModelTest, RefusesWhatHasNoRoomBeforeItReadsWeights) {
  load_.engine.num_kv_blocks = 3;
  const absl::Status status = Load();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("do not hold one sequence"));
  EXPECT_EQ(told_, 0);
}

}  // namespace
}  // namespace mobi
