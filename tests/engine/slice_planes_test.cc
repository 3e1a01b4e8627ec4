// Planes of slices: what leaves comes back byte for byte, in as many pieces as it takes.
#include "engine/slice_planes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "engine/model.h"
#include "engine/synthetic_weights.h"
#include "tests/engine/refusing_backend.h"

namespace mobi {
namespace {

class SlicePlanesTest : public testing::Test {
 protected:
  void SetUp() override {
    auto config = ConfigOfShape("llama-3.2-1b");
    ASSERT_TRUE(config.ok());
    config->num_hidden_layers = 2;
    config->hidden_size = 1024;
    config->intermediate_size = 4096;
    config->vocab_size = 512;
    config->num_attention_heads = 16;
    config->num_key_value_heads = 4;
    config->head_dim = 64;
    auto weights = SyntheticWeights::Create("test", *config, {});
    ASSERT_TRUE(weights.ok()) << weights.status();
    weights_ = std::make_unique<SyntheticWeights>(*std::move(weights));
    auto model = Model::Load(*weights_, *backend_, 64, nullptr);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
  }

  // Every byte that reading at `level` adds.
  std::vector<uint8_t> Bytes(int level) const {
    std::vector<uint8_t> bytes;
    for (const DecoderLayer& layer : model_->layers()) {
      for (const Linear& linear : layer.linears) {
        const SlicedWeight& w = linear.routed->weight;
        const auto* scales = reinterpret_cast<const uint8_t*>(w.scales[level - 1]);
        bytes.insert(bytes.end(), w.slices[level - 1],
                     w.slices[level - 1] + SliceBytes(w.rows, w.cols));
        bytes.insert(bytes.end(), scales, scales + ScaleBytes(w.rows, w.cols));
      }
    }
    return bytes;
  }

  std::unique_ptr<RefusingBackend> backend_ = std::make_unique<RefusingBackend>();
  std::unique_ptr<SyntheticWeights> weights_;
  std::unique_ptr<Model> model_;
  RealClock clock_;
};

TEST_F(SlicePlanesTest, WhatComesBackIsWhatLeft) {
  SlicePlanes& planes = model_->slice_planes();
  ASSERT_TRUE(planes.can_drop().ok()) << planes.can_drop();
  std::vector<std::vector<uint8_t>> before;
  for (int level = 1; level <= kNumLevels; ++level) before.push_back(Bytes(level));
  const size_t everything = planes.resident_bytes();
  for (int lowest = 3; lowest >= 1; --lowest) {
    while (planes.resident_levels() > lowest) planes.Drop();
    EXPECT_EQ(planes.resident_bytes(), everything / kNumLevels * lowest);
    for (int level = 1; level <= lowest; ++level) {
      EXPECT_EQ(Bytes(level), before[level - 1]) << "level " << level << " never left";
    }
    while (planes.resident_levels() < kNumLevels) {
      const int level = planes.resident_levels() + 1;
      int pieces = 1;
      for (;; ++pieces) {
        const auto done = planes.Restore(clock_, Duration::zero());
        ASSERT_TRUE(done.ok()) << done.status();
        if (*done) break;
        EXPECT_TRUE(planes.restoring());
        EXPECT_EQ(planes.resident_levels(), level - 1) << "not before it is whole";
      }
      EXPECT_GT(pieces, 2) << "the planes are meant to take several";
      EXPECT_FALSE(planes.restoring());
      EXPECT_EQ(planes.resident_levels(), level);
      EXPECT_EQ(Bytes(level), before[level - 1]) << "level " << level;
    }
  }
  EXPECT_EQ(planes.resident_bytes(), everything);
}

TEST_F(SlicePlanesTest, MemoryThatIsRefusedHalfWayIsGivenBackAndTheLevelComesLater) {
  SlicePlanes& planes = model_->slice_planes();
  const std::vector<uint8_t> before = Bytes(kNumLevels), below = Bytes(kNumLevels - 1);
  planes.Drop();
  backend_->RefuseAfter(1);
  const auto first = planes.Restore(clock_, Duration::zero());
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_FALSE(*first);
  EXPECT_TRUE(planes.restoring());
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(planes.Restore(clock_, Duration::zero()).status().code(),
              absl::StatusCode::kResourceExhausted);
    EXPECT_FALSE(planes.restoring()) << "what was there has been given back";
    EXPECT_EQ(planes.resident_levels(), kNumLevels - 1);
    EXPECT_EQ(Bytes(kNumLevels - 1), below);
  }
  EXPECT_EQ(backend_->refused(), 3);
  backend_->RefuseNothing();
  const auto done = planes.Restore(clock_, std::chrono::hours(1));
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_TRUE(*done);
  EXPECT_EQ(Bytes(kNumLevels), before);
}

TEST_F(SlicePlanesTest, ALevelComesBackInOneGoWhereThereIsTime) {
  SlicePlanes& planes = model_->slice_planes();
  planes.Drop();
  const auto done = planes.Restore(clock_, std::chrono::hours(1));
  ASSERT_TRUE(done.ok());
  EXPECT_TRUE(*done);
}

}  // namespace
}  // namespace mobi
