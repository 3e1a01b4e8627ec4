#include "engine/kv_cache.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"

namespace mobi {

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
  const DType dtype = backend.activation_dtype();
  const size_t block_bytes = BlockBytes(config, block_size, dtype);
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
  cache.block_bytes_ = block_bytes / tensors;
  cache.tensor_bytes_ = cache.Committed(cache.max_blocks_);
  const std::string what = absl::StrCat("KV cache, ", num_blocks, " blocks");
  if (max_blocks > num_blocks) {
    MOBI_ASSIGN_OR_RETURN(cache.memory_, backend.Reserve(tensors * cache.tensor_bytes_, what));
  } else {
    cache.tensor_bytes_ = num_blocks * cache.block_bytes_;
    MOBI_ASSIGN_OR_RETURN(cache.memory_, backend.Allocate(bytes, what));
  }
  const int64_t rows = int64_t{cache.max_blocks_} * block_size;
  const int64_t cols = int64_t{config.num_key_value_heads} * config.head_dim;
  for (int i = 0; i < config.num_hidden_layers; ++i) {
    cache.layers_.push_back({Tensor::Of(cache.tensor(2 * i), dtype, rows, cols),
                             Tensor::Of(cache.tensor(2 * i + 1), dtype, rows, cols)});
  }
  for (size_t i = 0; i < tensors; ++i) {
    if (max_blocks > num_blocks) {
      MOBI_RETURN_IF_ERROR(backend.Commit(cache.tensor(i), cache.Committed(num_blocks), what));
    }
    // Attention never reads a row that was not written, but a zero row keeps NaN out of any bug.
    backend.Zero(cache.tensor(i), num_blocks * cache.block_bytes_);
  }
  return cache;
}

size_t KvCache::Committed(int num_blocks) const {
  const size_t page = backend_->page_bytes();
  return (num_blocks * block_bytes_ + page - 1) / page * page;
}

absl::Status KvCache::Resize(int num_blocks) {
  if (num_blocks > max_blocks_) {
    return absl::InvalidArgumentError(
        absl::StrCat("KV cache: ", num_blocks, " blocks, the most is ", max_blocks_));
  }
  const size_t before = Committed(num_blocks_), after = Committed(num_blocks);
  for (size_t i = 0; i < num_tensors(); ++i) {
    if (after < before) backend_->Decommit(tensor(i) + after, before - after);
    if (after <= before) continue;
    const absl::Status status =
        backend_->Commit(tensor(i) + before, after - before, "more KV blocks");
    if (status.ok()) continue;
    while (i-- > 0) backend_->Decommit(tensor(i) + before, after - before);
    return status;
  }
  num_blocks_ = num_blocks;
  return absl::OkStatus();
}

int KvCache::BlocksIn(size_t bytes) const {
  // Every tensor may have to begin another page.
  const size_t ends = num_tensors() * backend_->page_bytes();
  return bytes > ends ? static_cast<int>((bytes - ends) / (num_tensors() * block_bytes_)) : 0;
}

}  // namespace mobi
