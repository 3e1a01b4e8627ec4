#include "engine/kv_cache.h"

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace mobi {

size_t KvCache::BlockBytes(const ModelConfig& config, int block_size, DType dtype) {
  return size_t{2} * config.num_hidden_layers * block_size * config.num_key_value_heads *
         config.head_dim * SizeOf(dtype);
}

absl::StatusOr<KvCache> KvCache::Create(const ModelConfig& config, int num_blocks, int block_size,
                                        Backend& backend) {
  KvCache cache;
  cache.num_blocks_ = num_blocks;
  cache.block_size_ = block_size;
  const DType dtype = backend.activation_dtype();
  const size_t bytes = num_blocks * BlockBytes(config, block_size, dtype);
  MOBI_ASSIGN_OR_RETURN(cache.memory_,
                        backend.Allocate(bytes, absl::StrCat("KV cache, ", num_blocks, " blocks")));
  // Attention never reads a row that was not written, but a zero row keeps NaN out of any bug.
  backend.Zero(cache.memory_.data(), bytes);
  const int64_t rows = int64_t{num_blocks} * block_size;
  const int64_t cols = int64_t{config.num_key_value_heads} * config.head_dim;
  const size_t tensor_bytes = static_cast<size_t>(rows * cols) * SizeOf(dtype);
  auto* at = cache.memory_.As<std::byte>();
  for (int i = 0; i < config.num_hidden_layers; ++i, at += 2 * tensor_bytes) {
    cache.layers_.push_back(
        {Tensor::Of(at, dtype, rows, cols), Tensor::Of(at + tensor_bytes, dtype, rows, cols)});
  }
  return cache;
}

}  // namespace mobi
