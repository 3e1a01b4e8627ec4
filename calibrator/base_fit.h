// The first fit of a linear: for every row and group a range [lo, lo + range) for the 8-bit code,
// searched so that the levels' activation-weighted errors, each after its own least-squares pair,
// are small together. Truncation gives all four levels. Source: MoBiSlice of arXiv 2602.20191, with
// the range searched instead of learned. Rows are independent.
#ifndef MOBI_CALIBRATOR_BASE_FIT_H_
#define MOBI_CALIBRATOR_BASE_FIT_H_

#include <array>

#include "calibrator/fitting_problem.h"
#include "calibrator/nested_weight.h"

namespace mobi {

// How a block's ranges are found: by the search here, or learned as the paper learns them, which
// leaves nothing for the later steps of a fit to do (learned_clipping.h).
enum class BaseMethod { kSearch, kClipping };

struct BaseFitOptions {
  BaseMethod method = BaseMethod::kSearch;
  // How much a level's squared error counts beside level 1's. Errors fall sixteenfold from level to
  // level, so equal weights choose the range for level 1 alone and 1, 16, 256, 4096 for all alike.
  std::array<float, kNumLevels> level_weights = {1, 4, 16, 64};
  float min_shrink = 0.3f;  // narrowest range tried, of the group's own
  int steps = 15;           // ranges tried from there to the whole
};

// Fits rows [begin, begin + count) of problem.weight: codes, and pairs by FitScale.
void FitBase(const FittingProblem& problem, const BaseFitOptions& options, int64_t begin,
             int64_t count, NestedWeight& weight);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_BASE_FIT_H_
