#include "engine/model_config.h"

#include <functional>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace mobi {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

absl::StatusOr<ModelConfig> Parse(const json& config) {
  return ParseModelConfig(config.dump(), "m/config.json");
}

// The published config.json files, fields that a reader must know.
json Llama2() {
  return json::parse(R"({"architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
    "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
    "use_cache": true, "vocab_size": 32000})");
}

json Llama3() {
  return json::parse(R"({"architectures": ["LlamaForCausalLM"], "attention_bias": false,
    "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 500000.0,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 128256})");
}

json Llama31() {
  json config = Llama3();
  config["eos_token_id"] = {128001, 128008, 128009};
  config["max_position_embeddings"] = 131072;
  config["mlp_bias"] = false;
  config["rope_scaling"] = json::parse(R"({"factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"})");
  return config;
}

json Llama32() {
  json config = Llama31();
  config["head_dim"] = 64;
  config["hidden_size"] = 2048;
  config["num_hidden_layers"] = 16;
  config["tie_word_embeddings"] = true;
  config["rope_scaling"]["factor"] = 32.0;
  return config;
}

TEST(ModelConfigTest, ReadsLlama2) {
  const auto config = Parse(Llama2());
  ASSERT_EQ(config.status(), absl::OkStatus());
  EXPECT_EQ(config->vocab_size, 32000);
  EXPECT_EQ(config->intermediate_size, 11008);
  EXPECT_EQ(config->head_dim, 128);
  EXPECT_EQ(config->num_key_value_heads, 32);
  EXPECT_EQ(config->rope_theta, 10000);
  EXPECT_FLOAT_EQ(config->rms_norm_eps, 1e-5f);
  EXPECT_FALSE(config->rope_scaling.has_value());
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(2));
  EXPECT_EQ(config->bos_token_id, 1);
}

TEST(ModelConfigTest, ReadsLlama3) {
  const auto config = Parse(Llama3());
  ASSERT_EQ(config.status(), absl::OkStatus());
  EXPECT_EQ(config->attention_size(), 4096);
  EXPECT_EQ(config->key_value_size(), 1024);
  EXPECT_EQ(config->rope_theta, 500000);
  EXPECT_EQ(config->max_position_embeddings, 8192);
}

TEST(ModelConfigTest, ReadsLlama31AndLlama32) {
  const auto config = Parse(Llama31());
  ASSERT_EQ(config.status(), absl::OkStatus());
  ASSERT_TRUE(config->rope_scaling.has_value());
  EXPECT_EQ(config->rope_scaling->factor, 8);
  EXPECT_EQ(config->rope_scaling->low_freq_factor, 1);
  EXPECT_EQ(config->rope_scaling->high_freq_factor, 4);
  EXPECT_EQ(config->rope_scaling->original_max_position_embeddings, 8192);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(128001, 128008, 128009));
  const auto small = Parse(Llama32());
  ASSERT_EQ(small.status(), absl::OkStatus());
  EXPECT_TRUE(small->tie_word_embeddings);
  EXPECT_EQ(small->attention_size(), 2048);
  EXPECT_EQ(small->rope_scaling->factor, 32);
}

TEST(ModelConfigTest, ReadsOldAndNewSpellingsOfRope) {
  const auto expected = Parse(Llama31());
  json old_name = Llama31();
  old_name["rope_scaling"]["type"] = "llama3";
  old_name["rope_scaling"].erase("rope_type");
  json renamed = Llama31();  // as transformers 5 writes it
  renamed["rope_parameters"] = renamed["rope_scaling"];
  renamed["rope_parameters"]["rope_theta"] = renamed["rope_theta"];
  renamed.erase("rope_scaling");
  renamed.erase("rope_theta");
  for (const json& spelling : {old_name, renamed}) {
    const auto config = Parse(spelling);
    ASSERT_EQ(config.status(), absl::OkStatus());
    EXPECT_EQ(config->rope_theta, 500000);
    EXPECT_EQ(config->rope_scaling->factor, expected->rope_scaling->factor);
  }
  json plain = Llama3();
  plain.erase("rope_theta");
  plain["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 1e6}};
  EXPECT_EQ(Parse(plain)->rope_theta, 1e6);
  EXPECT_FALSE(Parse(plain)->rope_scaling.has_value());
  plain["rope_scaling"] = {{"type", "default"}};
  EXPECT_FALSE(Parse(plain)->rope_scaling.has_value());
}

// What transformers' LlamaConfig takes when a key is left out.
TEST(ModelConfigTest, DefaultsAreLlamaConfigs) {
  const auto config = Parse(json::parse(R"({"model_type": "llama", "vocab_size": 100,
    "hidden_size": 96, "intermediate_size": 10, "num_hidden_layers": 1,
    "num_attention_heads": 3})"));
  ASSERT_EQ(config.status(), absl::OkStatus());
  EXPECT_EQ(config->num_key_value_heads, 3);
  EXPECT_EQ(config->head_dim, 32);
  EXPECT_EQ(config->max_position_embeddings, 2048);
  EXPECT_FLOAT_EQ(config->rms_norm_eps, 1e-6f);
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_THAT(config->eos_token_ids, IsEmpty());
  EXPECT_EQ(config->bos_token_id, -1);
}

TEST(ModelConfigTest, HeadsNeedNotFillTheHiddenSize) {
  json config = Llama3();
  config["head_dim"] = 80;
  EXPECT_EQ(Parse(config)->attention_size(), 2560);
  config["num_attention_heads"] = 24;  // does not divide hidden_size, and need not
  EXPECT_EQ(Parse(config)->attention_size(), 1920);
}

TEST(ModelConfigTest, GenerationConfigAddsEndIds) {
  auto config = Parse(Llama3());
  ASSERT_EQ(config.status(), absl::OkStatus());
  ASSERT_EQ(MergeGenerationConfig(R"({"eos_token_id": [128001, 128009], "top_p": 0.9})", "g.json",
                                  *config),
            absl::OkStatus());
  EXPECT_THAT(config->eos_token_ids, ElementsAre(128001, 128009));
  ASSERT_EQ(MergeGenerationConfig("{}", "g.json", *config), absl::OkStatus());
  EXPECT_EQ(config->eos_token_ids.size(), 2u);
  for (const char* bad : {R"({"eos_token_id": 128256})", R"({"eos_token_id": -1})",
                          R"({"eos_token_id": "2"})", R"({"eos_token_id": [[1]]})"}) {
    EXPECT_THAT(std::string(MergeGenerationConfig(bad, "g.json", *config).message()),
                HasSubstr("g.json: eos_token_id: "))
        << bad;
  }
}

struct BadConfig {
  std::string key;
  json value;  // discarded: the key is removed
  std::string expected;
  absl::StatusCode code = absl::StatusCode::kInvalidArgument;
};

std::ostream& operator<<(std::ostream& out, const BadConfig& bad) {
  return out << bad.key << " = " << bad.value;
}

class BadConfigTest : public ::testing::TestWithParam<BadConfig> {};

TEST_P(BadConfigTest, IsRefusedWithOneLine) {
  json config = Llama31();
  const json::json_pointer key("/" + GetParam().key);
  config[key] = GetParam().value;
  if (GetParam().value.is_null()) config[key.parent_pointer()].erase(key.back());
  const auto parsed = Parse(config);
  ASSERT_FALSE(parsed.ok());
  EXPECT_EQ(parsed.status().code(), GetParam().code);
  EXPECT_THAT(
      std::string(parsed.status().message()),
      AllOf(HasSubstr("m/config.json: "), HasSubstr(GetParam().expected), Not(HasSubstr("\n"))));
}

constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

INSTANTIATE_TEST_SUITE_P(
    Unsupported, BadConfigTest,
    ::testing::Values(
        BadConfig{"model_type", "mistral", "model_type: \"mistral\" is not supported",
                  kUnimplemented},
        BadConfig{"architectures", json::array({"LlamaForSequenceClassification"}),
                  "architectures: \"LlamaForSequenceClassification\"", kUnimplemented},
        BadConfig{"hidden_act", "gelu", "hidden_act: \"gelu\"", kUnimplemented},
        BadConfig{"attention_bias", true, "attention_bias: true", kUnimplemented},
        BadConfig{"mlp_bias", true, "mlp_bias: true", kUnimplemented},
        BadConfig{"partial_rotary_factor", 0.5, "partial_rotary_factor", kUnimplemented},
        BadConfig{"quantization_config",
                  {{"quant_method", "gptq"}},
                  "quantization_config.quant_method: \"gptq\" is not supported",
                  kUnimplemented},
        BadConfig{"rope_scaling/rope_type", "yarn", "rope_scaling.rope_type: \"yarn\"",
                  kUnimplemented},
        BadConfig{"rope_scaling",
                  {{"type", "linear"}, {"factor", 2}},
                  "rope_scaling.type: \"linear\"",
                  kUnimplemented},
        BadConfig{"rope_parameters",
                  {{"full_attention", json::object()}},
                  "rope_parameters.full_attention",
                  kUnimplemented}));

INSTANTIATE_TEST_SUITE_P(
    Sizes, BadConfigTest,
    ::testing::Values(
        BadConfig{"model_type", nullptr, "model_type: missing"},
        BadConfig{"model_type", 3, "model_type: 3 is not a string"},
        BadConfig{"vocab_size", nullptr, "vocab_size: missing"},
        BadConfig{"vocab_size", 0, "vocab_size: 0 is not in 1..16777216"},
        BadConfig{"vocab_size", -5, "vocab_size: -5"},
        BadConfig{"vocab_size", 1e5, "vocab_size: 100000.0 is not an integer"},
        BadConfig{"vocab_size", "32000", "vocab_size: \"32000\" is not an integer"},
        BadConfig{"vocab_size", 18446744073709551615u, "vocab_size: 18446744073709551615"},
        BadConfig{"hidden_size", 9223372036854775807, "hidden_size: 9223372036854775807"},
        BadConfig{"hidden_size", 4100, "hidden_size: 4100 is not a multiple of num_attention"},
        BadConfig{"hidden_size", 96, "head_dim: 3 is not an even number"},
        BadConfig{"intermediate_size", json::array(), "intermediate_size: a list is not"},
        BadConfig{"num_hidden_layers", 1000000, "num_hidden_layers: 1000000 is not in 1..1024"},
        BadConfig{"num_attention_heads", 0, "num_attention_heads: 0"},
        BadConfig{"num_key_value_heads", 5, "num_key_value_heads: 5 does not divide"},
        BadConfig{"num_key_value_heads", 64, "num_key_value_heads: 64 is not in 1..32"},
        BadConfig{"head_dim", 127, "head_dim: 127 is not an even number"},
        BadConfig{"head_dim", 0, "head_dim: 0 is not in 2..1024"},
        BadConfig{"max_position_embeddings", 0, "max_position_embeddings: 0"},
        BadConfig{"rms_norm_eps", 0, "rms_norm_eps: 0"},
        BadConfig{"rms_norm_eps", "1e-5", "rms_norm_eps: \"1e-5\" is not a number"},
        BadConfig{"rope_theta", -1.0, "rope_theta: -1.0"},
        BadConfig{"tie_word_embeddings", 1, "tie_word_embeddings: 1 is not true or false"},
        BadConfig{"bos_token_id", 128256, "bos_token_id: 128256 is not in 0..128255"},
        BadConfig{"eos_token_id", 128256, "eos_token_id: 128256"},
        BadConfig{"eos_token_id", std::vector<int>(65, 1), "eos_token_id: 65 ids, the limit is 64"},
        BadConfig{"rope_scaling", "llama3", "rope_scaling: \"llama3\" is not an object"},
        BadConfig{"rope_scaling/rope_type", nullptr, "rope_scaling.rope_type: missing"},
        BadConfig{"rope_scaling/factor", nullptr, "rope_scaling.factor: missing"},
        BadConfig{"rope_scaling/factor", 0, "rope_scaling.factor: 0"},
        BadConfig{"rope_scaling/high_freq_factor", 1.0,
                  "rope_scaling.high_freq_factor: 1 is not above low_freq_factor 1"},
        BadConfig{"rope_scaling/original_max_position_embeddings", 0,
                  "rope_scaling.original_max_position_embeddings: 0"},
        BadConfig{
            "quantization_config", {{"bits", 4}}, "quantization_config.quant_method: missing"}));

TEST(ModelConfigTest, RefusesWhatIsNotJson) {
  const std::string good = Llama31().dump();
  for (const std::string& text :
       {std::string(), std::string("NaN"), good.substr(0, good.size() - 1), good + "x",
        std::string(1 << 16, '['), std::string("{\"vocab_size\": NaN}"),
        std::string("{\"vocab_size\": Infinity}"), std::string("\xff\xfe{}"),
        std::string("{\"a\": 1, \"a\": 2}"), std::string("{\"a\": 1e400}"),
        std::string("\"llama\""), std::string((1 << 20) + 1, ' ')}) {
    const auto config = ParseModelConfig(text, "m/config.json");
    ASSERT_FALSE(config.ok()) << text.substr(0, 100);
    EXPECT_THAT(std::string(config.status().message()),
                AllOf(HasSubstr("m/config.json: "), Not(HasSubstr("\n"))));
  }
}

}  // namespace
}  // namespace mobi
