// Lends the memory of slices to the KV cache and takes it back, as ResidencyPolicy decides: a level
// leaves at once and its bytes become blocks at the end of the pool; before it returns those blocks
// must be free (new requests get none of them; where a request waits for the level, who holds one
// is preempted), and then it is read back piece by piece between steps. Belongs to the engine's
// thread.
#ifndef MOBI_ENGINE_SLICE_RESIDENCY_H_
#define MOBI_ENGINE_SLICE_RESIDENCY_H_

#include <array>
#include <optional>

#include "engine/base/clock.h"
#include "engine/block_allocator.h"
#include "engine/engine.h"
#include "engine/kv_cache.h"
#include "engine/residency_policy.h"
#include "engine/scheduler.h"
#include "engine/slice_planes.h"
#include "engine/weight_source.h"

namespace mobi {

class SliceResidency {
 public:
  // All outlive it. Off when the options say so or the planes cannot leave.
  SliceResidency(const ResidencyOptions& options, SlicePlanes& planes, const WeightSource& source,
                 KvCache& kv, BlockAllocator& allocator, Scheduler& scheduler, const Clock& clock);

  // Between steps: decides, and does what can be done at once, or for about `budget`.
  void Update(int needed_levels, Duration budget);

  // Steps may read levels up to this.
  int resident_levels() const { return planes_.resident_levels(); }
  // A level is on its way back.
  bool restoring() const { return restore_began_.has_value(); }
  // Whoever needs so many levels waits only because they are not back yet.
  bool Awaits(int levels) const { return levels > resident_levels() && !retry_; }
  // Nothing is away, so that nothing need be done without load.
  bool settled() const { return resident_levels() == kNumLevels; }
  void FillStats(EngineStats& stats) const;

 private:
  ResidencyLoad Load(TimePoint now, int needed_levels) const;
  // Of the pool while levels up to this are resident.
  int BlocksWith(int levels) const;
  void Drop(TimePoint now);
  // True once the blocks lent by the next level are free and their memory is given back.
  bool TakeBackBlocks(bool urgent);
  void Restore(Duration budget);
  void Changed(TimePoint now, TimePoint began);

  const ResidencyOptions options_;
  SlicePlanes& planes_;
  const WeightSource& source_;
  KvCache& kv_;
  BlockAllocator& allocator_;
  Scheduler& scheduler_;
  const Clock& clock_;
  const bool enabled_;
  const int own_blocks_;  // of the pool while everything is resident
  ResidencyPolicy policy_;
  std::array<int, kNumLevels + 1> lent_{};  // blocks by level that is away
  std::optional<TimePoint> restore_began_;
  std::optional<TimePoint> retry_;  // there was no memory; no attempt to restore before
  uint64_t drops_ = 0;
  uint64_t restores_ = 0;
  double change_seconds_sum_ = 0;
  double last_change_seconds_ = 0;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_SLICE_RESIDENCY_H_
