// Routers as the paper trains them, for comparison with router_training.h: one gate per further
// slice, a sigmoid that anneals to a step (straight-through: the loss is taken of the hard choice,
// the gradient of the soft one), trained layer by layer on the output error plus a budget on the
// bits. Thresholds stand for targets; they are the price table's quantiles over calibration tokens.
// Written as ordinary routers, so that the same kernels read them. Deterministic for a seed.
// Source: MoBiQuant (arXiv 2602.20191), section on MoBiRoute.
#ifndef MOBI_CALIBRATOR_GATE_TRAINING_H_
#define MOBI_CALIBRATOR_GATE_TRAINING_H_

#include <vector>

#include "calibrator/router_network.h"
#include "calibrator/routing.h"
#include "calibrator/routing_samples.h"

namespace mobi {

struct GateOptions {
  double bits = 3;           // budget that gates are trained to
  double budget_weight = 4;  // of the squared distance to it, beside the relative output error
  double first_temperature = 2, last_temperature = 0.1;
};

// The log price at which a slice is read exactly where its gate was trained to be open.
inline constexpr double kGateLogPrice = -30;

// A token reads slice e of every segment where the gates of slices 2 to e all exceed the threshold,
// the log of the price of a byte up to a common shift and scale.
RouterWeights TrainGates(const RoutingSamples& samples, const std::vector<SegmentCost>& costs,
                         const RouterTrainingOptions& options, const GateOptions& gates);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_GATE_TRAINING_H_
