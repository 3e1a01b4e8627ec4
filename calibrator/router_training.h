// Trains the router of one linear group by regression: from a token's input to the loss that every
// segment and level leaves (kernels/sliced_weight.h has the formula). Adam on the squared error of
// the log, then a shift per output so that predicted losses add up to the measured ones.
// Deterministic for a seed; routers are independent of each other.
#ifndef MOBI_CALIBRATOR_ROUTER_TRAINING_H_
#define MOBI_CALIBRATOR_ROUTER_TRAINING_H_

#include "calibrator/matrix.h"
#include "calibrator/router_network.h"
#include "calibrator/routing_samples.h"

namespace mobi {

RouterWeights TrainRouter(const RoutingSamples& samples, const RouterTrainingOptions& options);

// scores [tokens, segments * kNumLevels] of x, as Backend::Route computes them.
Matrix RouterScores(const RouterWeights& router, ConstMatrixView x);

// Hidden units that keep a layer's routers within `share` of what its linears read on average at
// `bits`; at least one.
int RouterHiddenUnits(const ModelConfig& config, double bits, double share, int limit);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_ROUTER_TRAINING_H_
