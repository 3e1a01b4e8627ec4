#include "engine/prefix_cache.h"

#include <gtest/gtest.h>

#include <vector>

namespace mobi {
namespace {

class PrefixCacheTest : public testing::Test {
 protected:
  static constexpr int kBlockSize = 4;

  // Computes `tokens` at `bits` as a sequence would, and returns its full blocks.
  std::vector<int32_t> Fill(uint64_t seed, const std::vector<int32_t>& tokens, float bits) {
    std::vector<int32_t> blocks;
    uint64_t chain = seed;
    for (size_t i = 0; i + kBlockSize <= tokens.size(); i += kBlockSize) {
      blocks.push_back(*allocator_.Allocate());
      chain = cache_.Insert(chain, absl::MakeConstSpan(tokens).subspan(i, kBlockSize),
                            blocks.back(), bits);
    }
    return blocks;
  }

  BlockAllocator allocator_{4, [this](int32_t block) { cache_.Evict(block); }};
  PrefixCache cache_{allocator_, kBlockSize};
  const uint64_t seed_ = PrefixCache::Seed("", 0, 0);
};

TEST_F(PrefixCacheTest, FindsTheLongestCommonRunOfFullBlocks) {
  const auto blocks = Fill(seed_, {1, 2, 3, 4, 5, 6, 7, 8}, 8);
  EXPECT_EQ(cache_.Acquire(seed_, {1, 2, 3, 4, 5, 6, 7, 8, 9}, 2).blocks, blocks);
  EXPECT_EQ(cache_.Acquire(seed_, {1, 2, 3, 4, 5, 6, 7, 9}, 2).blocks.size(), 1u);
  EXPECT_TRUE(cache_.Acquire(seed_, {5, 6, 7, 8}, 2).blocks.empty()) << "not a prefix";
  EXPECT_TRUE(cache_.Acquire(seed_, {1, 2, 3}, 2).blocks.empty());
}

TEST_F(PrefixCacheTest, LowerPrecisionNeverServesARequestThatAsksForMore) {
  Fill(seed_, {1, 2, 3, 4}, 3.5f);
  EXPECT_TRUE(cache_.Acquire(seed_, {1, 2, 3, 4}, 4.0f).blocks.empty());
  EXPECT_EQ(cache_.Acquire(seed_, {1, 2, 3, 4}, 3.5f).blocks.size(), 1u);
}

TEST_F(PrefixCacheTest, BetterKvReplacesWorse) {
  const auto worse = Fill(seed_, {1, 2, 3, 4}, 3.0f);
  const auto better = Fill(seed_, {1, 2, 3, 4}, 6.0f);
  EXPECT_EQ(cache_.Acquire(seed_, {1, 2, 3, 4}, 5.0f).blocks, better);
  EXPECT_NE(worse, better);
}

TEST_F(PrefixCacheTest, TenantsAndPinnedPrecisionsDoNotShare) {
  Fill(seed_, {1, 2, 3, 4}, 8);
  EXPECT_TRUE(cache_.Acquire(PrefixCache::Seed("tenant", 0, 0), {1, 2, 3, 4}, 2).blocks.empty());
  EXPECT_TRUE(cache_.Acquire(PrefixCache::Seed("", 8.0f, 0), {1, 2, 3, 4}, 2).blocks.empty());
  EXPECT_TRUE(cache_.Acquire(PrefixCache::Seed("", 0, 4), {1, 2, 3, 4}, 2).blocks.empty());
}

TEST_F(PrefixCacheTest, EvictsTheLeastRecentlyUsedWhenNothingIsFree) {
  const auto first = Fill(seed_, {1, 1, 1, 1}, 8);
  const auto second = Fill(seed_, {2, 2, 2, 2}, 8);
  allocator_.Release(first[0]);
  allocator_.Release(second[0]);
  EXPECT_EQ(allocator_.num_free(), 4);
  // Using the first again makes the second the older one.
  allocator_.Release(cache_.Acquire(seed_, {1, 1, 1, 1}, 2).blocks.at(0));
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(allocator_.Allocate().has_value());
  EXPECT_TRUE(cache_.Acquire(seed_, {2, 2, 2, 2}, 2).blocks.empty());
  EXPECT_EQ(cache_.Acquire(seed_, {1, 1, 1, 1}, 2).blocks.size(), 1u);
  EXPECT_FALSE(allocator_.Allocate().has_value());
}

}  // namespace
}  // namespace mobi
