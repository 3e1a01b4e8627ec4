// What a Llama-architecture model is: Hugging Face's config.json, checked. First step of loading a
// model folder; everything that allocates by a size in the config relies on the bounds kept here.
// Plain data, immutable once parsed. Covers Llama 2, 3, 3.1 and 3.2; what a config asks for beyond
// that is refused by name. Keys are spelled as in config.json (transformers' LlamaConfig).
#ifndef MOBI_ENGINE_MODEL_CONFIG_H_
#define MOBI_ENGINE_MODEL_CONFIG_H_

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace mobi {

// rope_scaling of type "llama3": low frequencies are divided by `factor`, high ones are left alone,
// those between are interpolated.
struct RopeScaling {
  float factor = 1;
  float low_freq_factor = 1;
  float high_freq_factor = 4;
  int original_max_position_embeddings = 8192;
};

struct ModelConfig {
  int vocab_size = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_hidden_layers = 0;
  int num_attention_heads = 0;
  int num_key_value_heads = 0;  // divides num_attention_heads
  int head_dim = 0;             // even; num_attention_heads * head_dim need not be hidden_size
  int max_position_embeddings = 0;
  float rms_norm_eps = 0;
  double rope_theta = 0;
  std::optional<RopeScaling> rope_scaling;
  bool tie_word_embeddings = false;
  std::vector<int32_t> eos_token_ids;  // below vocab_size, no duplicates; may be empty
  int32_t bos_token_id = -1;           // -1: none

  int attention_size() const { return num_attention_heads * head_dim; }
  int key_value_size() const { return num_key_value_heads * head_dim; }
};

// `file` is named in errors. INVALID_ARGUMENT: broken or out of range; UNIMPLEMENTED: a model that
// is not supported.
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json, std::string_view file);

// Adds the end-of-sequence ids of a generation_config.json (chat models end turns with more ids
// than config.json names).
absl::Status MergeGenerationConfig(std::string_view json, std::string_view file,
                                   ModelConfig& config);

}  // namespace mobi

#endif  // MOBI_ENGINE_MODEL_CONFIG_H_
