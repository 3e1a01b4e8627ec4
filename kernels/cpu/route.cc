#include "kernels/cpu/route.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/dense_matmul.h"
#include "kernels/cpu/elementwise.h"

namespace mobi::cpu {
namespace {

constexpr int kMaxScores = kMaxSegments * kNumLevels;

// The router's second layer and what its scores mean: losses[segment * kNumLevels + level - 1].
// Plain loops: the layer is some hundred products.
void PredictLosses(const Router& router, int num_scores, const float* x, int64_t cols,
                   const float* first_layer, float* hidden, float* losses) {
  const float log_rms = 0.5f * std::log(MeanSquare(x, cols));
  const float* b1 = router.b1.Row<float>(0);
  const float* u = router.u.Row<float>(0);
  for (int h = 0; h < router.num_hidden; ++h) {
    const float sum = first_layer[h] + b1[h] + u[h] * log_rms;
    hidden[h] = sum / (1.0f + std::exp(-sum));
  }
  for (int s = 0; s < num_scores; ++s) {
    const float* w2 = router.w2.Row<float>(s);
    float score = router.b2.Row<float>(0)[s];
    for (int h = 0; h < router.num_hidden; ++h) score += w2[h] * hidden[h];
    losses[s] = std::exp(score);
  }
}

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

// The level that the coherent tokens of a segment share. losses are kMaxScores apart.
int SharedLevel(const float* losses, const float* bytes, const RoutingBatch& batch) {
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
    const float* loss = losses + i * kMaxScores;
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

void ChooseLevels(const float* losses, const float* bytes, const RoutingBatch& batch,
                  uint8_t* levels) {
  const int shared = batch.num_coherent > 0 ? SharedLevel(losses, bytes, batch) : 0;
  for (int i = 0; i < batch.num_tokens; ++i) {
    const int lowest = batch.min_level[i], highest = batch.max_level[i];
    const float* loss = losses + i * kMaxScores;
    int level = highest;
    if (AllFinite(loss)) {
      level = i < batch.num_coherent ? std::clamp(shared, lowest, highest)
                                     : OwnLevel(loss, bytes, batch.price[i], lowest, highest);
    }
    levels[i] = static_cast<uint8_t>(level);
  }
}

}  // namespace

void Route(ThreadPool& pool, Workspace& workspace, Tensor x, const RoutedWeight& linear,
           const RoutingBatch& batch, uint8_t* levels, int64_t levels_stride) {
  const Router& router = linear.router;
  const SlicedWeight& weight = linear.weight;
  const int64_t tokens = batch.num_tokens, num_hidden = router.num_hidden;
  float* first_layer = workspace.results(tokens * (num_hidden + kMaxScores));
  float* losses = first_layer + tokens * num_hidden;
  const Tensor hidden = Tensor::Of(first_layer, DType::kF32, tokens, num_hidden);
  DenseMatmul(pool, workspace, x.FirstRows(tokens), router.w1, hidden);
  pool.RunRanges(tokens, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = hidden.Row<float>(i);
      PredictLosses(router, weight.num_segments * kNumLevels, x.Row<float>(i), x.cols, row, row,
                    losses + i * kMaxScores);
    }
  });
  for (int s = 0; s < weight.num_segments; ++s) {
    const int64_t rows = weight.segment_end[s] - (s > 0 ? weight.segment_end[s - 1] : 0);
    const int64_t tiles = rows / kTileRows * (weight.cols / kGroupSize);
    const float* bytes = router.bytes[s].data();
    uint8_t* chosen = levels + s * levels_stride;
    ChooseLevels(losses + s * kNumLevels, bytes, batch, chosen);
    int highest = 0;
    for (int64_t i = 0; i < tokens; ++i) {
      batch.level_tiles[i] += static_cast<uint32_t>(chosen[i] * tiles);
      highest = std::max<int>(highest, chosen[i]);
    }
    if (highest > 0) *batch.loaded_bytes += static_cast<uint64_t>(bytes[highest - 1]);
  }
}

}  // namespace mobi::cpu
