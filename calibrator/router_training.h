// Trains the router of one linear group by regression: from a token's input to the loss that every
// segment and level leaves (kernels/sliced_weight.h has the formula). Adam on the squared error of
// the log, then a shift per output so that predicted losses add up to the measured ones.
// Deterministic for a seed; routers are independent of each other.
#ifndef MOBI_CALIBRATOR_ROUTER_TRAINING_H_
#define MOBI_CALIBRATOR_ROUTER_TRAINING_H_

#include <cstdint>
#include <vector>

#include "calibrator/matrix.h"
#include "calibrator/routing_samples.h"

namespace mobi {

// A router on the host. w1 holds values that fp16 holds exactly.
struct RouterWeights {
  Matrix w1;  // [num_hidden, cols]
  std::vector<float> b1;
  std::vector<float> u;
  Matrix w2;  // [segments * kNumLevels, num_hidden]
  std::vector<float> b2;

  int num_hidden() const { return static_cast<int>(w1.rows()); }
};

struct RouterTrainingOptions {
  int num_hidden = 8;
  int epochs = 20;
  int batch = 256;
  float learning_rate = 1e-2f;
  uint64_t seed = 1;
};

RouterWeights TrainRouter(const RoutingSamples& samples, const RouterTrainingOptions& options);

// scores [tokens, segments * kNumLevels] of x, as Backend::Route computes them.
Matrix RouterScores(const RouterWeights& router, ConstMatrixView x);

// Hidden units that keep a layer's routers within `share` of what its linears read on average at
// `bits`; at least one.
int RouterHiddenUnits(const ModelConfig& config, double bits, double share, int limit);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_ROUTER_TRAINING_H_
