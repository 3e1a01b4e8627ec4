#include "calibrator/base_fit.h"

#include <algorithm>
#include <limits>

#include "calibrator/level_fit.h"
#include "calibrator/simd.h"

namespace mobi {
namespace {

struct Group {
  const float* target;
  const float* importance;
};

// Weighted sum over levels of the error that each level's best pair leaves.
MOBI_VECTORIZED float CandidateError(const float* target, const float* importance, float lo,
                                     float range, const float* level_weights) {
  const float scale = 256.0f / range;
  int codes[kGroupSize];
  float s = 0, sw = 0, sww = 0;
  for (int j = 0; j < kGroupSize; ++j) {
    codes[j] = static_cast<int>(std::clamp((target[j] - lo) * scale, 0.0f, 255.0f));
    s += importance[j];
    sw += importance[j] * target[j];
    sww += importance[j] * target[j] * target[j];
  }
  if (s <= 0) return 0;
  const float mean_w = sw / s, ww = sww - sw * mean_w;
  float error = 0;
  for (int level = 1; level <= kNumLevels; ++level) {
    const int shift = kSliceBits * (kNumLevels - level);
    const float middle = 0.5f * static_cast<float>((1 << BitsOfLevel(level)) - 1);
    float sf = 0, sff = 0, sfw = 0;
    for (int j = 0; j < kGroupSize; ++j) {
      const float f = static_cast<float>(codes[j] >> shift) - middle;
      const float df = importance[j] * f;
      sf += df;
      sff += df * f;
      sfw += df * target[j];
    }
    const float ff = sff - sf * sf / s, fw = sfw - sf * mean_w;
    const float gain = ff > 0 && fw > 0 ? fw * fw / ff : 0;
    error += level_weights[level - 1] * std::max(ww - gain, 0.0f);
  }
  return error;
}

struct Range {
  float lo;
  float hi;
};

// A coarse sweep shrinks both ends together, then each end moves alone.
Range SearchRange(const float* target, const float* importance, const BaseFitOptions& options) {
  const auto [min, max] = std::minmax_element(target, target + kGroupSize);
  // Half a step of the finest level beyond the ends, so that the extremes are in the first and the
  // last cell; a constant group gets a range of its own size.
  float spread = (*max - *min) / 255.0f;
  if (!(spread > 0)) spread = std::max(std::abs(*max), 1e-6f) / 255.0f;
  const Range full{*min - 0.5f * spread, *max + 0.5f * spread};
  const float centre = 0.5f * (full.lo + full.hi);
  const auto shrunk = [&](float lower, float upper) {
    return Range{centre + (full.lo - centre) * lower, centre + (full.hi - centre) * upper};
  };
  float best = std::numeric_limits<float>::infinity();
  float lower = 1, upper = 1;
  const auto consider = [&](float l, float u) {
    const Range range = shrunk(l, u);
    const float error = CandidateError(target, importance, range.lo, range.hi - range.lo,
                                       options.level_weights.data());
    if (error < best) best = error, lower = l, upper = u;
  };
  const float step = (1 - options.min_shrink) / static_cast<float>(options.steps);
  for (int i = options.steps; i >= 0; --i) {
    const float shrink = options.min_shrink + step * static_cast<float>(i);
    consider(shrink, shrink);
  }
  for (float delta = 2 * step; delta > step / 3; delta /= 2) {
    const float l = lower, u = upper;
    for (const float a : {-delta, 0.0f, delta}) {
      for (const float b : {-delta, 0.0f, delta}) {
        const float low = l + a, high = u + b;
        if (low > 0.05f && high > 0.05f && low <= 1 && high <= 1) consider(low, high);
      }
    }
  }
  return shrunk(lower, upper);
}

}  // namespace

void FitBase(const FittingProblem& problem, const BaseFitOptions& options, int64_t begin,
             int64_t count, NestedWeight& weight) {
  for (int64_t row = begin; row < begin + count; ++row) {
    for (int64_t g = 0; g < weight.groups(); ++g) {
      const int64_t j = g * kGroupSize;
      const float* target = problem.weight.Row(row) + j;
      const Range range = SearchRange(target, problem.importance.data() + j, options);
      EncodeGroup(target, {range.hi - range.lo, range.lo}, weight.Codes(row) + j);
    }
    FitRowDiagonal(problem.weight.Row(row), problem.importance.data(), row, weight);
  }
}

}  // namespace mobi
