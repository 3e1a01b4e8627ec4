// The paged KV cache's memory: one pair of tensors a layer, cut into blocks of block_size tokens
// that sequences hold through block tables (see block_allocator.h). May grow and shrink behind
// addresses that stay: then each tensor has pages of its own, or, where a page is much beside what
// may be added, all tensors lie side by side in every row, as one extent. Belongs to the engine's
// thread.
// Source: PagedAttention, Kwon et al., SOSP 2023.
#ifndef MOBI_ENGINE_KV_CACHE_H_
#define MOBI_ENGINE_KV_CACHE_H_

#include <string_view>
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
  // lost, in the pieces in which it grew. RESOURCE_EXHAUSTED changes nothing.
  absl::Status Resize(int num_blocks);
  // Blocks that `bytes` of memory would add at least.
  int BlocksIn(size_t bytes) const;

  const KvLayer& layer(int index) const { return layers_[index]; }
  int num_blocks() const { return num_blocks_; }
  int block_size() const { return block_size_; }

 private:
  absl::Status Allocate();
  void LayOut(const ModelConfig& config);
  // Bytes of each extent that hold so many blocks, in whole pages.
  size_t Pages(int num_blocks) const;
  // Every extent's memory, to so many bytes.
  absl::Status Grow(size_t bytes, std::string_view what);
  std::byte* extent(size_t index) const { return memory_.As<std::byte>() + index * extent_bytes_; }

  Backend* backend_ = nullptr;
  int num_blocks_ = 0;
  int max_blocks_ = 0;
  int block_size_ = 0;
  size_t num_extents_ = 0;     // one for each tensor, or one for all
  size_t block_bytes_ = 0;     // of one block in one extent
  size_t extent_bytes_ = 0;    // of addresses
  std::vector<size_t> grown_;  // bytes of each extent after every growth that is not taken back
  std::vector<KvLayer> layers_;
  Buffer memory_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_KV_CACHE_H_
