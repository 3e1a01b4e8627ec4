// Decides what runs in the next step: continuous batching over a paged KV cache, prompts in chunks
// under a token budget beside the decodes, preemption by recompute when blocks run out. Knows no
// tensor and no thread; deterministic, so it can be simulated. Belongs to the engine's thread.
// Source: Orca (OSDI 2022) for continuous batching, Sarathi-Serve (OSDI 2024) for chunked prefill.
#ifndef MOBI_ENGINE_SCHEDULER_H_
#define MOBI_ENGINE_SCHEDULER_H_

#include <cstdint>
#include <deque>
#include <vector>

#include "engine/block_allocator.h"
#include "engine/prefix_cache.h"
#include "engine/sequence.h"

namespace mobi {

struct SchedulerOptions {
  int block_size = 16;
  int max_num_seqs = 64;
  int max_num_batched_tokens = 512;
};

// Tokens [begin, begin + count) of a sequence run in this step; its blocks cover them.
struct ScheduledChunk {
  Sequence* sequence = nullptr;
  int begin = 0;
  int count = 0;
  bool decode = false;  // one token, the last known one
};

class Scheduler {
 public:
  Scheduler(const SchedulerOptions& options, BlockAllocator& allocator, PrefixCache& cache)
      : options_(options), allocator_(allocator), cache_(cache) {}

  // All sequences of the request wait their turn: by priority, then by arrival.
  void Add(Request& request);
  // Decodes first, in order of service; then prompts under way, then new ones.
  std::vector<ScheduledChunk> Schedule();
  // After a chunk has run: counts it as computed and shares its full blocks.
  void Computed(const ScheduledChunk& chunk, float kv_bits);
  // Frees what the sequence holds and forgets it; also for sequences that never ran.
  void Remove(Sequence& sequence);

  bool idle() const { return running_.empty() && waiting_.empty(); }
  int num_waiting() const { return static_cast<int>(waiting_.size()); }
  int num_running() const { return static_cast<int>(running_.size()); }
  uint64_t preemptions() const { return preemptions_; }
  uint64_t prefix_queries() const { return prefix_queries_; }
  uint64_t prefix_hits() const { return prefix_hits_; }

 private:
  // Blocks for the sequence's first `length` tokens, preempting later ones if need be. False: not
  // even that helped, and the sequence itself went back to waiting.
  bool Grow(Sequence& sequence, int length);
  // As Grow, from free blocks alone.
  bool TryGrow(Sequence& sequence, int length);
  void ScheduleDecodes(std::vector<ScheduledChunk>& plan, int& budget);
  void SchedulePrefills(std::vector<ScheduledChunk>& plan, int& budget);
  void Admit(std::vector<ScheduledChunk>& plan, int& budget);
  bool MayStart(const Sequence& sequence) const;
  void FindPrefix(Sequence& sequence);
  void Preempt(Sequence& sequence);
  void ReleaseBlocks(Sequence& sequence);
  void InsertWaiting(Sequence* sequence);

  SchedulerOptions options_;
  BlockAllocator& allocator_;
  PrefixCache& cache_;
  std::deque<Sequence*> waiting_;   // in order of service
  std::vector<Sequence*> running_;  // in order of service
  uint64_t preemptions_ = 0;
  uint64_t prefix_queries_ = 0;
  uint64_t prefix_hits_ = 0;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_SCHEDULER_H_
