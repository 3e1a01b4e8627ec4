#include "kernels/cpu/route.h"

#include <algorithm>
#include <cmath>

#include "kernels/choose_levels.h"
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
    ChooseLevels(losses + s * kNumLevels, kMaxScores, bytes, batch, chosen);
    int highest = 0;
    for (int64_t i = 0; i < tokens; ++i) {
      batch.level_tiles[i] += static_cast<uint32_t>(chosen[i] * tiles);
      highest = std::max<int>(highest, chosen[i]);
    }
    if (highest > 0) *batch.loaded_bytes += static_cast<uint64_t>(bytes[highest - 1]);
  }
}

}  // namespace mobi::cpu
