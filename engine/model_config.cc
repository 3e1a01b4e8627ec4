#include "engine/model_config.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_format.h"
#include "engine/base/json.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

// Ten times beyond any published Llama, and small enough that products of two fit 64 bits with
// room.
constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxWidth = 1 << 20;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kMaxPositions = 1 << 24;
constexpr size_t kMaxEosIds = 64;

absl::Status Unsupported(const JsonObject& object, std::string_view key, std::string_view what) {
  return absl::UnimplementedError(
      std::string(object.Error(key, std::string(what) + " is not supported").message()));
}

absl::Status CheckArchitecture(const JsonObject& config) {
  constexpr std::string_view kArchitecture = "LlamaForCausalLM";
  if (const nlohmann::json* names = config.Find("architectures")) {
    for (const auto& name : *names) {
      if (name != kArchitecture) return Unsupported(config, "architectures", JsonExcerpt(name));
    }
  }
  MOBI_ASSIGN_OR_RETURN(const std::string model_type, config.String("model_type"));
  if (model_type != "llama") {
    return Unsupported(config, "model_type", JsonExcerpt(model_type));
  }
  MOBI_ASSIGN_OR_RETURN(const std::string activation, config.StringOr("hidden_act", "silu"));
  if (activation != "silu") return Unsupported(config, "hidden_act", JsonExcerpt(activation));
  for (const std::string_view key : {"attention_bias", "mlp_bias"}) {
    MOBI_ASSIGN_OR_RETURN(const bool biased, config.BoolOr(key, false));
    if (biased) return Unsupported(config, key, "true");
  }
  if (config.Has("quantization_config")) {
    MOBI_ASSIGN_OR_RETURN(const JsonObject quantization, config.Object("quantization_config"));
    MOBI_ASSIGN_OR_RETURN(const std::string method, quantization.String("quant_method"));
    if (method != "mobiquant") {
      return Unsupported(quantization, "quant_method", JsonExcerpt(method));
    }
  }
  return absl::OkStatus();
}

absl::Status ReadSizes(const JsonObject& object, ModelConfig& config) {
  const auto read = [&object](std::string_view key, int64_t max, int& field) -> absl::Status {
    MOBI_ASSIGN_OR_RETURN(const int64_t value, object.Int(key, 1, max));
    field = static_cast<int>(value);
    return absl::OkStatus();
  };
  MOBI_RETURN_IF_ERROR(read("vocab_size", kMaxVocab, config.vocab_size));
  MOBI_RETURN_IF_ERROR(read("hidden_size", kMaxWidth, config.hidden_size));
  MOBI_RETURN_IF_ERROR(read("intermediate_size", kMaxWidth, config.intermediate_size));
  MOBI_RETURN_IF_ERROR(read("num_hidden_layers", kMaxLayers, config.num_hidden_layers));
  MOBI_RETURN_IF_ERROR(read("num_attention_heads", kMaxHeads, config.num_attention_heads));
  const int heads = config.num_attention_heads;
  MOBI_ASSIGN_OR_RETURN(const int64_t kv_heads,
                        object.IntOr("num_key_value_heads", 1, heads, heads));
  if (heads % kv_heads != 0) {
    return object.Error(
        "num_key_value_heads",
        absl::StrFormat("%d does not divide num_attention_heads %d", kv_heads, heads));
  }
  if (!object.Has("head_dim") && config.hidden_size % heads != 0) {
    return object.Error("hidden_size", absl::StrFormat("%d is not a multiple of "
                                                       "num_attention_heads %d",
                                                       config.hidden_size, heads));
  }
  MOBI_ASSIGN_OR_RETURN(const int64_t head_dim,
                        object.IntOr("head_dim", 2, kMaxHeadDim, config.hidden_size / heads));
  if (head_dim < 2 || head_dim > kMaxHeadDim || head_dim % 2 != 0) {
    return object.Error(
        "head_dim", absl::StrFormat("%d is not an even number in 2..%d", head_dim, kMaxHeadDim));
  }
  config.num_key_value_heads = static_cast<int>(kv_heads);
  config.head_dim = static_cast<int>(head_dim);
  return absl::OkStatus();
}

absl::Status ReadRopeScaling(const JsonObject& rope, ModelConfig& config) {
  MOBI_ASSIGN_OR_RETURN(const std::string old_name, rope.StringOr("type", "default"));
  MOBI_ASSIGN_OR_RETURN(const std::string type, rope.StringOr("rope_type", old_name));
  if (type == "default") return absl::OkStatus();
  if (type != "llama3") {
    return Unsupported(rope, rope.Has("rope_type") ? "rope_type" : "type", JsonExcerpt(type));
  }
  constexpr double kMaxFactor = 1e6;
  MOBI_ASSIGN_OR_RETURN(const double factor, rope.Number("factor", 1, kMaxFactor));
  MOBI_ASSIGN_OR_RETURN(const double low, rope.Number("low_freq_factor", 1e-6, kMaxFactor));
  MOBI_ASSIGN_OR_RETURN(const double high, rope.Number("high_freq_factor", 1e-6, kMaxFactor));
  MOBI_ASSIGN_OR_RETURN(const int64_t original,
                        rope.Int("original_max_position_embeddings", 1, kMaxPositions));
  config.rope_scaling = RopeScaling{static_cast<float>(factor), static_cast<float>(low),
                                    static_cast<float>(high), static_cast<int>(original)};
  if (!(config.rope_scaling->high_freq_factor > config.rope_scaling->low_freq_factor)) {
    return rope.Error("high_freq_factor",
                      absl::StrFormat("%g is not above low_freq_factor %g", high, low));
  }
  return absl::OkStatus();
}

// transformers 4 spells rope_theta and rope_scaling, transformers 5 puts both in rope_parameters.
absl::Status ReadRope(const JsonObject& object, ModelConfig& config) {
  constexpr double kMaxTheta = 1e15;
  MOBI_ASSIGN_OR_RETURN(config.rope_theta, object.NumberOr("rope_theta", 1, kMaxTheta, 10000));
  MOBI_ASSIGN_OR_RETURN(const double rotary, object.NumberOr("partial_rotary_factor", 0, 1, 1));
  if (rotary != 1) return Unsupported(object, "partial_rotary_factor", "a part below 1");
  if (object.Has("rope_scaling")) {
    MOBI_ASSIGN_OR_RETURN(const JsonObject scaling, object.Object("rope_scaling"));
    if (!scaling.Has("rope_type") && !scaling.Has("type")) {
      return scaling.Error("rope_type", "missing");
    }
    MOBI_RETURN_IF_ERROR(ReadRopeScaling(scaling, config));
  }
  if (object.Has("rope_parameters")) {
    MOBI_ASSIGN_OR_RETURN(const JsonObject parameters, object.Object("rope_parameters"));
    for (const auto& [key, value] : parameters.value().items()) {
      if (value.is_object()) return Unsupported(parameters, key, "rope by layer type");
    }
    MOBI_ASSIGN_OR_RETURN(config.rope_theta,
                          parameters.NumberOr("rope_theta", 1, kMaxTheta, config.rope_theta));
    MOBI_RETURN_IF_ERROR(ReadRopeScaling(parameters, config));
  }
  return absl::OkStatus();
}

// A token id or a list of them, added to config.eos_token_ids.
absl::Status ReadEosIds(const JsonObject& object, ModelConfig& config) {
  const nlohmann::json* field = object.Find("eos_token_id");
  if (field == nullptr) return absl::OkStatus();
  const nlohmann::json list = field->is_array() ? *field : nlohmann::json::array({*field});
  if (list.size() > kMaxEosIds) {
    return object.Error("eos_token_id",
                        absl::StrFormat("%u ids, the limit is %u", list.size(), kMaxEosIds));
  }
  for (const auto& id : list) {
    const bool valid =
        id.is_number_unsigned() && id.get<uint64_t>() < static_cast<uint64_t>(config.vocab_size);
    if (!valid) {
      return object.Error("eos_token_id",
                          absl::StrFormat("%s is not a token id below vocab_size %d",
                                          JsonExcerpt(id), config.vocab_size));
    }
    const auto token = id.get<int32_t>();
    if (std::find(config.eos_token_ids.begin(), config.eos_token_ids.end(), token) ==
        config.eos_token_ids.end()) {
      config.eos_token_ids.push_back(token);
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json, std::string_view file) {
  MOBI_ASSIGN_OR_RETURN(const nlohmann::json document, ParseJson(json, file));
  MOBI_ASSIGN_OR_RETURN(const JsonObject object, JsonObject::Of(document, file));
  MOBI_RETURN_IF_ERROR(CheckArchitecture(object));
  ModelConfig config;
  MOBI_RETURN_IF_ERROR(ReadSizes(object, config));
  MOBI_RETURN_IF_ERROR(ReadRope(object, config));
  // Defaults are LlamaConfig's.
  MOBI_ASSIGN_OR_RETURN(const int64_t positions,
                        object.IntOr("max_position_embeddings", 1, kMaxPositions, 2048));
  MOBI_ASSIGN_OR_RETURN(const double eps, object.NumberOr("rms_norm_eps", 1e-12, 1, 1e-6));
  MOBI_ASSIGN_OR_RETURN(config.tie_word_embeddings, object.BoolOr("tie_word_embeddings", false));
  MOBI_ASSIGN_OR_RETURN(const int64_t bos,
                        object.IntOr("bos_token_id", 0, config.vocab_size - 1, -1));
  config.max_position_embeddings = static_cast<int>(positions);
  config.rms_norm_eps = static_cast<float>(eps);
  config.bos_token_id = static_cast<int32_t>(bos);
  MOBI_RETURN_IF_ERROR(ReadEosIds(object, config));
  return config;
}

absl::Status MergeGenerationConfig(std::string_view json, std::string_view file,
                                   ModelConfig& config) {
  MOBI_ASSIGN_OR_RETURN(const nlohmann::json document, ParseJson(json, file));
  MOBI_ASSIGN_OR_RETURN(const JsonObject object, JsonObject::Of(document, file));
  return ReadEosIds(object, config);
}

}  // namespace mobi
