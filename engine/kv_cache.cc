#include "engine/kv_cache.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

// Where a tensor could grow by fewer pages than this, tensors share their pages.
constexpr size_t kFewPages = 4;

}  // namespace

size_t KvCache::BlockBytes(const ModelConfig& config, int block_size, DType dtype) {
  return size_t{2} * config.num_hidden_layers * block_size * config.num_key_value_heads *
         config.head_dim * SizeOf(dtype);
}

absl::StatusOr<KvCache> KvCache::Create(const ModelConfig& config, int num_blocks, int block_size,
                                        Backend& backend, int max_blocks) {
  KvCache cache;
  cache.backend_ = &backend;
  cache.num_blocks_ = num_blocks;
  cache.max_blocks_ = std::max(num_blocks, max_blocks);
  cache.block_size_ = block_size;
  const size_t block_bytes = BlockBytes(config, block_size, backend.activation_dtype());
  const size_t bytes = num_blocks * block_bytes;
  const MemoryInfo memory = backend.memory();
  if (memory.total > 0 && bytes > memory.free) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "KV cache: %d blocks need %.1f MiB; the %.1f of %.1f MiB that are free on %s would hold %d",
        num_blocks, static_cast<double>(bytes) / 1048576,
        static_cast<double>(memory.free) / 1048576, static_cast<double>(memory.total) / 1048576,
        backend.description(), memory.free / block_bytes));
  }
  const size_t tensors = size_t{2} * config.num_hidden_layers;
  const size_t growth = (cache.max_blocks_ - num_blocks) * block_bytes / tensors;
  const bool shared_pages = growth > 0 && growth < kFewPages * backend.page_bytes();
  cache.num_extents_ = shared_pages ? 1 : tensors;
  cache.block_bytes_ = block_bytes / cache.num_extents_;
  MOBI_RETURN_IF_ERROR(cache.Allocate());
  cache.LayOut(config);
  return cache;
}

absl::Status KvCache::Allocate() {
  const std::string what = absl::StrCat("KV cache, ", num_blocks_, " blocks");
  if (max_blocks_ > num_blocks_) {
    extent_bytes_ = Pages(max_blocks_);
    MOBI_ASSIGN_OR_RETURN(memory_, backend_->Reserve(num_extents_ * extent_bytes_, what));
    return Grow(Pages(num_blocks_), what);
  }
  extent_bytes_ = num_blocks_ * block_bytes_;
  MOBI_ASSIGN_OR_RETURN(memory_, backend_->Allocate(num_extents_ * extent_bytes_, what));
  // Attention never reads a row that was not written, but a zero row keeps NaN out of any bug.
  backend_->Zero(memory_.data(), memory_.size());
  return absl::OkStatus();
}

void KvCache::LayOut(const ModelConfig& config) {
  const DType dtype = backend_->activation_dtype();
  const int64_t cols = int64_t{config.num_key_value_heads} * config.head_dim;
  const size_t tensors = size_t{2} * config.num_hidden_layers;
  const size_t tensors_a_row = tensors / num_extents_;
  const size_t apart = tensors_a_row > 1 ? cols * SizeOf(dtype) : extent_bytes_;
  for (size_t i = 0; i < tensors; i += 2) {
    const auto tensor = [&](size_t index) {
      return Tensor{memory_.As<std::byte>() + index * apart, dtype,
                    int64_t{max_blocks_} * block_size_, cols,
                    static_cast<int64_t>(tensors_a_row) * cols};
    };
    layers_.push_back({tensor(i), tensor(i + 1)});
  }
}

size_t KvCache::Pages(int num_blocks) const {
  const size_t page = backend_->page_bytes();
  return (num_blocks * block_bytes_ + page - 1) / page * page;
}

absl::Status KvCache::Grow(size_t bytes, std::string_view what) {
  const size_t before = grown_.empty() ? 0 : grown_.back();
  for (size_t i = 0; i < num_extents_; ++i) {
    const absl::Status status = backend_->Commit(extent(i) + before, bytes - before, what);
    if (status.ok()) continue;
    while (i-- > 0) backend_->Decommit(extent(i) + before, bytes - before);
    return status;
  }
  grown_.push_back(bytes);
  return absl::OkStatus();
}

absl::Status KvCache::Resize(int num_blocks) {
  if (num_blocks > max_blocks_) {
    return absl::InvalidArgumentError(
        absl::StrCat("KV cache: ", num_blocks, " blocks, the most is ", max_blocks_));
  }
  const size_t needed = Pages(num_blocks);
  while (grown_.size() > 1 && grown_[grown_.size() - 2] >= needed) {
    const size_t end = grown_.back();
    grown_.pop_back();
    for (size_t i = 0; i < num_extents_; ++i) {
      backend_->Decommit(extent(i) + grown_.back(), end - grown_.back());
    }
  }
  if (!grown_.empty() && needed > grown_.back()) {
    MOBI_RETURN_IF_ERROR(Grow(needed, "more KV blocks"));
  }
  num_blocks_ = num_blocks;
  return absl::OkStatus();
}

int KvCache::BlocksIn(size_t bytes) const {
  const size_t page = backend_->page_bytes();
  const size_t pages = bytes / (num_extents_ * page);
  return static_cast<int>(pages * page / block_bytes_);
}

}  // namespace mobi
