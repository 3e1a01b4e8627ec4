#include "kernels/cpu/reference_ops.h"

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/bit_slice.h"
#include "kernels/numeric.h"

// The oracle is checked here against definitions written out a second time, or by hand.
namespace mobi {
namespace {

TEST(ReferenceOps, SlicedMatmulIsTheDefinition) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const int64_t rows = 48, cols = 2 * kGroupSize, tokens = 5;
  std::vector<uint8_t> codes(rows * cols);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random());
  std::array<std::vector<uint8_t>, kNumSlices> slices;
  std::array<uint8_t*, kNumSlices> slice_data;
  SlicedWeight weight{.rows = rows, .cols = cols, .num_segments = 2, .segment_end = {16, 48}};
  for (int s = 0; s < kNumSlices; ++s) {
    slices[s].resize(SliceBytes(rows, cols));
    weight.slices[s] = slice_data[s] = slices[s].data();
  }
  PackSlices(codes.data(), rows, cols, slice_data.data());
  std::array<std::vector<uint16_t>, kNumLevels> scales;
  for (int k = 0; k < kNumLevels; ++k) {
    scales[k].resize(ScaleBytes(rows, cols) / 2);
    for (uint16_t& scale : scales[k]) scale = FloatToHalf(normal(random));
    weight.scales[k] = scales[k].data();
  }
  std::vector<float> x(tokens * cols), out(tokens * rows, NAN);
  for (float& value : x) value = normal(random);
  std::vector<uint8_t> levels(2 * tokens);
  for (uint8_t& level : levels) level = static_cast<uint8_t>(1 + random() % 4);

  reference::SlicedMatmul(Tensor::Of(x.data(), DType::kF32, tokens, cols), weight, levels.data(),
                          tokens, Tensor::Of(out.data(), DType::kF32, tokens, rows));
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t n = 0; n < rows; ++n) {
      const int level = levels[(n < 16 ? 0 : tokens) + i];
      double expected = 0;
      for (int64_t c = 0; c < cols; ++c) {
        const uint16_t* pair = scales[level - 1].data() + 2 * ScaleIndex(n, c / kGroupSize, cols);
        expected += x[i * cols + c] *
                    (HalfToFloat(pair[1]) +
                     double{HalfToFloat(pair[0])} * FractionAtLevel(codes[n * cols + c], level));
      }
      ASSERT_NEAR(out[i * rows + n], expected, 1e-4) << i << "," << n;
    }
  }
}

TEST(ReferenceOps, RmsNormByHand) {
  float x[] = {3, 4}, weight[] = {1, 2}, out[2];
  reference::RmsNorm(Tensor::Of(x, DType::kF32, 1, 2), Tensor::Of(weight, DType::kF32, 1, 2), 0.5f,
                     Tensor::Of(out, DType::kF32, 1, 2));
  EXPECT_FLOAT_EQ(out[0], 3 / std::sqrt(13.0f));
  EXPECT_FLOAT_EQ(out[1], 8 / std::sqrt(13.0f));
}

TEST(ReferenceOps, RopeRotatesHalvesAndWritesTheCache) {
  // One q head, one kv head of two dimensions, a quarter turn: (a, b) becomes (-b, a).
  float qkv[] = {1, 2, 3, 4, 5, 6}, cos[] = {1, 0}, sin[] = {0, 1};
  float k[] = {-1, -1, -1, -1}, v[] = {-1, -1, -1, -1};
  const int32_t position = 1, slot = 1;
  reference::RopeAndWriteKv(
      Tensor::Of(qkv, DType::kF32, 1, 6),
      {Tensor::Of(cos, DType::kF32, 2, 1), Tensor::Of(sin, DType::kF32, 2, 1)}, &position, &slot,
      {.num_heads = 1, .num_kv_heads = 1, .head_dim = 2, .block_size = 2},
      {Tensor::Of(k, DType::kF32, 2, 2), Tensor::Of(v, DType::kF32, 2, 2)});
  const float rotated[] = {-2, 1, -4, 3, 5, 6};
  for (int i = 0; i < 6; ++i) EXPECT_EQ(qkv[i], rotated[i]);
  EXPECT_EQ(k[0], -1);
  EXPECT_EQ(k[2], -4);
  EXPECT_EQ(k[3], 3);
  EXPECT_EQ(v[2], 5);
  EXPECT_EQ(v[3], 6);
}

TEST(ReferenceOps, AttentionIsCausalAndFollowsTheBlockTable) {
  // Blocks of one token, stored backwards; values are the positions. Equal keys: a plain mean.
  float q[] = {1, 1}, k[] = {0, 0, 0}, v[] = {30, 20, 10}, out[2];
  const int32_t query_start[] = {0, 2}, context_len[] = {3}, blocks[] = {2, 1, 0};
  const AttentionBatch batch{.num_seqs = 1,
                             .max_query_len = 2,
                             .max_context_len = 3,
                             .query_start = query_start,
                             .context_len = context_len,
                             .block_table = blocks,
                             .block_table_stride = 3};
  const AttentionShape shape{.num_heads = 1, .num_kv_heads = 1, .head_dim = 1, .block_size = 1};
  const KvLayer kv{Tensor::Of(k, DType::kF32, 3, 1), Tensor::Of(v, DType::kF32, 3, 1)};
  reference::Attention(Tensor::Of(q, DType::kF32, 2, 1), kv, batch, shape,
                       Tensor::Of(out, DType::kF32, 2, 1));
  EXPECT_FLOAT_EQ(out[0], 15);
  EXPECT_FLOAT_EQ(out[1], 20);
  k[1] = std::log(2.0f);  // position 1 now weighs twice
  reference::Attention(Tensor::Of(q, DType::kF32, 2, 1), kv, batch, shape,
                       Tensor::Of(out, DType::kF32, 2, 1));
  EXPECT_FLOAT_EQ(out[0], 50.0f / 3);
  EXPECT_FLOAT_EQ(out[1], 20);
}

// A router without hidden units has its biases as scores.
class ReferenceRoute : public testing::Test {
 protected:
  static constexpr int kTokens = 4;

  void Route(std::array<float, 4> losses, int num_coherent) {
    for (int i = 0; i < 4; ++i) scores_[i] = std::log(losses[i]);
    linear_.weight = {.rows = 32, .cols = 256, .num_segments = 1, .segment_end = {32}};
    linear_.router.b2 = Tensor::Of(scores_.data(), DType::kF32, 1, 4);
    linear_.router.bytes[0] = bytes_;
    std::vector<float> x(kTokens * 256, 1.0f);
    const RoutingBatch batch{.num_tokens = kTokens,
                             .num_coherent = num_coherent,
                             .price = price_.data(),
                             .min_level = min_level_.data(),
                             .max_level = max_level_.data(),
                             .level_tiles = tiles_.data(),
                             .loaded_bytes = &loaded_};
    reference::Route(Tensor::Of(x.data(), DType::kF32, kTokens, 256), linear_, batch,
                     levels_.data(), kTokens);
  }

  std::array<float, 4> bytes_ = {100, 200, 300, 400};
  std::array<float, 4> scores_;
  RoutedWeight linear_;
  std::array<float, kTokens> price_ = {1, 1, 1, 1};
  std::array<uint8_t, kTokens> min_level_ = {1, 1, 1, 1}, max_level_ = {4, 4, 4, 4}, levels_;
  std::array<uint32_t, kTokens> tiles_ = {};
  uint64_t loaded_ = 0;
};

TEST_F(ReferenceRoute, TokenModeMinimisesLossPlusPriceOfBytes) {
  price_ = {0.001f, 1, 3, 1000};
  Route({1000, 500, 250, 240}, 0);
  EXPECT_EQ(levels_, (std::array<uint8_t, 4>{4, 3, 2, 1}));
  EXPECT_EQ(tiles_, (std::array<uint32_t, 4>{16, 12, 8, 4}));
  EXPECT_EQ(loaded_, 400u);
}

TEST_F(ReferenceRoute, TiesGoToTheLowerLevelAndBandsHold) {
  min_level_ = {1, 2, 3, 1};
  max_level_ = {4, 4, 3, 1};
  bytes_ = {300, 300, 300, 300};
  Route({1, 1, 1, 1}, 0);
  EXPECT_EQ(levels_, (std::array<uint8_t, 4>{1, 2, 3, 1}));
  EXPECT_EQ(loaded_, 300u);
}

TEST_F(ReferenceRoute, CoherentTokensPayTogether) {
  // Alone, level 2 saves 60 for 100 bytes and is not read; two tokens share its cost.
  Route({100, 40, 35, 30}, 0);
  EXPECT_EQ(levels_, (std::array<uint8_t, 4>{1, 1, 1, 1}));
  Route({100, 40, 35, 30}, 2);
  EXPECT_EQ(levels_, (std::array<uint8_t, 4>{2, 2, 1, 1}));
}

TEST_F(ReferenceRoute, WhatAPinnedTokenReadsIsFree) {
  min_level_[3] = max_level_[3] = 3;
  Route({100, 99, 98, 50}, 3);
  EXPECT_EQ(levels_, (std::array<uint8_t, 4>{4, 4, 4, 3}));
  Route({100, 99, 98, 97}, 3);
  EXPECT_EQ(levels_, (std::array<uint8_t, 4>{3, 3, 3, 3}));
}

TEST_F(ReferenceRoute, NonFiniteScoresReadTheHighestLevelAllowed) {
  max_level_ = {4, 3, 2, 1};
  Route({1, std::numeric_limits<float>::quiet_NaN(), 1, 1}, 2);
  EXPECT_EQ(levels_, max_level_);
}

class ReferenceSampling : public testing::Test {
 protected:
  // Allowed tokens of the row, ascending.
  std::vector<int> Allowed(std::vector<float> logits, const SamplingRow& row,
                           std::vector<LogitEdit> edits = {}) {
    const auto vocab = static_cast<int64_t>(logits.size());
    const std::vector<double> scores = reference::FilteredScores(
        Tensor::Of(logits.data(), DType::kF32, 1, vocab), row, edits.data());
    std::vector<int> allowed;
    for (size_t i = 0; i < scores.size(); ++i) {
      if (std::isfinite(scores[i])) allowed.push_back(static_cast<int>(i));
    }
    return allowed;
  }

  static SamplingRow Row() {
    SamplingRow row{};
    row.temperature = 1;
    row.top_p = 1;
    return row;
  }
};

TEST_F(ReferenceSampling, TopKKeepsTies) {
  SamplingRow row = Row();
  row.top_k = 2;
  EXPECT_EQ(Allowed({1, 3, 2, 2, 0}, row), (std::vector<int>{1, 2, 3}));
}

TEST_F(ReferenceSampling, TopPIsTheSmallestSetThatReachesIt) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.25f), std::log(0.15f),
                                     std::log(0.1f)};
  SamplingRow row = Row();
  for (const auto& [top_p, count] : std::vector<std::pair<float, size_t>>{
           {0.01f, 1}, {0.49f, 1}, {0.51f, 2}, {0.74f, 2}, {0.76f, 3}, {0.91f, 4}}) {
    row.top_p = top_p;
    EXPECT_EQ(Allowed(logits, row).size(), count) << top_p;
  }
}

TEST_F(ReferenceSampling, MinPIsRelativeToTheLikeliest) {
  SamplingRow row = Row();
  row.min_p = 0.3f;
  EXPECT_EQ(Allowed({std::log(0.5f), std::log(0.2f), std::log(0.1f)}, row),
            (std::vector<int>{0, 1}));
}

TEST_F(ReferenceSampling, TemperatureComesBeforeTopP) {
  SamplingRow row = Row();
  row.top_p = 0.7f;
  EXPECT_EQ(Allowed({2, 1, 0}, row).size(), 2u);
  row.temperature = 0.5f;
  EXPECT_EQ(Allowed({2, 1, 0}, row).size(), 1u);
}

TEST_F(ReferenceSampling, EditsPenaliseBothSigns) {
  std::vector<float> logits = {2, -1, 1.5f, 0};
  SamplingRow row = Row();
  row.edit_end = 3;
  const std::vector<LogitEdit> edits = {{0, 2.0f, 0.0f}, {1, 2.0f, 0.0f}, {3, 1.0f, 7.0f}};
  const std::vector<double> scores =
      reference::FilteredScores(Tensor::Of(logits.data(), DType::kF32, 1, 4), row, edits.data());
  EXPECT_EQ(scores, (std::vector<double>{1, -2, 1.5, 7}));
}

TEST_F(ReferenceSampling, NonFiniteLogitsGiveNoToken) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    std::vector<float> logits = {0, bad, 1};
    const SamplingRow row = Row();
    Sampled out{};
    reference::Sample(Tensor::Of(logits.data(), DType::kF32, 1, 3), {1, &row, nullptr}, &out);
    EXPECT_EQ(out.token, kNonFiniteLogits);
  }
}

TEST_F(ReferenceSampling, LogprobsAreOfTheUnmodifiedLogits) {
  std::vector<float> logits = {std::log(0.7f), std::log(0.2f), std::log(0.1f)};
  const Tensor tensor = Tensor::Of(logits.data(), DType::kF32, 1, 3);
  SamplingRow row = Row();
  row.temperature = 0;
  row.edit_end = 1;
  const LogitEdit edit{0, 1.0f, -100.0f};
  Sampled out{};
  reference::Sample(tensor, {1, &row, &edit}, &out);
  EXPECT_EQ(out.token, 1);
  EXPECT_NEAR(out.logprob, std::log(0.2), 1e-6);
  const int32_t rows[] = {0};
  TopLogprobs top;
  reference::MostLikely(tensor, rows, 1, 2, &top);
  EXPECT_EQ(top.tokens[0], 0);
  EXPECT_EQ(top.tokens[1], 1);
  EXPECT_NEAR(top.logprobs[0], std::log(0.7), 1e-6);
}

}  // namespace
}  // namespace mobi
