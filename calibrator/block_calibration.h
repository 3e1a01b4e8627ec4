// Calibrates one decoder block: propagates the float activations and one stream per chosen level
// through it, gathers the statistics of each linear group in turn and fits the group before the
// next one sees its output. Streams leave as the next block's inputs.
// Sits between the model's blocks (calibrate.h) and the fitting of one linear (linear_fit.h).
#ifndef MOBI_CALIBRATOR_BLOCK_CALIBRATION_H_
#define MOBI_CALIBRATOR_BLOCK_CALIBRATION_H_

#include <array>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "calibrator/fixed_width.h"
#include "calibrator/learned_clipping.h"
#include "calibrator/linear_fit.h"
#include "calibrator/llama_block.h"

namespace mobi {

struct BlockCalibrationOptions {
  // The level that each quantized stream reads everything before the current linear at, ascending;
  // a level without a stream of its own is fitted on the next lower one's.
  std::vector<int> stream_levels = {1, 2};
  // Levels from this one on are fitted to the float model's own inputs and weights: their streams
  // are so near to it that correcting for the difference gains nothing. 5: none.
  int float_from_level = 3;
  std::array<float, kNumLevels> level_weights = {1, 2.5f, 4, 8};
  double damping = 1e-2;
  LinearFitOptions fit;
  ClippingOptions clipping;  // where fit.base.method says so, instead of all of `fit`
  FixedWidthOptions fixed;   // a baseline instead of either
  int num_threads = 1;
};

// Residual stream of all calibration tokens, sequences one after another.
struct CalibrationStreams {
  int64_t seq_len = 0;
  Matrix float_hidden;         // [tokens, hidden_size]
  std::vector<Matrix> hidden;  // one per stream level
};

// Called after each part of the work on a block with what it gave and its share of the whole; an
// error ends the calibration.
using PartCallback = absl::FunctionRef<absl::Status(const std::string& what, double share)>;

absl::StatusOr<FittedBlock> CalibrateBlock(const ModelConfig& config, const BlockWeights& weights,
                                           const RopeValues& rope,
                                           const BlockCalibrationOptions& options,
                                           CalibrationStreams& streams, PartCallback on_part);

// Takes the streams through a block that is fitted already, exactly as CalibrateBlock left them.
void AdvanceStreams(const ModelConfig& config, const BlockWeights& weights, const RopeValues& rope,
                    const BlockCalibrationOptions& options, const FittedBlock& fitted,
                    CalibrationStreams& streams);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_BLOCK_CALIBRATION_H_
