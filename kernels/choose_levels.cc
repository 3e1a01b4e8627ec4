#include "kernels/choose_levels.h"

#include <algorithm>
#include <cmath>

namespace mobi {
namespace {

// The first of the levels in [lowest, highest] whose cost[level - 1] is least.
int Cheapest(const double* cost, int lowest, int highest) {
  int best = lowest;
  for (int level = lowest + 1; level <= highest; ++level) {
    if (cost[level - 1] < cost[best - 1]) best = level;
  }
  return best;
}

bool AllFinite(const float* losses) {
  return std::all_of(losses, losses + kNumLevels, [](float loss) { return std::isfinite(loss); });
}

// The level that the coherent tokens share.
int SharedLevel(const float* losses, int64_t losses_stride, const float* bytes,
                const RoutingBatch& batch) {
  int pinned = 0;  // the highest level that is read whatever is chosen here
  for (int i = 0; i < batch.num_tokens; ++i) {
    if (batch.min_level[i] == batch.max_level[i])
      pinned = std::max<int>(pinned, batch.max_level[i]);
  }
  double cost[kNumLevels];
  for (int k = 0; k < kNumLevels; ++k) {
    cost[k] = k < pinned ? 0.0 : bytes[k] - (pinned > 0 ? double{bytes[pinned - 1]} : 0.0);
  }
  for (int i = 0; i < batch.num_coherent; ++i) {
    const float* loss = losses + i * losses_stride;
    if (batch.min_level[i] == batch.max_level[i] || !AllFinite(loss)) continue;
    for (int k = 0; k < kNumLevels; ++k) cost[k] += double{loss[k]} / batch.price[i];
  }
  return Cheapest(cost, 1, kNumLevels);
}

int OwnLevel(const float* loss, const float* bytes, float price, int lowest, int highest) {
  double cost[kNumLevels];
  for (int k = 0; k < kNumLevels; ++k) cost[k] = loss[k] + double{price} * bytes[k];
  return Cheapest(cost, lowest, highest);
}

}  // namespace

void ChooseLevels(const float* losses, int64_t losses_stride, const float* bytes,
                  const RoutingBatch& batch, uint8_t* levels) {
  const int shared = batch.num_coherent > 0 ? SharedLevel(losses, losses_stride, bytes, batch) : 0;
  for (int i = 0; i < batch.num_tokens; ++i) {
    const int lowest = batch.min_level[i], highest = batch.max_level[i];
    const float* loss = losses + i * losses_stride;
    int level = highest;
    if (AllFinite(loss)) {
      level = i < batch.num_coherent ? std::clamp(shared, lowest, highest)
                                     : OwnLevel(loss, bytes, batch.price[i], lowest, highest);
    }
    levels[i] = static_cast<uint8_t>(level);
  }
}

}  // namespace mobi
