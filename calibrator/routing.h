// The routing rule on the host, as Backend::Route applies it: every token, or every batch of tokens
// together, reads the level that minimises predicted loss plus price times bytes. Pure functions.
#ifndef MOBI_CALIBRATOR_ROUTING_H_
#define MOBI_CALIBRATOR_ROUTING_H_

#include <array>
#include <cstdint>
#include <vector>

#include "calibrator/matrix.h"
#include "engine/checkpoint.h"
#include "kernels/sliced_weight.h"

namespace mobi {

// What a segment costs to read and how much of the model it is.
struct SegmentCost {
  std::array<float, kNumLevels> bytes{};
  int64_t weights = 0;
};

std::vector<SegmentCost> CostsOf(const RoutedGroup& group);

// Tokens that choose for themselves, or one token of each of several sequences of `seq_len` that
// choose together, position by position.
struct RoutingMode {
  bool coherent = false;
  int64_t seq_len = 0;
};

// losses [tokens, segments * kNumLevels] is exp(score). Fills levels[segment * tokens + token] and
// returns the sum over tokens and segments of bits read times weights.
double ChooseLevels(const Matrix& losses, const std::vector<SegmentCost>& costs, double price,
                    const RoutingMode& mode, uint8_t* levels);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_ROUTING_H_
