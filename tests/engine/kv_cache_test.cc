#include "engine/kv_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/synthetic_weights.h"
#include "kernels/create_backend.h"
#include "tests/engine/forwarding_backend.h"

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

// Counts the memory behind reservations.
class CountingBackend final : public ForwardingBackend {
 public:
  explicit CountingBackend(std::unique_ptr<Backend> inner) : ForwardingBackend(std::move(inner)) {}

  absl::Status Commit(void* at, size_t bytes, std::string_view what) override {
    if (committed_ + bytes > limit_) return absl::ResourceExhaustedError("others have the memory");
    committed_ += bytes;
    return ForwardingBackend::Commit(at, bytes, what);
  }
  void Decommit(void* at, size_t bytes) override {
    committed_ -= bytes;
    ForwardingBackend::Decommit(at, bytes);
  }
  size_t committed() const { return committed_; }
  void LimitTo(size_t bytes) { limit_ = bytes; }

 private:
  size_t committed_ = 0;
  size_t limit_ = std::numeric_limits<size_t>::max();
};

// A cache that may grow by so many pages a tensor: few, and its tensors share them. On the CPU, and
// on CUDA where there is a GPU.
class GrowingKvCacheTest : public testing::TestWithParam<std::tuple<std::string, int>> {
 protected:
  static constexpr int kLayers = 3;
  static constexpr int kOwn = 7;
  static constexpr int kBlockSize = 24;  // blocks are no whole pages

  void SetUp() override {
    auto backend = CreateBackend(std::get<0>(GetParam()), 2);
    if (!backend.ok()) GTEST_SKIP() << "NOT RUN: " << backend.status().message();
    backend_ = std::make_unique<CountingBackend>(*std::move(backend));
    const bool large_pages = backend_->page_bytes() > (1 << 20);
    auto config = ConfigOfShape("llama-3.2-1b");
    config->num_hidden_layers = kLayers;
    config->num_key_value_heads = large_pages ? 32 : 1;
    config->head_dim = large_pages ? 128 : 8;
    cols_ = int64_t{config->num_key_value_heads} * config->head_dim;
    const DType dtype = backend_->activation_dtype();
    block_bytes_ = KvCache::BlockBytes(*config, kBlockSize, dtype);
    const size_t growth = std::get<1>(GetParam()) * backend_->page_bytes();
    most_ = kOwn + static_cast<int>(growth / (block_bytes_ / (2 * kLayers)));
    auto cache = KvCache::Create(*config, kOwn, kBlockSize, *backend_, most_);
    ASSERT_TRUE(cache.ok()) << cache.status();
    cache_ = std::make_unique<KvCache>(*std::move(cache));
  }

  // The first and last row of the block in every tensor.
  template <typename Visit>
  void ForRows(int block, Visit visit) {
    const size_t bytes = cols_ * SizeOf(backend_->activation_dtype());
    int value = 0;
    for (int layer = 0; layer < kLayers; ++layer) {
      for (const Tensor& tensor : {cache_->layer(layer).k, cache_->layer(layer).v}) {
        for (const int row : {kBlockSize * block, kBlockSize * (block + 1) - 1}) {
          const auto content = static_cast<uint8_t>(block * 31 + 7 * value++);
          visit(tensor.Rows(row, 1).data, std::vector<uint8_t>(bytes, content));
        }
      }
    }
  }
  void Fill(int block) {
    ForRows(block, [&](void* row, const std::vector<uint8_t>& content) {
      backend_->Upload(content.data(), content.size(), row);
    });
  }
  void ExpectHolds(int block) {
    ForRows(block, [&](void* row, const std::vector<uint8_t>& content) {
      std::vector<uint8_t> held(content.size());
      backend_->Download(row, held.size(), held.data());
      ASSERT_TRUE(backend_->Synchronize().ok());
      ASSERT_EQ(held, content) << "block " << block;
    });
  }

  std::unique_ptr<CountingBackend> backend_;
  std::unique_ptr<KvCache> cache_;
  int64_t cols_ = 0;
  size_t block_bytes_ = 0;
  int most_ = 0;
};

TEST_P(GrowingKvCacheTest, LayersShareThePagesWhereThereAreFew) {
  const bool shared = std::get<1>(GetParam()) < 4;
  EXPECT_EQ(cache_->layer(0).k.stride, shared ? 2 * kLayers * cols_ : cols_);
}

TEST_P(GrowingKvCacheTest, GrowsAndShrinksWhereItIsAndKeepsWhatStays) {
  for (int block = 0; block < kOwn; ++block) Fill(block);
  const size_t before = backend_->committed();
  for (const int blocks : {most_, kOwn, kOwn + 1, kOwn + 3, kOwn + 2, kOwn, most_ - 1}) {
    ASSERT_TRUE(cache_->Resize(blocks).ok());
    EXPECT_EQ(cache_->num_blocks(), blocks);
    for (int block = kOwn; block < blocks; ++block) Fill(block);
    for (int block = 0; block < blocks; ++block) ExpectHolds(block);
    if (blocks == kOwn) {
      EXPECT_EQ(backend_->committed(), before) << "all of it is given back";
    }
  }
  EXPECT_FALSE(cache_->Resize(most_ + 1).ok());
  EXPECT_EQ(cache_->num_blocks(), most_ - 1);
}

TEST_P(GrowingKvCacheTest, LentBytesMakeNoMoreBlocksThanTheyHold) {
  const size_t before = backend_->committed();
  EXPECT_EQ(cache_->BlocksIn(0), 0);
  const size_t most = (most_ - kOwn) * block_bytes_;
  for (size_t bytes = 0; bytes <= most; bytes += most / 13) {
    const int blocks = cache_->BlocksIn(bytes);
    EXPECT_LE(blocks * block_bytes_, bytes);
    // What is lost is less than a page of each tensor, and less than a block.
    EXPECT_GT((blocks + 1) * block_bytes_ + 2 * kLayers * backend_->page_bytes(), bytes);
    ASSERT_TRUE(cache_->Resize(kOwn + blocks).ok());
    EXPECT_LE(backend_->committed() - before, bytes);
    ASSERT_TRUE(cache_->Resize(kOwn).ok());
  }
}

TEST_P(GrowingKvCacheTest, MemoryThatIsRefusedChangesNothing) {
  for (int block = 0; block < kOwn; ++block) Fill(block);
  const size_t before = backend_->committed();
  ASSERT_TRUE(cache_->Resize(most_).ok());
  const size_t whole = backend_->committed();
  ASSERT_TRUE(cache_->Resize(kOwn).ok());
  backend_->LimitTo(whole - 1);
  EXPECT_EQ(cache_->Resize(most_).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(cache_->num_blocks(), kOwn);
  EXPECT_EQ(backend_->committed(), before);
  for (int block = 0; block < kOwn; ++block) ExpectHolds(block);
}

INSTANTIATE_TEST_SUITE_P(Backends, GrowingKvCacheTest,
                         testing::Combine(testing::Values("cpu", "cuda"), testing::Values(1, 9)),
                         [](const auto& info) {
                           return absl::StrCat(std::get<0>(info.param), "_",
                                               std::get<1>(info.param), "_pages");
                         });

}  // namespace
}  // namespace mobi
