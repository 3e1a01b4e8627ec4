// The inner step of every search over codes: of the 256 codes of one weight, the one whose four
// levels lie nearest to four targets together. Branch and bound over the slices: the first slice
// fixes level 1's value and bounds the rest, and so on down. Pure, thread-safe.
#ifndef MOBI_CALIBRATOR_CODE_SEARCH_H_
#define MOBI_CALIBRATOR_CODE_SEARCH_H_

#include <array>

#include "calibrator/nested_weight.h"
#include "kernels/bit_slice.h"

namespace mobi {

using LevelGrids = std::array<LevelGrid, kNumLevels>;

inline LevelGrids GridsOf(const NestedWeight& weight, int64_t row, int64_t group) {
  LevelGrids grids;
  for (int level = 1; level <= kNumLevels; ++level) {
    grids[level - 1] = GridOf(weight.Scale(level, row, group), level);
  }
  return grids;
}

inline float ValueAt(const LevelGrids& grids, int code, int level) {
  const LevelGrid& grid = grids[level - 1];
  return grid.base + grid.step * static_cast<float>(CodeAtLevel(code, level));
}

// Minimises the sum over levels of weight[k] * (value_k(code) - target[k])^2. `start` is a code to
// begin from, better the nearer it is to the answer; of equals it wins.
inline int NearestCode(const LevelGrids& grids, const float* target, const float* weight,
                       int start) {
  const auto cost = [&](int prefix, int index) {
    const float d =
        grids[index].base + grids[index].step * static_cast<float>(prefix) - target[index];
    return weight[index] * d * d;
  };
  static_assert(kNumLevels == 4);
  int best_code = start;
  float best = cost(start >> 6, 0) + cost(start >> 4, 1) + cost(start >> 2, 2) + cost(start, 3);
  for (int a = 0; a < 4; ++a) {
    const float cost1 = cost(a, 0);
    if (cost1 >= best) continue;
    for (int b = 4 * a; b < 4 * a + 4; ++b) {
      const float cost2 = cost1 + cost(b, 1);
      if (cost2 >= best) continue;
      for (int c = 4 * b; c < 4 * b + 4; ++c) {
        const float cost3 = cost2 + cost(c, 2);
        if (cost3 >= best) continue;
        for (int code = 4 * c; code < 4 * c + 4; ++code) {
          const float cost4 = cost3 + cost(code, 3);
          if (cost4 < best) best = cost4, best_code = code;
        }
      }
    }
  }
  return best_code;
}

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_CODE_SEARCH_H_
