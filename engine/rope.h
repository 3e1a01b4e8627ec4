// Rotary position embedding tables, with Llama 3.1's scaling of low frequencies. Computed once at
// load. Source: RoFormer (arXiv 2104.09864); transformers' modeling_rope_utils (type "llama3").
#ifndef MOBI_ENGINE_ROPE_H_
#define MOBI_ENGINE_ROPE_H_

#include <vector>

#include "engine/model_config.h"

namespace mobi {

// The head_dim / 2 inverse frequencies, scaled as the configuration says.
std::vector<float> RopeInverseFrequencies(const ModelConfig& config);

struct RopeValues {
  std::vector<float> cos;  // [max_positions, head_dim / 2]
  std::vector<float> sin;
};
RopeValues ComputeRope(const ModelConfig& config, int max_positions);

}  // namespace mobi

#endif  // MOBI_ENGINE_ROPE_H_
