// Fits lm_head in slices, as a linear of the decoder is fitted, and measures what a token's logits
// lose at each level. A vocabulary is long, so it is fitted and measured in pieces of rows: what a
// piece needs fits in memory, and finished pieces can be kept (fit_journal.h). Sits between
// calibrate.h and linear_fit.h.
#ifndef MOBI_CALIBRATOR_LM_HEAD_FIT_H_
#define MOBI_CALIBRATOR_LM_HEAD_FIT_H_

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "calibrator/block_calibration.h"
#include "calibrator/float_model.h"
#include "calibrator/matrix.h"
#include "calibrator/nested_weight.h"
#include "calibrator/routing_samples.h"
#include "calibrator/statistics.h"

namespace mobi {

struct LmHeadOptions {
  bool slices = true;  // else it stays as it is in the source
  int min_level = 3;   // the lowest that is fitted for reading
};

// KL(softmax(float) || softmax(level)) of rows of logits whose columns come in pieces.
class LogitDivergence {
 public:
  explicit LogitDivergence(int64_t tokens) : sums_(static_cast<size_t>(tokens)) {}

  // The next columns, [tokens, any] in both.
  void Add(ConstMatrixView float_logits, ConstMatrixView logits, int num_threads);
  // Over the tokens, in nats.
  double Mean() const;

 private:
  // Sums of exp(logit - max) of either side, and of the float side's times the difference.
  struct Sums {
    double float_max = -1e30, float_sum = 0, max = -1e30, sum = 0, difference = 0;
  };
  std::vector<Sums> sums_;
};

// The last block's output, [ids, hidden_size], of the fitted model with tokens at mixed levels.
absl::StatusOr<Matrix> QuantizedHidden(const FloatModel& model,
                                       const std::vector<FittedBlock>& blocks,
                                       absl::Span<const int32_t> ids, int64_t seq_len,
                                       const RoutingSampleOptions& options);

class LmHeadFit {
 public:
  // `blocks` give damping, level weights and the fit of a linear; `inputs` [tokens, hidden_size]
  // are what the head sees, normalised. The model must outlive the fit.
  LmHeadFit(const FloatModel& model, const LmHeadOptions& options,
            const BlockCalibrationOptions& blocks, const Matrix& inputs);

  int num_pieces() const;
  int64_t PieceRows(int piece) const;
  // FAILED_PRECONDITION as FitLinear's.
  absl::StatusOr<NestedWeight> Fit(int piece) const;
  // Measures a piece and keeps it; every piece once, in any order.
  void Take(int piece, const NestedWeight& weight);

  // After every piece was taken: the whole head, and the mean KL at each level in nats, which is
  // the unit of exp(score) of routers: loss of the text per token that reads it.
  const NestedWeight& weight() const { return weight_; }
  std::array<double, kNumLevels> Losses() const;

 private:
  Matrix FloatRows(int piece) const;

  const Matrix& head_;
  BlockCalibrationOptions options_;
  StreamStatistics statistics_;
  Matrix samples_;  // of the inputs: what the losses are measured on
  NestedWeight weight_;
  std::vector<LogitDivergence> divergence_;  // per level
};

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_LM_HEAD_FIT_H_
