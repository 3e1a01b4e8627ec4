#include "tests/engine/test_models.h"

#include <stdlib.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <random>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/file_writer.h"
#include "engine/base/status_macros.h"
#include "engine/safetensors.h"
#include "kernels/numeric.h"

namespace mobi {
namespace {

using nlohmann::json;

struct NamedShape {
  std::string name;
  std::vector<int64_t> shape;
  float mean;
  float deviation;
};

// Every tensor of the model and the distribution it is drawn from.
std::vector<NamedShape> TensorsOf(const TestModelOptions& options) {
  const int64_t hidden = options.hidden_size;
  ModelConfig config;
  config.hidden_size = options.hidden_size;
  config.intermediate_size = options.intermediate_size;
  config.num_attention_heads = options.num_attention_heads;
  config.num_key_value_heads = options.num_key_value_heads;
  config.head_dim = options.head_dim;
  const std::vector<int64_t> embedding = {options.vocab_size, hidden};
  std::vector<NamedShape> tensors = {{"model.embed_tokens.weight", embedding, 0, 0.3f},
                                     {"model.norm.weight", {hidden}, 1, 0.1f}};
  if (!options.tie_word_embeddings) tensors.push_back({"lm_head.weight", embedding, 0, 0.3f});
  for (int layer = 0; layer < options.num_hidden_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    tensors.push_back({prefix + "input_layernorm.weight", {hidden}, 1, 0.1f});
    tensors.push_back({prefix + "post_attention_layernorm.weight", {hidden}, 1, 0.1f});
    for (const RoutedGroup& group : RoutedGroupsOfLayer(config, layer)) {
      for (const LinearShape& linear : group.linears) {
        tensors.push_back({linear.name + ".weight",
                           {linear.rows, linear.cols},
                           0,
                           1 / std::sqrt(static_cast<float>(linear.cols))});
      }
    }
  }
  return tensors;
}

std::vector<std::byte> RandomBytes(const NamedShape& tensor, DType dtype, std::mt19937_64& random) {
  int64_t count = 1;
  for (const int64_t dimension : tensor.shape) count *= dimension;
  std::vector<std::byte> bytes(static_cast<size_t>(count) * SizeOf(dtype));
  std::normal_distribution<float> normal(tensor.mean, tensor.deviation);
  for (int64_t i = 0; i < count; ++i) {
    const float value = normal(random);
    const uint16_t half = dtype == DType::kF16 ? FloatToHalf(value) : FloatToBFloat16(value);
    const void* source = dtype == DType::kF32 ? static_cast<const void*>(&value) : &half;
    std::memcpy(bytes.data() + static_cast<size_t>(i) * SizeOf(dtype), source, SizeOf(dtype));
  }
  return bytes;
}

absl::Status WriteWeights(const std::string& dir, const TestModelOptions& options) {
  const std::vector<NamedShape> tensors = TensorsOf(options);
  const auto shards = static_cast<size_t>(options.num_shards);
  std::mt19937_64 random(options.seed);
  json weight_map = json::object();
  for (size_t shard = 0; shard < shards; ++shard) {
    const std::string name =
        shards == 1 ? "model.safetensors"
                    : absl::StrFormat("model-%05d-of-%05d.safetensors", shard + 1, shards);
    MOBI_ASSIGN_OR_RETURN(SafetensorsWriter writer,
                          SafetensorsWriter::Create(dir + "/" + name, tensors.size() * 320));
    for (size_t i = shard * tensors.size() / shards; i < (shard + 1) * tensors.size() / shards;
         ++i) {
      MOBI_RETURN_IF_ERROR(writer.Add(tensors[i].name, options.dtype, tensors[i].shape,
                                      RandomBytes(tensors[i], options.dtype, random)));
      weight_map[tensors[i].name] = name;
    }
    MOBI_RETURN_IF_ERROR(writer.Finish());
  }
  if (shards == 1) return absl::OkStatus();
  return WriteFile(dir + "/model.safetensors.index.json",
                   json{{"metadata", json::object()}, {"weight_map", weight_map}}.dump(2));
}

// GPT-2's alphabet: every byte as a printable character, in the order of their ids.
std::vector<std::string> ByteAlphabet() {
  const auto utf8 = [](int code) {
    if (code < 0x80) return std::string(1, static_cast<char>(code));
    return std::string{static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
  };
  std::vector<std::string> alphabet;
  int hidden = 0;  // bytes that are not printable move up to 256 and beyond, after the others
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
    if (printable) {
      alphabet.push_back(utf8(byte));
    } else {
      ++hidden;
    }
  }
  for (int i = 0; i < hidden; ++i) alphabet.push_back(utf8(256 + i));
  return alphabet;
}

constexpr std::pair<const char*, const char*> kMerges[] = {
    {"Ġ", "t"},  {"h", "e"},  {"Ġ", "a"}, {"i", "n"},  {"Ġt", "he"}, {"Ġ", "s"}, {"n", "d"},
    {"r", "e"},  {"Ġ", "w"},  {"o", "u"}, {"e", "r"},  {"Ġ", "o"},   {"i", "t"}, {"Ġa", "nd"},
    {"Ġ", "in"}, {"in", "g"}, {"o", "n"}, {"Ġt", "o"}, {"l", "l"},   {"a", "t"}};

std::string SpecialTokenName(int32_t id) {
  switch (id) {
    case kTestBos:
      return "<|begin_of_text|>";
    case kTestEos:
      return "<|end_of_text|>";
    case kTestEos + 1:
      return "<|start_header_id|>";
    case kTestEos + 2:
      return "<|end_header_id|>";
    case kTestEot:
      return "<|eot_id|>";
  }
  return absl::StrCat("<|reserved_special_token_", id - kTestEot - 1, "|>");
}

json TokenizerJson(int vocab_size) {
  json vocab = json::object(), merges = json::array(), added = json::array();
  for (const std::string& token : ByteAlphabet()) vocab[token] = vocab.size();
  for (const auto& [left, right] : kMerges) {
    vocab[std::string(left) + right] = vocab.size();
    merges.push_back({left, right});
  }
  for (int32_t id = kTestBos; id < vocab_size; ++id) {
    added.push_back({{"id", id},
                     {"content", SpecialTokenName(id)},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  const std::string bos = SpecialTokenName(kTestBos);
  const json begin = {{"SpecialToken", {{"id", bos}, {"type_id", 0}}}};
  const json sequence = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", false}};
  const char* pattern =
      R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", nullptr},
          {"pre_tokenizer",
           {{"type", "Sequence"},
            {"pretokenizers",
             {{{"type", "Split"},
               {"pattern", {{"Regex", pattern}}},
               {"behavior", "Isolated"},
               {"invert", false}},
              byte_level}}}},
          {"post_processor",
           {{"type", "TemplateProcessing"},
            {"single", json::array({begin, sequence})},
            {"pair", json::array({begin, sequence})},
            {"special_tokens",
             {{bos,
               {{"id", bos}, {"ids", json::array({kTestBos})}, {"tokens", json::array({bos})}}}}}}},
          {"decoder", byte_level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", true},
            {"vocab", vocab},
            {"merges", merges}}}};
}

json TokenizerConfigJson() {
  const char* chat_template =
      "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
      "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | "
      "trim "
      "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif "
      "%}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ "
      "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
  return {{"bos_token", SpecialTokenName(kTestBos)},
          {"eos_token", SpecialTokenName(kTestEos)},
          {"clean_up_tokenization_spaces", false},
          {"tokenizer_class", "PreTrainedTokenizerFast"},
          {"chat_template", chat_template}};
}

}  // namespace

TempDir::TempDir() {
  std::string path = (std::filesystem::temp_directory_path() / "mobi-test-XXXXXX").string();
  if (mkdtemp(path.data()) == nullptr) {
    perror(path.c_str());
    abort();
  }
  path_ = path;
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

json TestConfigJson(const TestModelOptions& options) {
  json config = {{"architectures", json::array({"LlamaForCausalLM"})},
                 {"attention_bias", false},
                 {"bos_token_id", kTestBos},
                 {"eos_token_id", kTestEos},
                 {"head_dim", options.head_dim},
                 {"hidden_act", "silu"},
                 {"hidden_size", options.hidden_size},
                 {"intermediate_size", options.intermediate_size},
                 {"max_position_embeddings", options.max_position_embeddings},
                 {"mlp_bias", false},
                 {"model_type", "llama"},
                 {"num_attention_heads", options.num_attention_heads},
                 {"num_hidden_layers", options.num_hidden_layers},
                 {"num_key_value_heads", options.num_key_value_heads},
                 {"rms_norm_eps", 1e-5},
                 {"rope_scaling", nullptr},
                 {"rope_theta", 10000.0},
                 {"tie_word_embeddings", options.tie_word_embeddings},
                 {"vocab_size", options.vocab_size}};
  if (options.rope_scaling) {
    config["rope_scaling"] = {{"rope_type", "llama3"},
                              {"factor", options.rope_scaling->factor},
                              {"low_freq_factor", options.rope_scaling->low_freq_factor},
                              {"high_freq_factor", options.rope_scaling->high_freq_factor},
                              {"original_max_position_embeddings",
                               options.rope_scaling->original_max_position_embeddings}};
  }
  return config;
}

absl::Status WriteTestModel(const std::string& dir, const TestModelOptions& options) {
  std::error_code error;
  if (!std::filesystem::create_directories(dir, error)) {
    return absl::AlreadyExistsError(dir + ": exists or cannot be created");
  }
  const json generation = {{"bos_token_id", kTestBos}, {"eos_token_id", {kTestEos, kTestEot}}};
  MOBI_RETURN_IF_ERROR(WriteFile(dir + "/config.json", TestConfigJson(options).dump(2)));
  MOBI_RETURN_IF_ERROR(WriteFile(dir + "/generation_config.json", generation.dump(2)));
  MOBI_RETURN_IF_ERROR(
      WriteFile(dir + "/tokenizer.json", TokenizerJson(options.vocab_size).dump(1)));
  MOBI_RETURN_IF_ERROR(WriteFile(dir + "/tokenizer_config.json", TokenizerConfigJson().dump(2)));
  return WriteWeights(dir, options);
}

}  // namespace mobi
