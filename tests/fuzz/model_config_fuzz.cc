#include <cstdlib>

#include "engine/model_config.h"
#include "tests/fuzz/fuzz_target.h"

namespace {

void Require(bool condition) {
  if (!condition) abort();
}

// What everyone who allocates by the config relies on.
void CheckBounds(const mobi::ModelConfig& config) {
  Require(config.vocab_size > 0 && config.hidden_size > 0 && config.intermediate_size > 0);
  Require(config.num_hidden_layers > 0 && config.num_attention_heads > 0);
  Require(config.num_key_value_heads > 0 && config.max_position_embeddings > 0);
  Require(config.num_attention_heads % config.num_key_value_heads == 0);
  Require(config.head_dim > 0 && config.head_dim % 2 == 0);
  Require(int64_t{config.num_attention_heads} * config.head_dim == config.attention_size());
  Require(config.rms_norm_eps > 0 && config.rms_norm_eps <= 1);
  Require(config.rope_theta >= 1 && config.rope_theta < 1e16);
  if (config.rope_scaling) {
    Require(config.rope_scaling->factor >= 1 && config.rope_scaling->low_freq_factor > 0);
    Require(config.rope_scaling->high_freq_factor > config.rope_scaling->low_freq_factor);
    Require(config.rope_scaling->original_max_position_embeddings > 0);
  }
  for (const int32_t id : config.eos_token_ids) Require(id >= 0 && id < config.vocab_size);
  Require(config.bos_token_id >= -1 && config.bos_token_id < config.vocab_size);
}

}  // namespace

namespace mobi {

bool FuzzOne(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto config = ParseModelConfig(text, "fuzz");
  if (config.ok()) {
    CheckBounds(*config);
  } else {
    Require(config.status().message().find('\n') == absl::string_view::npos);
  }
  ModelConfig merged;
  merged.vocab_size = 100;
  const bool generation = MergeGenerationConfig(text, "fuzz", merged).ok();
  for (const int32_t id : merged.eos_token_ids) Require(id >= 0 && id < merged.vocab_size);
  return config.ok() || generation;
}

std::vector<std::string> FuzzSeeds() {
  return {
      R"({"model_type": "llama", "vocab_size": 100, "hidden_size": 96, "intermediate_size": 10,
          "num_hidden_layers": 1, "num_attention_heads": 3})",
      R"({"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
          "eos_token_id": [128001, 128008], "head_dim": 64, "hidden_act": "silu",
          "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
          "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
          "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
          "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                           "original_max_position_embeddings": 8192, "rope_type": "llama3"},
          "rope_theta": 500000.0, "tie_word_embeddings": true, "vocab_size": 128256})",
      R"({"model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 8,
          "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 2,
          "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
          "quantization_config": {"quant_method": "mobiquant", "version": 1}})",
      R"({"eos_token_id": [1, 2]})"};
}

}  // namespace mobi
