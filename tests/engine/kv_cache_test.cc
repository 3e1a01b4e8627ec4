#include "engine/kv_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "engine/synthetic_weights.h"

namespace mobi {
namespace {

TEST(KvCache, BlocksAreRowsOfEveryLayer) {
  auto config = ConfigOfShape("llama-3.2-1b");
  config->num_hidden_layers = 2;
  const auto backend = CreateCpuBackend({.num_threads = 1});
  const auto cache = KvCache::Create(*config, 3, 16, *backend);
  ASSERT_TRUE(cache.ok()) << cache.status();
  // Keys and values of 2 layers, 16 tokens, 8 heads of 64 floats.
  EXPECT_EQ(KvCache::BlockBytes(*config, 16, backend->activation_dtype()), 2 * 2 * 16 * 8 * 64 * 4);
  for (int layer = 0; layer < 2; ++layer) {
    for (const Tensor& tensor : {cache->layer(layer).k, cache->layer(layer).v}) {
      EXPECT_EQ(tensor.rows, 48);
      EXPECT_EQ(tensor.cols, 512);
    }
  }
}

TEST(KvCache, TooManyBlocksSaysHowManyFit) {
  const auto config = ConfigOfShape("llama-3-8b");
  const auto backend = CreateCpuBackend({.num_threads = 1});
  constexpr int kBlocks = 1 << 24;  // of 4 MiB
  const auto cache = KvCache::Create(*config, kBlocks, 16, *backend);
  ASSERT_EQ(cache.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(cache.status().message()),
              testing::ContainsRegex("16777216 blocks need 67108864.0 MiB; the [0-9.]+ of [0-9.]+ "
                                     "MiB that are free on .* would hold [0-9]+"));
}

TEST(KvCache, GrowsAndShrinksWhereItIsAndKeepsWhatStays) {
  auto config = ConfigOfShape("llama-3.2-1b");
  config->num_hidden_layers = 3;
  config->num_key_value_heads = 1;
  config->head_dim = 8;  // blocks of 24 tokens are no whole pages
  const auto backend = CreateCpuBackend({.num_threads = 1});
  auto cache = KvCache::Create(*config, 7, 24, *backend, 100);
  ASSERT_TRUE(cache.ok()) << cache.status();
  const auto fill = [&](int block, float value) {
    for (int layer = 0; layer < 3; ++layer) {
      for (const Tensor& tensor : {cache->layer(layer).k, cache->layer(layer).v}) {
        for (int row = 24 * block; row < 24 * (block + 1); ++row) {
          std::fill_n(tensor.Row<float>(row), 8, value++);
        }
      }
    }
  };
  const auto holds = [&](int block, float value) {
    for (int layer = 0; layer < 3; ++layer) {
      for (const Tensor& tensor : {cache->layer(layer).k, cache->layer(layer).v}) {
        for (int row = 24 * block; row < 24 * (block + 1); ++row) {
          if (tensor.Row<float>(row)[0] != value || tensor.Row<float>(row)[7] != value)
            return false;
          ++value;
        }
      }
    }
    return true;
  };
  for (int block = 0; block < 7; ++block) fill(block, 1000.0f * block);
  for (const int blocks : {100, 7, 8, 55, 9, 7, 99}) {
    ASSERT_TRUE(cache->Resize(blocks).ok());
    EXPECT_EQ(cache->num_blocks(), blocks);
    for (int block = 7; block < blocks; ++block) fill(block, -1000.0f * block);
    for (int block = 0; block < blocks; ++block) {
      ASSERT_TRUE(holds(block, block < 7 ? 1000.0f * block : -1000.0f * block)) << block;
    }
  }
  EXPECT_FALSE(cache->Resize(101).ok());
  EXPECT_EQ(cache->num_blocks(), 99);
}

TEST(KvCache, LentBytesMakeNoMoreBlocksThanTheyHold) {
  auto config = ConfigOfShape("llama-3.2-1b");
  const auto backend = CreateCpuBackend({.num_threads = 1});
  const auto cache = KvCache::Create(*config, 4, 16, *backend, 1000);
  ASSERT_TRUE(cache.ok());
  const size_t block = KvCache::BlockBytes(*config, 16, backend->activation_dtype());
  EXPECT_EQ(cache->BlocksIn(0), 0);
  EXPECT_EQ(cache->BlocksIn(block), 0) << "every tensor may have to begin a page";
  for (size_t bytes = 0; bytes < 100 * block; bytes += 123457) {
    EXPECT_LE(cache->BlocksIn(bytes) * block, bytes);
    EXPECT_GE((cache->BlocksIn(bytes) + 2) * block, bytes);
  }
}

}  // namespace
}  // namespace mobi
