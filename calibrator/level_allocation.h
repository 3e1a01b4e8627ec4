// Which level every linear reads when a whole batch reads the same: the levels that minimise loss
// plus price times bytes over the model, for an average of bits. Tuning draws such allocations, so
// that pairs meet the neighbours that they will have in coherent mode. Pure but for Measure.
#ifndef MOBI_CALIBRATOR_LEVEL_ALLOCATION_H_
#define MOBI_CALIBRATOR_LEVEL_ALLOCATION_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "calibrator/float_model.h"
#include "calibrator/nested_weight.h"
#include "calibrator/routing.h"
#include "calibrator/routing_samples.h"

namespace mobi {

// [layer][group][segment], 1..4.
using ModelLevels = std::vector<std::array<std::vector<uint8_t>, kNumLinearGroups>>;

class LevelAllocation {
 public:
  // The mean loss that each level of each linear leaves over `ids` (routing_samples.h).
  static absl::StatusOr<LevelAllocation> Measure(const FloatModel& model,
                                                 const std::vector<FittedBlock>& blocks,
                                                 absl::Span<const int32_t> ids, int64_t seq_len,
                                                 const RoutingSampleOptions& options);
  // Of one linear group: losses [1, segments * kNumLevels].
  struct Group {
    Matrix losses;
    std::vector<SegmentCost> costs;
  };
  explicit LevelAllocation(std::vector<std::array<Group, kNumLinearGroups>> layers)
      : layers_(std::move(layers)) {}

  // The best levels that average `bits`, as near as whole linears allow. Losses differ from batch
  // to batch: each linear's are multiplied by a log-normal factor of size `jitter`, drawn by `key`.
  ModelLevels Draw(double bits, double jitter, uint64_t key) const;

 private:
  std::vector<std::array<Group, kNumLinearGroups>> layers_;
};

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_LEVEL_ALLOCATION_H_
