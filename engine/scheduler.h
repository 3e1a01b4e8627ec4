// Decides what runs in the next step: continuous batching over a paged KV cache, prompts in chunks
// under a token budget beside the decodes, preemption by recompute when blocks run out, priorities
// that age, tenants served in equal measure. Knows no tensor and no thread; deterministic, so it
// can be simulated. Belongs to the engine's thread. Source: Orca (OSDI 2022) for continuous
// batching, Sarathi-Serve (OSDI 2024) for chunked prefill, the virtual token counter (OSDI 2024,
// "Fairness in Serving Large Language Models") for tenants.
#ifndef MOBI_ENGINE_SCHEDULER_H_
#define MOBI_ENGINE_SCHEDULER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "engine/base/clock.h"
#include "engine/block_allocator.h"
#include "engine/prefix_cache.h"
#include "engine/sequence.h"
#include "engine/step_pace.h"

namespace mobi {

struct SchedulerOptions {
  int block_size = 16;
  int max_num_seqs = 64;
  int max_num_batched_tokens = 512;
  // A request that has waited this long counts as one priority higher, and so on.
  Duration aging_interval = std::chrono::seconds(2);
};

// Tokens [begin, begin + count) of a sequence run in this step; its blocks cover them.
struct ScheduledChunk {
  Sequence* sequence = nullptr;
  int begin = 0;
  int count = 0;
  bool decode = false;  // one token, routed with the other decodes of the step
};

class Scheduler {
 public:
  Scheduler(const SchedulerOptions& options, BlockAllocator& allocator, PrefixCache& cache)
      : options_(options), allocator_(allocator), cache_(cache) {}

  // All sequences of the request wait their turn: by aged priority, then the tenant served least,
  // then arrival.
  void Add(Request& request);
  // Decodes first, in order of service; then prompts under way, then new ones: as many tokens of
  // them as `pace`, when given, lets run beside the decodes.
  std::vector<ScheduledChunk> Schedule(TimePoint now, const StepPace* pace = nullptr);
  // After a chunk has run: counts it as computed and shares its full blocks.
  void Computed(const ScheduledChunk& chunk, float kv_bits);
  // Frees what the sequence holds and forgets it; also for sequences that never ran.
  void Remove(Sequence& sequence);
  // Requests that need more levels than this wait, and hold nobody up.
  void SetResidentLevels(int levels) { resident_levels_ = levels; }
  // Preempts whoever holds a block that is leaving.
  void Vacate();

  bool idle() const { return running_.empty() && waiting_.empty(); }
  // The last plan left sequences waiting for others to end, not only for its budget of tokens.
  bool full() const { return full_; }
  // More blocks would have let it run more.
  bool short_of_blocks() const { return short_of_blocks_; }
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
  void Admit(std::vector<ScheduledChunk>& plan, int& budget, TimePoint now);
  // The waiting sequence to serve next, or waiting_.end().
  std::vector<Sequence*>::iterator NextWaiting(TimePoint now);
  bool MayStart(const Sequence& sequence) const;
  void FindPrefix(Sequence& sequence);
  void Preempt(Sequence& sequence);
  void ReleaseBlocks(Sequence& sequence);
  void InsertRunning(Sequence* sequence);

  // Tokens computed for a tenant. One that comes back after a pause starts level with the least
  // served of those present, so that idling earns no credit.
  struct Tenant {
    uint64_t served = 0;
    int sequences = 0;  // waiting or running
  };
  SchedulerOptions options_;
  BlockAllocator& allocator_;
  PrefixCache& cache_;
  std::vector<Sequence*> waiting_;
  std::vector<Sequence*> running_;  // in order of service
  absl::flat_hash_map<std::string, Tenant> tenants_;
  int resident_levels_ = kNumLevels;
  bool full_ = false;
  bool short_of_blocks_ = false;
  uint64_t preemptions_ = 0;
  uint64_t prefix_queries_ = 0;
  uint64_t prefix_hits_ = 0;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_SCHEDULER_H_
