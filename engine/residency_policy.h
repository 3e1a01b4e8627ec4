// When slices leave memory and when they come back: KV blocks that were short for a while take the
// highest level, and it returns once its blocks have not been needed for a while, or as soon as a
// request needs it. Deterministic and without a clock of its own, so that it can be simulated;
// belongs to the engine's thread. Carried out by SliceResidency.
#ifndef MOBI_ENGINE_RESIDENCY_POLICY_H_
#define MOBI_ENGINE_RESIDENCY_POLICY_H_

#include <optional>

#include "engine/base/clock.h"
#include "kernels/bit_slice.h"

namespace mobi {

struct ResidencyOptions {
  bool enabled = false;
  int min_levels = 2;  // never leave
  // Least time from any change to the next, unless a request needs the level; and how long its
  // blocks must not have been needed before a level returns.
  Duration dwell = std::chrono::seconds(10);
  // How long blocks must have been short, with no pause as long as that, before a level leaves.
  Duration patience = std::chrono::milliseconds(500);
  // A level returns when no more than this part of the blocks left after it is in use.
  double restore_usage = 0.7;
};

struct ResidencyLoad {
  TimePoint now;
  int resident_levels = kNumLevels;
  int needed_levels = 1;         // by requests that wait or run, and by the policy's floor
  bool short_of_blocks = false;  // something waits for blocks, or was preempted for them
  int used_blocks = 0;
  int blocks_after_restore = 0;  // that would be left if one more level were resident
};

class ResidencyPolicy {
 public:
  explicit ResidencyPolicy(const ResidencyOptions& options) : options_(options) {}

  // Levels that should be resident: as many as are, one fewer or one more. Call at every step, and
  // now and then without one.
  int Decide(const ResidencyLoad& load);
  // A level has left or is back.
  void Changed(TimePoint now) { changed_ = now; }

 private:
  const ResidencyOptions options_;
  std::optional<TimePoint> changed_;
  std::optional<TimePoint> short_since_;
  TimePoint last_short_;
  std::optional<TimePoint> calm_since_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_RESIDENCY_POLICY_H_
