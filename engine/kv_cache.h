// The paged KV cache's memory: one pair of tensors a layer, cut into blocks of block_size tokens
// that sequences hold through block tables (see block_allocator.h). May grow and shrink behind
// addresses that stay. Belongs to the engine's thread.
// Source: PagedAttention, Kwon et al., SOSP 2023.
#ifndef MOBI_ENGINE_KV_CACHE_H_
#define MOBI_ENGINE_KV_CACHE_H_

#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "kernels/backend.h"

namespace mobi {

class KvCache {
 public:
  // RESOURCE_EXHAUSTED when the blocks do not fit. With `max_blocks` the cache may grow so far;
  // UNIMPLEMENTED where the backend has no memory for that.
  static absl::StatusOr<KvCache> Create(const ModelConfig& config, int num_blocks, int block_size,
                                        Backend& backend, int max_blocks = 0);
  // Bytes of one block over all layers.
  static size_t BlockBytes(const ModelConfig& config, int block_size, DType dtype);

  // Gives memory to the first `num_blocks` blocks and takes it from the others, whose contents are
  // lost. RESOURCE_EXHAUSTED changes nothing.
  absl::Status Resize(int num_blocks);
  // Blocks that `bytes` of memory would add at least.
  int BlocksIn(size_t bytes) const;

  const KvLayer& layer(int index) const { return layers_[index]; }
  int num_blocks() const { return num_blocks_; }
  int block_size() const { return block_size_; }

 private:
  // Bytes of each tensor that hold so many blocks, in whole pages.
  size_t Committed(int num_blocks) const;
  // The memory of every layer's keys and values, one tensor after another.
  std::byte* tensor(size_t index) const { return memory_.As<std::byte>() + index * tensor_bytes_; }
  size_t num_tensors() const { return 2 * layers_.size(); }

  Backend* backend_ = nullptr;
  int num_blocks_ = 0;
  int max_blocks_ = 0;
  int block_size_ = 0;
  size_t block_bytes_ = 0;   // of one block in one tensor
  size_t tensor_bytes_ = 0;  // of addresses
  std::vector<KvLayer> layers_;
  Buffer memory_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_KV_CACHE_H_
