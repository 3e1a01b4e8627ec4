#include "engine/block_allocator.h"

#include <utility>

namespace mobi {

BlockAllocator::BlockAllocator(int num_blocks, std::function<void(int32_t)> on_evict)
    : blocks_(num_blocks), on_evict_(std::move(on_evict)) {
  free_.reserve(num_blocks);
  for (int32_t block = num_blocks; block-- > 0;) free_.push_back(block);
}

std::optional<int32_t> BlockAllocator::Allocate() {
  int32_t block;
  if (!free_.empty()) {
    block = free_.back();
    free_.pop_back();
  } else if (!cached_.empty()) {
    block = cached_.front();
    cached_.pop_front();
    blocks_[block].cached = false;
    on_evict_(block);
  } else {
    return std::nullopt;
  }
  blocks_[block].references = 1;
  return block;
}

void BlockAllocator::Retain(int32_t block) {
  Block& b = blocks_[block];
  if (b.references++ == 0) cached_.erase(b.position);
}

void BlockAllocator::Release(int32_t block) {
  Block& b = blocks_[block];
  if (--b.references > 0) return;
  if (b.cached) {
    b.position = cached_.insert(cached_.end(), block);
  } else {
    free_.push_back(block);
  }
}

void BlockAllocator::SetCached(int32_t block, bool cached) {
  Block& b = blocks_[block];
  if (b.references == 0 && b.cached && !cached) {
    cached_.erase(b.position);
    free_.push_back(block);
  }
  b.cached = cached;
}

}  // namespace mobi
