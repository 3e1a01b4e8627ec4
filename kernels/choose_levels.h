// The routing rule on the host: which level every token of a batch reads, given what each level is
// predicted to lose. Behind Route of the CPU backend, and behind the engine's choice for lm_head.
// Pure, safe from any thread. Source: the rule of Backend::Route.
#ifndef MOBI_KERNELS_CHOOSE_LEVELS_H_
#define MOBI_KERNELS_CHOOSE_LEVELS_H_

#include <cstdint>

#include "kernels/backend.h"

namespace mobi {

// losses[i * losses_stride + level - 1] of token i, bytes[level - 1]; fills levels [num_tokens]. Of
// the batch, arrays on the host: tokens, price, min_level and max_level. A token whose losses are
// not finite reads the highest level that it may.
void ChooseLevels(const float* losses, int64_t losses_stride, const float* bytes,
                  const RoutingBatch& batch, uint8_t* levels);

}  // namespace mobi

#endif  // MOBI_KERNELS_CHOOSE_LEVELS_H_
