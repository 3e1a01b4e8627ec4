#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "backend_suite.h"
#include "kernels/cpu/reference_ops.h"

namespace mobi {
namespace {

struct HostRouter {
  Matrix w1, b1, u, w2, b2;
};

struct Batch {
  int num_coherent = 0;
  std::vector<float> price;
  std::vector<uint8_t> min_level, max_level;
};

struct Routed {
  std::vector<uint8_t> levels;  // [segment][token]
  std::vector<uint32_t> tiles;
  uint64_t loaded = 0;
};

// What Route counts to start with: it must add, not set.
constexpr uint32_t kTilesBefore = 7;
constexpr uint64_t kLoadedBefore = 11;

class BackendRoute : public BackendTest {
 protected:
  HostRouter RandomRouter(int num_hidden, int num_segments, int64_t cols) {
    const int scores = num_segments * kNumLevels;
    HostRouter router{
        Normal(DType::kF16, num_hidden, cols, 1 / std::sqrt(static_cast<float>(cols))),
        Normal(DType::kF32, 1, num_hidden), Normal(DType::kF32, 1, num_hidden, 0.3f),
        Normal(DType::kF32, scores, num_hidden, 0.3f), Normal(DType::kF32, 1, scores)};
    for (int s = 0; s < scores; ++s) {  // deeper levels mostly leave less loss
      router.b2.set(0, s, router.b2.at(0, s) - 1.5f * static_cast<float>(s % kNumLevels));
    }
    return router;
  }

  // A weight of which only the shape matters: Route does not read it.
  RoutedWeight Linear(const HostRouter& router, const std::vector<int64_t>& rows, int64_t cols) {
    RoutedWeight linear;
    linear.weight.cols = cols;
    linear.weight.num_segments = static_cast<int>(rows.size());
    for (size_t s = 0; s < rows.size(); ++s) {
      linear.weight.segment_end[s] = linear.weight.rows += rows[s];
      for (int k = 0; k < kNumLevels; ++k) {
        linear.router.bytes[s][k] = static_cast<float>(BytesAtLevel(rows[s], cols, k + 1));
      }
    }
    linear.router.num_hidden = static_cast<int>(router.w1.rows);
    linear.router.w1 = router.w1.view();
    linear.router.b1 = router.b1.view();
    linear.router.u = router.u.view();
    linear.router.w2 = router.w2.view();
    linear.router.b2 = router.b2.view();
    return linear;
  }

  // Prices about where levels change, bands of every kind.
  Batch RandomBatch(int tokens, int num_coherent, const RoutedWeight& linear) {
    Batch batch;
    batch.num_coherent = num_coherent;
    const float step = linear.router.bytes[0][1] - linear.router.bytes[0][0];
    for (int i = 0; i < tokens; ++i) {
      batch.price.push_back(std::exp(static_cast<float>(Uniform(-30, 10)) / 10) / step);
      const int a = Uniform(1, 4), b = Uniform(1, 4);
      const bool banded = Uniform(0, 3) == 0;
      batch.min_level.push_back(static_cast<uint8_t>(banded ? std::min(a, b) : 1));
      batch.max_level.push_back(static_cast<uint8_t>(banded ? std::max(a, b) : 4));
    }
    return batch;
  }

  Routed Run(const Matrix& x, const RoutedWeight& linear, const Batch& batch) {
    const auto tokens = static_cast<int>(x.rows);
    const int64_t stride = tokens + 3;
    RoutedWeight device = linear;
    for (Tensor* t : {&device.router.w1, &device.router.b1, &device.router.u, &device.router.w2,
                      &device.router.b2}) {
      t->data = Copy(t->data, t->rows * t->cols * SizeOf(t->dtype));
    }
    auto* levels =
        OnDevice(std::vector<uint8_t>(stride * linear.weight.num_segments, uint8_t{0xEE}));
    auto* tiles = OnDevice(std::vector<uint32_t>(tokens, kTilesBefore));
    auto* loaded = OnDevice(std::vector<uint64_t>{kLoadedBefore});
    backend().Route(OnDevice(x), device,
                    {.num_tokens = tokens,
                     .num_coherent = batch.num_coherent,
                     .price = OnDevice(batch.price),
                     .min_level = OnDevice(batch.min_level),
                     .max_level = OnDevice(batch.max_level),
                     .level_tiles = tiles,
                     .loaded_bytes = loaded},
                    levels, stride);
    Routed routed{{}, ToHost(tiles, tokens), ToHost(loaded, 1)[0]};
    const std::vector<uint8_t> all = ToHost(levels, stride * linear.weight.num_segments);
    for (int s = 0; s < linear.weight.num_segments; ++s) {
      routed.levels.insert(routed.levels.end(), all.begin() + s * stride,
                           all.begin() + s * stride + tokens);
    }
    return routed;
  }

  static Routed Expected(const Matrix& x, const RoutedWeight& linear, const Batch& batch) {
    const auto tokens = static_cast<int>(x.rows);
    Routed routed;
    routed.levels.resize(tokens * linear.weight.num_segments);
    routed.tiles.assign(tokens, kTilesBefore);
    routed.loaded = kLoadedBefore;
    reference::Route(x.view(), linear,
                     {.num_tokens = tokens,
                      .num_coherent = batch.num_coherent,
                      .price = batch.price.data(),
                      .min_level = batch.min_level.data(),
                      .max_level = batch.max_level.data(),
                      .level_tiles = routed.tiles.data(),
                      .loaded_bytes = &routed.loaded},
                     routed.levels.data(), tokens);
    return routed;
  }

  // A choice may differ from the reference's only where the two cost the same within rounding.
  static void ExpectAsCheap(const Matrix& x, const RoutedWeight& linear, const Batch& batch,
                            const Routed& actual, const Routed& expected) {
    const auto tokens = static_cast<int>(x.rows);
    const auto scores = reference::RouterScores(x.view(), linear);
    int differ = 0;
    for (int s = 0; s < linear.weight.num_segments; ++s) {
      for (int i = 0; i < tokens; ++i) {
        const int got = actual.levels[s * tokens + i], want = expected.levels[s * tokens + i];
        ASSERT_GE(got, batch.min_level[i]);
        ASSERT_LE(got, batch.max_level[i]);
        if (got == want) continue;
        ++differ;
        ASSERT_GE(i, batch.num_coherent) << "a shared level differs";
        const auto cost = [&](int level) {
          return std::exp(scores[i][s * kNumLevels + level - 1]) +
                 double{batch.price[i]} * linear.router.bytes[s][level - 1];
        };
        ASSERT_NEAR(cost(got), cost(want), 1e-4 * cost(want));
      }
    }
    ASSERT_LE(differ, 1 + tokens / 50);
    if (differ == 0) {
      EXPECT_EQ(actual.tiles, expected.tiles);
      EXPECT_EQ(actual.loaded, expected.loaded);
    }
  }
};

TEST_P(BackendRoute, EqualsReference) {
  for (const int tokens : {1, 2, 5, 16, 33, 150, 800}) {
    for (const int num_coherent : {0, 1, tokens / 2, tokens}) {
      std::vector<int64_t> rows(Uniform(1, kMaxSegments));
      for (int64_t& count : rows) count = kTileRows * Uniform(1, 20);
      const int64_t cols = kGroupSize * Uniform(1, 8);
      const HostRouter router = RandomRouter(Uniform(1, 64), static_cast<int>(rows.size()), cols);
      const RoutedWeight linear = Linear(router, rows, cols);
      const Matrix x = Normal(activations(), tokens, cols, 1, cols + 8);
      const Batch batch = RandomBatch(tokens, num_coherent, linear);
      SCOPED_TRACE(std::to_string(tokens) + " tokens, coherent " + std::to_string(num_coherent));
      ExpectAsCheap(x, linear, batch, Run(x, linear, batch), Expected(x, linear, batch));
    }
  }
}

TEST_P(BackendRoute, PinnedTokensKeepTheirLevelsBesideOthersThatChoose) {
  const int64_t cols = 5 * kGroupSize;
  const HostRouter router = RandomRouter(32, 3, cols);
  const RoutedWeight linear = Linear(router, {64, 32, 32}, cols);
  for (const int tokens : {40, 150, 800}) {
    for (const int first_pinned : {0, 20}) {
      const Matrix x = Normal(activations(), tokens, cols);
      Batch batch = RandomBatch(tokens, first_pinned / 2, linear);
      for (int i = first_pinned; i < tokens; ++i) {
        batch.min_level[i] = batch.max_level[i] = static_cast<uint8_t>(1 + i / 16 % kNumLevels);
      }
      ExpectAsCheap(x, linear, batch, Run(x, linear, batch), Expected(x, linear, batch));
    }
  }
}

// The levels that the tests see must vary, or they would prove little.
TEST_P(BackendRoute, RandomBatchesUseEveryLevel) {
  const int64_t cols = 2 * kGroupSize;
  const HostRouter router = RandomRouter(32, 2, cols);
  const RoutedWeight linear = Linear(router, {64, 32}, cols);
  const Matrix x = Normal(activations(), 200, cols);
  const Routed routed = Run(x, linear, RandomBatch(200, 0, linear));
  for (int level = 1; level <= kNumLevels; ++level) {
    EXPECT_GT(std::count(routed.levels.begin(), routed.levels.end(), level), 10);
  }
}

TEST_P(BackendRoute, TokenModeIsBatchInvariant) {
  const int64_t cols = 3 * kGroupSize;
  const HostRouter router = RandomRouter(32, 3, cols);
  const RoutedWeight linear = Linear(router, {64, 32, 32}, cols);
  const int tokens = 900;
  const Matrix x = Normal(activations(), tokens, cols);
  const Batch batch = RandomBatch(tokens, 0, linear);
  const Routed together = Run(x, linear, batch);
  for (const int i : {0, 1, 444, 899}) {
    Matrix one = Matrix::Poisoned(x.dtype, 1, cols);
    for (int64_t c = 0; c < cols; ++c) one.set(0, c, x.at(i, c));
    const Routed alone =
        Run(one, linear, {0, {batch.price[i]}, {batch.min_level[i]}, {batch.max_level[i]}});
    for (int s = 0; s < 3; ++s) EXPECT_EQ(alone.levels[s], together.levels[s * tokens + i]);
    EXPECT_EQ(alone.tiles[0], together.tiles[i]);
  }
}

TEST_P(BackendRoute, NonFiniteInputsReadTheHighestLevelAndHarmNoOther) {
  const int64_t cols = kGroupSize;
  const HostRouter router = RandomRouter(16, 1, cols);
  const RoutedWeight linear = Linear(router, {160}, cols);
  Matrix x = Normal(activations(), 6, cols);
  for (const int num_coherent : {0, 4}) {
    Batch batch = RandomBatch(6, num_coherent, linear);
    batch.min_level = {1, 1, 1, 1, 1, 1};
    batch.max_level = {4, 3, 4, 4, 2, 4};
    x.set(1, 5, std::numeric_limits<float>::quiet_NaN());
    x.set(4, 9, std::numeric_limits<float>::infinity());
    const Routed actual = Run(x, linear, batch), expected = Expected(x, linear, batch);
    EXPECT_EQ(actual.levels[1], 3);
    EXPECT_EQ(actual.levels[4], 2);
    EXPECT_EQ(actual.levels, expected.levels);
  }
}

MOBI_BACKEND_SUITE(BackendRoute);

}  // namespace
}  // namespace mobi
