// Finds KV blocks already computed for a prompt's beginning. A full block is known by the hash of
// its tokens chained over all before it, seeded with what else its contents depend on: tenant salt
// and precision band. Tokens are compared on a hit, so a collision costs a miss, never a wrong
// answer. Belongs to the engine's thread.
// Source: the automatic prefix caching of vLLM, with precision added to the key.
#ifndef MOBI_ENGINE_PREFIX_CACHE_H_
#define MOBI_ENGINE_PREFIX_CACHE_H_

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "engine/block_allocator.h"

namespace mobi {

class PrefixCache {
 public:
  // Eviction must reach this object: BlockAllocator's on_evict calls Evict.
  PrefixCache(BlockAllocator& allocator, int block_size)
      : allocator_(allocator), block_size_(block_size) {}

  // The seed of a chain. Requests pinned to a precision share only with the same precision; the
  // others share among themselves, subject to min_bits.
  static uint64_t Seed(std::string_view salt, float pinned_bits, int pinned_level);

  struct Hit {
    std::vector<int32_t> blocks;  // references are taken for the caller
    uint64_t chain = 0;           // hash of the last of them, or the seed
  };
  // Longest run of cached full blocks for `tokens` whose KV was computed at `min_bits` or more.
  Hit Acquire(uint64_t seed, absl::Span<const int32_t> tokens, float min_bits);

  // Makes a full block known: the chain before it, its tokens, and the bits its KV was computed at.
  // A block of equal tokens that is already known stays, unless its bits are fewer; one that is
  // leaving does not become known. Returns the chain that ends in the block.
  uint64_t Insert(uint64_t chain, absl::Span<const int32_t> tokens, int32_t block, float bits);

  void Evict(int32_t block);
  size_t size() const { return by_block_.size(); }

 private:
  struct Entry {
    uint64_t parent = 0;
    int32_t block = 0;
    float bits = 0;
    std::vector<int32_t> tokens;
  };
  uint64_t Chain(uint64_t parent, absl::Span<const int32_t> tokens) const;

  BlockAllocator& allocator_;
  int block_size_;
  absl::flat_hash_map<uint64_t, Entry> by_hash_;
  absl::flat_hash_map<int32_t, uint64_t> by_block_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_PREFIX_CACHE_H_
