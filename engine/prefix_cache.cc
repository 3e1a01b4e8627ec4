#include "engine/prefix_cache.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>

namespace mobi {

uint64_t PrefixCache::Seed(std::string_view salt, float pinned_bits, int pinned_level) {
  struct {
    float bits;
    int level;
  } precision{pinned_bits, pinned_level};
  return XXH3_64bits_withSeed(salt.data(), salt.size(), XXH3_64bits(&precision, sizeof(precision)));
}

uint64_t PrefixCache::Chain(uint64_t parent, absl::Span<const int32_t> tokens) const {
  return XXH3_64bits_withSeed(tokens.data(), tokens.size() * sizeof(int32_t), parent);
}

PrefixCache::Hit PrefixCache::Acquire(uint64_t seed, absl::Span<const int32_t> tokens,
                                      float min_bits) {
  Hit hit{{}, seed};
  for (size_t begin = 0; begin + block_size_ <= tokens.size(); begin += block_size_) {
    const auto block_tokens = tokens.subspan(begin, block_size_);
    const uint64_t hash = Chain(hit.chain, block_tokens);
    const auto found = by_hash_.find(hash);
    if (found == by_hash_.end()) break;
    const Entry& entry = found->second;
    if (entry.parent != hit.chain || entry.bits < min_bits ||
        !std::equal(block_tokens.begin(), block_tokens.end(), entry.tokens.begin())) {
      break;
    }
    allocator_.Retain(entry.block);
    hit.blocks.push_back(entry.block);
    hit.chain = hash;
  }
  return hit;
}

uint64_t PrefixCache::Insert(uint64_t chain, absl::Span<const int32_t> tokens, int32_t block,
                             float bits) {
  const uint64_t hash = Chain(chain, tokens);
  const auto known = by_hash_.find(hash);
  if (known != by_hash_.end() && known->second.bits < bits) {
    const int32_t old = known->second.block;
    Evict(old);
    allocator_.SetCached(old, false);
  }
  if (!by_hash_.contains(hash) && !by_block_.contains(block) && !allocator_.leaving(block)) {
    by_hash_[hash] = {chain, block, bits, {tokens.begin(), tokens.end()}};
    by_block_[block] = hash;
    allocator_.SetCached(block, true);
  }
  return hash;
}

void PrefixCache::Evict(int32_t block) {
  const auto found = by_block_.find(block);
  if (found == by_block_.end()) return;
  by_hash_.erase(found->second);
  by_block_.erase(found);
}

}  // namespace mobi
