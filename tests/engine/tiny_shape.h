// The smallest shape that quantizes, for tests of made-up weights.
#ifndef MOBI_TESTS_ENGINE_TINY_SHAPE_H_
#define MOBI_TESTS_ENGINE_TINY_SHAPE_H_

#include "engine/synthetic_weights.h"

namespace mobi {

inline ModelConfig TinyShape(int num_layers) {
  ModelConfig config = ConfigOfShape("llama-3.2-1b").value();
  config.vocab_size = 512;
  config.hidden_size = 128;
  config.intermediate_size = 256;
  config.num_hidden_layers = num_layers;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 32;
  return config;
}

}  // namespace mobi

#endif  // MOBI_TESTS_ENGINE_TINY_SHAPE_H_
