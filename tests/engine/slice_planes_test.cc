// Planes of slices: what leaves comes back byte for byte, in as many pieces as it takes. On the
// CPU, and on CUDA where there is a GPU.
#include "engine/slice_planes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "engine/model.h"
#include "engine/synthetic_weights.h"
#include "kernels/create_backend.h"
#include "tests/engine/refusing_backend.h"

namespace mobi {
namespace {

class SlicePlanesTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    auto backend = CreateBackend(GetParam(), 2);
    if (!backend.ok()) GTEST_SKIP() << "NOT RUN: " << backend.status().message();
    backend_ = std::make_unique<RefusingBackend>(*std::move(backend));
    auto config = ConfigOfShape("llama-3.2-1b");
    ASSERT_TRUE(config.ok());
    // Planes of several of the pieces in which they come back.
    config->num_hidden_layers = backend_->page_bytes() > (1 << 20) ? 10 : 2;
    config->hidden_size = 1024;
    config->intermediate_size = 4096;
    config->vocab_size = 512;
    config->num_attention_heads = 16;
    config->num_key_value_heads = 4;
    config->head_dim = 64;
    auto weights = SyntheticWeights::Create("test", *config, {});
    ASSERT_TRUE(weights.ok()) << weights.status();
    weights_ = std::make_unique<SyntheticWeights>(*std::move(weights));
    auto model = Model::Load(*weights_, *backend_, 64);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
  }

  // Every byte that reading at `level` adds.
  std::vector<uint8_t> Bytes(int level) const {
    std::vector<uint8_t> bytes;
    const auto add = [&](const void* from, size_t size) {
      bytes.resize(bytes.size() + size);
      backend_->Download(from, size, bytes.data() + bytes.size() - size);
      EXPECT_TRUE(backend_->Synchronize().ok());
    };
    for (const DecoderLayer& layer : model_->layers()) {
      for (const Linear& linear : layer.linears) {
        const SlicedWeight& w = linear.routed->weight;
        add(w.slices[level - 1], SliceBytes(w.rows, w.cols));
        add(w.scales[level - 1], ScaleBytes(w.rows, w.cols));
      }
    }
    return bytes;
  }

  std::unique_ptr<RefusingBackend> backend_;
  std::unique_ptr<SyntheticWeights> weights_;
  std::unique_ptr<Model> model_;
  RealClock clock_;
};

TEST_P(SlicePlanesTest, WhatComesBackIsWhatLeft) {
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

TEST_P(SlicePlanesTest, MemoryThatIsRefusedHalfWayIsGivenBackAndTheLevelComesLater) {
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

TEST_P(SlicePlanesTest, ALevelComesBackInOneGoWhereThereIsTime) {
  SlicePlanes& planes = model_->slice_planes();
  planes.Drop();
  const auto done = planes.Restore(clock_, std::chrono::hours(1));
  ASSERT_TRUE(done.ok());
  EXPECT_TRUE(*done);
}

INSTANTIATE_TEST_SUITE_P(Backends, SlicePlanesTest, testing::Values("cpu", "cuda"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace mobi
