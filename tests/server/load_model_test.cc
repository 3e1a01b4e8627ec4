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
    last_ = {};
    auto opened = OpenModel(load_);
    if (!opened.ok()) return opened.status();
    return LoadModel(load_, *std::move(opened), clock_,
                     [this](const LoadProgress& progress) {
                       ++told_;
                       EXPECT_GE(progress.layers, last_.layers);
                       EXPECT_GE(progress.checked_bytes, last_.checked_bytes);
                       last_ = progress;
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
  LoadProgress last_;
  int told_ = 0;
};

TEST_F(LoadModelTest, TellsOfEveryLayerAndOfEveryByteThatIsChecked) {
  ASSERT_EQ(Load(), absl::OkStatus());
  EXPECT_EQ(last_.layers, 2);
  EXPECT_EQ(last_.num_layers, 2);
  EXPECT_EQ(last_.checked_bytes, last_.num_bytes);
  EXPECT_GT(last_.num_bytes, std::filesystem::file_size(load_.dir + "/model.safetensors"));
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
