#include "calibrator/routing.h"

namespace mobi {
namespace {

int Cheapest(const double* loss, const SegmentCost& cost, double price) {
  int best = 1;
  double best_total = loss[0] + price * cost.bytes[0];
  for (int level = 2; level <= kNumLevels; ++level) {
    const double total = loss[level - 1] + price * cost.bytes[level - 1];
    if (total < best_total) best = level, best_total = total;
  }
  return best;
}

}  // namespace

std::vector<SegmentCost> CostsOf(const RoutedGroup& group) {
  std::vector<SegmentCost> costs;
  for (const LinearShape& linear : group.linears) {
    SegmentCost& cost = costs.emplace_back();
    cost.weights = linear.rows * linear.cols;
    for (int level = 1; level <= kNumLevels; ++level) {
      cost.bytes[level - 1] = static_cast<float>(BytesAtLevel(linear.rows, linear.cols, level));
    }
  }
  return costs;
}

double ChooseLevels(const Matrix& losses, const std::vector<SegmentCost>& costs, double price,
                    const RoutingMode& mode, uint8_t* levels) {
  const int64_t tokens = losses.rows();
  const int64_t stride = mode.coherent ? mode.seq_len : tokens;  // tokens that choose apart
  double bits = 0;
  for (size_t s = 0; s < costs.size(); ++s) {
    uint8_t* of_segment = levels + static_cast<int64_t>(s) * tokens;
    for (int64_t first = 0; first < stride; ++first) {
      double loss[kNumLevels] = {};
      for (int64_t t = first; t < tokens; t += stride) {
        for (int k = 0; k < kNumLevels; ++k) {
          loss[k] += losses(t, static_cast<int64_t>(s) * kNumLevels + k);
        }
      }
      const int level = Cheapest(loss, costs[s], price);
      for (int64_t t = first; t < tokens; t += stride) {
        of_segment[t] = static_cast<uint8_t>(level);
        bits += static_cast<double>(BitsOfLevel(level)) * static_cast<double>(costs[s].weights);
      }
    }
  }
  return bits;
}

}  // namespace mobi
