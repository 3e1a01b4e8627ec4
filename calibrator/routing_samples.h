// What routers learn from, measured on the fitted model with tokens at mixed levels: each group's
// inputs, the error that every level leaves there, and how much that error costs in loss. The cost
// comes from one backward pass over labels drawn from the model itself: half the mean square of
// gradient times error estimates the rise of KL (Fisher information), without running the model
// once per linear and level. Layers are visited from the last to the first, one at a time.
#ifndef MOBI_CALIBRATOR_ROUTING_SAMPLES_H_
#define MOBI_CALIBRATOR_ROUTING_SAMPLES_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "calibrator/float_model.h"
#include "calibrator/matrix.h"
#include "calibrator/nested_weight.h"

namespace mobi {

// One linear group's samples; columns of segment s at level k are s * kNumLevels + k - 1.
struct RoutingSamples {
  Matrix inputs;                    // [tokens, cols]
  Matrix errors;                    // [tokens, segments * kNumLevels], |(W - W_k) x|^2
  std::vector<double> loss_factor;  // [segments * kNumLevels], loss per unit of error
};

struct RoutingSampleOptions {
  // How often a token reads levels 1..4 in the pass that samples are taken from.
  std::array<double, kNumLevels> level_shares = {0.5, 0.3, 0.15, 0.05};
  uint64_t seed = 1;
  int num_threads = 1;
};

using LayerSamplesFn = absl::FunctionRef<absl::Status(
    int layer, std::array<RoutingSamples, kNumLinearGroups>& samples)>;

// Out-features of the linears of each group of a layer.
std::array<std::vector<int64_t>, kNumLinearGroups> SegmentRows(const ModelConfig& config);

// `ids`: sequences of `seq_len` tokens, one after another. Calls `on_layer` for every layer.
absl::Status SampleRouting(const FloatModel& model, const std::vector<FittedBlock>& blocks,
                           absl::Span<const int32_t> ids, int64_t seq_len,
                           const RoutingSampleOptions& options, LayerSamplesFn on_layer);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_ROUTING_SAMPLES_H_
