#include "engine/kv_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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

}  // namespace
}  // namespace mobi
