// lm_head in slices: its weight, and the level at which it is read for a row of logits. The
// decoder's linears have routers; lm_head has one loss a level, measured at calibration and the
// same for every token, so the level is known on the host before the step runs, and it follows the
// price. Between the step runner, which knows the prices, and Model::Logits. Pure functions.
#ifndef MOBI_ENGINE_LM_HEAD_H_
#define MOBI_ENGINE_LM_HEAD_H_

#include <array>
#include <cstdint>

#include "absl/types/span.h"
#include "engine/precision.h"
#include "engine/weight_source.h"
#include "kernels/sliced_weight.h"

namespace mobi {

struct SlicedLmHead {
  SlicedWeight weight;  // vocab_size padded to kTileRows, one segment
  LmHeadLevels levels;
  std::array<float, kNumLevels> bytes{};  // that one read at level 1..4 moves
};

// levels[i] of the row of logits that a token of precision rows[i] asks for, by the rule of
// Backend::Route: the first num_coherent rows choose together. A token that is pinned below
// min_level reads min_level.
void ChooseLmHeadLevels(const SlicedLmHead& head, absl::Span<const TokenPrecision> rows,
                        int num_coherent, uint8_t* levels);

}  // namespace mobi

#endif  // MOBI_ENGINE_LM_HEAD_H_
