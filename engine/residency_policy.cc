#include "engine/residency_policy.h"

#include <algorithm>

namespace mobi {

int ResidencyPolicy::Decide(const ResidencyLoad& load) {
  const TimePoint now = load.now;
  if (load.short_of_blocks) {
    if (!short_since_) short_since_ = now;
    last_short_ = now;
  } else if (short_since_ && now - last_short_ > options_.patience) {
    short_since_.reset();
  }
  const bool calm = !load.short_of_blocks &&
                    load.used_blocks <= options_.restore_usage * load.blocks_after_restore;
  if (!calm) {
    calm_since_.reset();
  } else if (!calm_since_) {
    calm_since_ = now;
  }

  const int resident = load.resident_levels;
  if (load.needed_levels > resident) return resident + 1;
  if (changed_ && now - *changed_ < options_.dwell) return resident;
  if (short_since_ && last_short_ - *short_since_ >= options_.patience) {
    const int lowest = std::max({1, options_.min_levels, load.needed_levels});
    return std::max(resident - 1, std::min(resident, lowest));
  }
  if (calm_since_ && now - *calm_since_ >= options_.dwell && resident < kNumLevels) {
    return resident + 1;
  }
  return resident;
}

}  // namespace mobi
