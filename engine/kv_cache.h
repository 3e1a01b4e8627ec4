// The paged KV cache's memory: one pair of tensors a layer, cut into blocks of block_size tokens
// that sequences hold through block tables (see block_allocator.h). Belongs to the engine's thread.
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
  // RESOURCE_EXHAUSTED when the blocks do not fit.
  static absl::StatusOr<KvCache> Create(const ModelConfig& config, int num_blocks, int block_size,
                                        Backend& backend);
  // Bytes of one block over all layers.
  static size_t BlockBytes(const ModelConfig& config, int block_size, DType dtype);

  const KvLayer& layer(int index) const { return layers_[index]; }
  int num_blocks() const { return num_blocks_; }
  int block_size() const { return block_size_; }

 private:
  int num_blocks_ = 0;
  int block_size_ = 0;
  std::vector<KvLayer> layers_;
  Buffer memory_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_KV_CACHE_H_
