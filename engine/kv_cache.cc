#include "engine/kv_cache.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
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
