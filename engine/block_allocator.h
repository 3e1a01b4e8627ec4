// Ownership of KV blocks: a free list with reference counts, so that sequences can share blocks of
// a common prefix. Unreferenced blocks that the prefix cache still knows wait in
// least-recently-used order and are taken only when no other is free. The lowest free block goes
// first, so that the last ones are soon free where memory is to be given back. Belongs to the
// engine's thread.
#ifndef MOBI_ENGINE_BLOCK_ALLOCATOR_H_
#define MOBI_ENGINE_BLOCK_ALLOCATOR_H_

#include <cstdint>
#include <functional>
#include <list>
#include <optional>
#include <vector>

namespace mobi {

class BlockAllocator {
 public:
  // `on_evict` is told when a cached block is taken for other contents.
  BlockAllocator(int num_blocks, std::function<void(int32_t block)> on_evict);

  int num_blocks() const { return num_blocks_; }
  // Blocks that Allocate can still give, cached ones included.
  int num_free() const { return static_cast<int>(free_.size() + cached_.size()); }

  // A block with one reference, or none when all are in use.
  std::optional<int32_t> Allocate();
  // One more reference; revives a cached block.
  void Retain(int32_t block);
  // One reference less; the last one frees the block, or keeps it cached if `cached`.
  void Release(int32_t block);
  // Whether the block's contents may be asked for again by the prefix cache.
  void SetCached(int32_t block, bool cached);
  int references(int32_t block) const { return blocks_[block].references; }

  // Gives out blocks below `num_blocks` only. Of those above, cached ones are evicted now and held
  // ones leave with their last reference.
  void Resize(int num_blocks);
  bool leaving(int32_t block) const { return block >= num_blocks_; }
  // Blocks above that are still held.
  int num_leaving() const { return num_leaving_; }

 private:
  struct Block {
    int references = 0;
    bool cached = false;
    std::list<int32_t>::iterator position;  // in cached_, when unreferenced and cached
  };
  void Free(int32_t block);

  int num_blocks_;
  int num_leaving_ = 0;
  std::vector<Block> blocks_;  // as many as there have ever been
  std::vector<int32_t> free_;  // a heap, the lowest on top
  std::list<int32_t> cached_;  // least recently used first
  std::function<void(int32_t)> on_evict_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_BLOCK_ALLOCATOR_H_
