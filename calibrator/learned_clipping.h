// A block's ranges as the paper learns them, for comparison with linear_fit.h: the two ends of
// every group's range are sigmoid factors of its least and its greatest weight, trained with Adam
// on the block's output, straight through rounding; every level reads the one range by truncation.
// First the base slice alone, then all slices, each token at the levels that its gates choose;
// gates are trained in turns with the ranges (gate_training.h). Deterministic for a seed; a batch
// is one sequence. Sources: MoBiQuant (arXiv 2602.20191), OmniQuant's learnable weight clipping
// (arXiv 2308.13137).
#ifndef MOBI_CALIBRATOR_LEARNED_CLIPPING_H_
#define MOBI_CALIBRATOR_LEARNED_CLIPPING_H_

#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "calibrator/gate_training.h"
#include "calibrator/llama_block.h"
#include "calibrator/matrix.h"
#include "calibrator/nested_weight.h"
#include "calibrator/router_network.h"

namespace mobi {

struct ClippingOptions {
  int base_epochs = 20, joint_epochs = 20;  // over the calibration sequences
  float learning_rate = 1e-2f;              // of the factors' logits
  int gate_rounds = 2;                      // trainings of the gates, spread over the joint epochs
  int64_t gate_sequences = 16;              // that they learn from
  GateOptions gates;
  RouterTrainingOptions gate_training;
};

// Residual streams [tokens, hidden_size] entering the block when what is before it reads level 1
// (for the base slice) and more (for the joint epochs), and what the float model gives behind it.
struct ClippingStreams {
  const Matrix& base;
  const Matrix& joint;
  const Matrix& target;
};

// Called after each epoch with the mean squared error of the block's output beside its size; an
// error ends the training.
using ClippingCallback = absl::FunctionRef<absl::Status(const std::string& epoch, double error)>;

absl::StatusOr<FittedBlock> LearnClipping(const BlockContext& context, const BlockWeights& weights,
                                          const ClippingStreams& streams,
                                          const ClippingOptions& options,
                                          ClippingCallback on_epoch);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_LEARNED_CLIPPING_H_
