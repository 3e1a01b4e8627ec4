// Sums over calibration tokens that a linear is fitted from: second moments of its inputs, their
// cross moments with the float model's inputs, and the error that the residual stream already
// carries. From them come the Hessian of each stream and the weights that serve its inputs best:
// what fits the float model's output, not merely the float weights. Not thread-safe.
#ifndef MOBI_CALIBRATOR_STATISTICS_H_
#define MOBI_CALIBRATOR_STATISTICS_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "calibrator/fitting_problem.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/matrix.h"

namespace mobi {

class StreamStatistics {
 public:
  // `residual_rows`: out-features of a linear that adds to the residual stream, else 0.
  StreamStatistics(int64_t cols, int64_t residual_rows);

  // Inputs [tokens, cols] of the float model itself: the float weights serve them best.
  void Add(ConstMatrixView input);
  // Inputs of the same tokens in this stream and in the float model.
  void Add(ConstMatrixView input, ConstMatrixView float_input);
  // For a linear that adds to the residual stream: what it should give these inputs, the float
  // stream behind it minus this one before it, [tokens, residual_rows].
  void AddWanted(ConstMatrixView input, ConstMatrixView output);
  // The same over more tokens.
  void Add(const StreamStatistics& more);

  // `damping` is relative to each diagonal element, so that one massive channel does not drown the
  // others; it also holds the target near the float weights. Channels that never fire get the mean
  // of the others. FAILED_PRECONDITION when the moments are not finite.
  absl::StatusOr<StreamProblem> Problem(const Matrix& weight, double damping,
                                        int num_threads = 1) const;

  int64_t num_tokens() const { return num_tokens_; }

 private:
  int64_t num_tokens_ = 0;
  DeviceMatrix gram_;    // [cols, cols], lower triangle of the sum of x x^T
  DeviceMatrix cross_;   // [cols, cols], sum of x_float x^T; empty until asked for
  DeviceMatrix wanted_;  // [residual_rows, cols], sum of output x^T
};

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_STATISTICS_H_
