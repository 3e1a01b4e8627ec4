#include "engine/block_allocator.h"

#include <algorithm>
#include <utility>

namespace mobi {

BlockAllocator::BlockAllocator(int num_blocks, std::function<void(int32_t)> on_evict)
    : num_blocks_(num_blocks), blocks_(num_blocks), on_evict_(std::move(on_evict)) {
  free_.reserve(num_blocks);
  for (int32_t block = 0; block < num_blocks; ++block) free_.push_back(block);
}

std::optional<int32_t> BlockAllocator::Allocate() {
  int32_t block;
  if (!free_.empty()) {
    block = free_.front();
    std::pop_heap(free_.begin(), free_.end(), std::greater<>());
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
  if (leaving(block)) {
    --num_leaving_;
  } else if (b.cached) {
    b.position = cached_.insert(cached_.end(), block);
  } else {
    Free(block);
  }
}

void BlockAllocator::SetCached(int32_t block, bool cached) {
  Block& b = blocks_[block];
  if (b.references == 0 && b.cached && !cached) {
    cached_.erase(b.position);
    Free(block);
  }
  b.cached = cached;
}

void BlockAllocator::Resize(int num_blocks) {
  const int before = std::exchange(num_blocks_, num_blocks);
  blocks_.resize(std::max<size_t>(blocks_.size(), num_blocks));
  for (int32_t block = before; block < num_blocks; ++block) {
    if (blocks_[block].references > 0) {
      --num_leaving_;  // it stays after all
    } else {
      Free(block);
    }
  }
  if (num_blocks >= before) return;
  std::erase_if(free_, [this](int32_t block) { return leaving(block); });
  std::make_heap(free_.begin(), free_.end(), std::greater<>());
  for (int32_t block = num_blocks; block < before; ++block) {
    Block& b = blocks_[block];
    num_leaving_ += b.references > 0;
    if (!b.cached) continue;
    if (b.references == 0) cached_.erase(b.position);
    b.cached = false;
    on_evict_(block);
  }
}

void BlockAllocator::Free(int32_t block) {
  free_.push_back(block);
  std::push_heap(free_.begin(), free_.end(), std::greater<>());
}

}  // namespace mobi
