#include "engine/slice_residency.h"

namespace mobi {

SliceResidency::SliceResidency(const ResidencyOptions& options, SlicePlanes& planes,
                               const WeightSource& source, KvCache& kv, BlockAllocator& allocator,
                               Scheduler& scheduler, const Clock& clock)
    : options_(options),
      planes_(planes),
      source_(source),
      kv_(kv),
      allocator_(allocator),
      scheduler_(scheduler),
      clock_(clock),
      enabled_(options.enabled && planes.can_drop().ok() &&
               kv.BlocksIn(planes.plane_bytes(kNumLevels)) > 0),
      own_blocks_(kv.num_blocks()),
      policy_(options) {}

void SliceResidency::Update(int needed_levels, Duration budget) {
  if (!enabled_) return;
  const TimePoint now = clock_.Now();
  if (!planes_.restoring()) {
    const int resident = resident_levels();
    const int wanted = policy_.Decide(Load(now, needed_levels));
    if (wanted < resident) return Drop(now);
    if (wanted == resident) {
      restore_began_.reset();
      allocator_.Resize(kv_.num_blocks());  // those that were leaving stay
      return;
    }
    if (retry_ && now < *retry_) return;
    if (!restore_began_) restore_began_ = now;
    if (!TakeBackBlocks(/*urgent=*/needed_levels > resident)) return;
  }
  Restore(budget);
}

ResidencyLoad SliceResidency::Load(TimePoint now, int needed_levels) const {
  ResidencyLoad load;
  load.now = now;
  load.resident_levels = resident_levels();
  load.needed_levels = needed_levels;
  load.short_of_blocks = !scheduler_.idle() && scheduler_.short_of_blocks();
  load.used_blocks = allocator_.num_blocks() - allocator_.num_free() + allocator_.num_leaving();
  load.blocks_after_restore = BlocksWith(load.resident_levels + 1);
  return load;
}

int SliceResidency::BlocksWith(int levels) const {
  int blocks = own_blocks_;
  for (int level = levels + 1; level <= kNumLevels; ++level) blocks += lent_[level];
  return blocks;
}

void SliceResidency::Drop(TimePoint now) {
  const int level = resident_levels();
  planes_.Drop();
  lent_[level] = kv_.BlocksIn(planes_.plane_bytes(level));
  if (!kv_.Resize(BlocksWith(level - 1)).ok()) lent_[level] = 0;  // others took the memory
  allocator_.Resize(kv_.num_blocks());
  restore_began_.reset();
  ++drops_;
  Changed(clock_.Now(), now);
}

bool SliceResidency::TakeBackBlocks(bool urgent) {
  const int blocks = BlocksWith(resident_levels() + 1);
  allocator_.Resize(blocks);
  if (urgent) scheduler_.Vacate();
  if (allocator_.num_leaving() > 0) return false;
  return kv_.Resize(blocks).ok();  // shrinking does not fail
}

void SliceResidency::Restore(Duration budget) {
  const int level = resident_levels() + 1;
  const absl::StatusOr<bool> done = planes_.Restore(clock_, budget);
  const TimePoint now = clock_.Now();
  if (!done.ok()) {
    // Somebody else has the memory: back to serving without it, for now.
    if (!kv_.Resize(BlocksWith(level - 1)).ok()) lent_[level] = 0;
    allocator_.Resize(kv_.num_blocks());
    restore_began_.reset();
    retry_ = now + options_.patience;
  } else if (*done) {
    lent_[level] = 0;
    retry_.reset();
    source_.ReleasePages();
    ++restores_;
    Changed(now, *restore_began_);
    restore_began_.reset();
  }
}

void SliceResidency::Changed(TimePoint now, TimePoint began) {
  scheduler_.SetResidentLevels(resident_levels());
  policy_.Changed(now);
  last_change_seconds_ = ToSeconds(now - began);
  change_seconds_sum_ += last_change_seconds_;
}

void SliceResidency::FillStats(EngineStats& stats) const {
  stats.resident_levels = resident_levels();
  stats.resident_slice_bytes = planes_.resident_bytes();
  stats.lent_kv_blocks = kv_.num_blocks() - own_blocks_;
  stats.slice_drops = drops_;
  stats.slice_restores = restores_;
  stats.slice_change_seconds_sum = change_seconds_sum_;
  stats.last_slice_change_seconds = last_change_seconds_;
}

}  // namespace mobi
