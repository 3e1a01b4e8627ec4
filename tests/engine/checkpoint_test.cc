#include "engine/checkpoint.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/base/file_writer.h"
#include "engine/checkpoint_writer.h"
#include "engine/manifest.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/numeric.h"
#include "tests/engine/bad_folder.h"
#include "tests/engine/test_models.h"
#include "tests/paths.h"

namespace mobi {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(CheckpointTest, ReadsFloatFolders) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int shards : {1, 3}) {
      for (const bool tied : {true, false}) {
        SCOPED_TRACE(absl::StrCat(std::string(Name(dtype)), " ", shards, " ", tied));
        TempDir dir;
        TestModelOptions options;
        options.dtype = dtype;
        options.num_shards = shards;
        options.tie_word_embeddings = tied;
        ASSERT_EQ(WriteTestModel(dir.Sub("m"), options), absl::OkStatus());
        const auto checkpoint = Checkpoint::Open(dir.Sub("m/"), kVerify);
        ASSERT_EQ(checkpoint.status(), absl::OkStatus());
        EXPECT_FALSE(checkpoint->quantized());
        EXPECT_EQ(checkpoint->verified_files(), 0);
        EXPECT_EQ(checkpoint->files().size(), static_cast<size_t>(shards));
        EXPECT_EQ(checkpoint->Has("lm_head.weight"), !tied);
        EXPECT_THAT(checkpoint->config().eos_token_ids, ElementsAre(kTestEos, kTestEot));
        const auto norm = checkpoint->Tensor("model.norm.weight", {128});
        ASSERT_EQ(norm.status(), absl::OkStatus());
        EXPECT_EQ(norm->dtype, dtype);
        double mean = 0;
        for (const float value : TestFloats(*norm)) mean += value / 128;
        EXPECT_NEAR(mean, 1, 0.05);  // drawn from N(1, 0.1)
      }
    }
  }
}

// What was quantized can be read back: weights at 8 bits within half a step of the float ones.
TEST(CheckpointTest, MobiquantFolderHoldsTheFloatWeights) {
  TempDir dir;
  TestModelOptions options;
  options.num_key_value_heads = 1;
  options.head_dim = 24;  // 24 rows of k and v: tiles of 16 are padded
  options.num_attention_heads = 16;
  ASSERT_EQ(WriteTestModels(dir, options), absl::OkStatus());
  const auto source = Checkpoint::Open(dir.Sub("float"), {});
  const auto checkpoint = Checkpoint::Open(dir.Sub("mobiquant"), kVerify);
  ASSERT_EQ(source.status(), absl::OkStatus());
  ASSERT_EQ(checkpoint.status(), absl::OkStatus());
  EXPECT_TRUE(checkpoint->quantized());
  EXPECT_EQ(checkpoint->verified_files(), 5);
  const auto weights = source->Tensor("model.layers.1.self_attn.k_proj.weight", {24, 128});
  ASSERT_EQ(weights.status(), absl::OkStatus());
  const auto sliced = checkpoint->Sliced("model.layers.1.self_attn.k_proj", 24, 128);
  ASSERT_EQ(sliced.status(), absl::OkStatus());
  const uint8_t* slices[kNumSlices];
  for (size_t i = 0; i < kNumSlices; ++i) slices[i] = sliced->slices[i].data();
  std::vector<uint8_t> codes(24 * 128);
  UnpackSlices(slices, 24, 128, kNumLevels, codes.data());
  const std::vector<float> expected = TestFloats(*weights);
  for (int64_t row = 0; row < 24; ++row) {
    const auto at = static_cast<size_t>(2 * ScaleIndex(row, 0, 128));
    const float range = HalfToFloat(sliced->scales[3][at]);
    const float offset = HalfToFloat(sliced->scales[3][at + 1]);
    for (int64_t col = 0; col < 128; ++col) {
      const auto i = static_cast<size_t>(row * 128 + col);
      EXPECT_NEAR(offset + range * FractionAtLevel(codes[i], 4), expected[i], range / 256);
    }
  }
}

TEST(CheckpointTest, MobiquantFolderKeepsTheRest) {
  TempDir dir;
  ASSERT_EQ(WriteTestModels(dir), absl::OkStatus());
  const auto source = Checkpoint::Open(dir.Sub("float"), {});
  const auto checkpoint = Checkpoint::Open(dir.Sub("mobiquant"), {});
  ASSERT_EQ(checkpoint.status(), absl::OkStatus());
  for (const char* name : {"model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"}) {
    EXPECT_EQ(source->Tensor(name)->bytes, checkpoint->Tensor(name)->bytes) << name;
  }
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}) {
    EXPECT_EQ(Read(dir.Sub("float/") + name), Read(dir.Sub("mobiquant/") + name)) << name;
  }
  const auto router = checkpoint->RouterOf("model.layers.0.mlp.gate_up_router", 2, 128);
  ASSERT_EQ(router.status(), absl::OkStatus());
  EXPECT_EQ(router->num_hidden, 8);
  EXPECT_EQ(router->b2.num_elements(), 8);
  EXPECT_EQ(checkpoint->quantization_config()["recipe"]["name"], "min-max");
  EXPECT_EQ(checkpoint->coherent_batch(), 64);
  ASSERT_GT(checkpoint->price_table().size(), 20u);
  EXPECT_EQ(checkpoint->price_table().front().bits, 2);
  EXPECT_GT(checkpoint->price_table().back().bits, 7.9f);
  EXPECT_GT(checkpoint->coherent_price_table().size(), 3u);
}

TEST(CheckpointTest, ReadsWithoutCopying) {
  TempDir dir;
  ASSERT_EQ(WriteTestModel(dir.Sub("m")), absl::OkStatus());
  auto opened = Checkpoint::Open(dir.Sub("m"), {});
  ASSERT_EQ(opened.status(), absl::OkStatus());
  const std::byte* data = opened->Tensor("model.norm.weight")->bytes.data();
  const Checkpoint moved = *std::move(opened);
  EXPECT_EQ(moved.Tensor("model.norm.weight")->bytes.data(), data);
  const HostTensor& first = moved.files()[0].tensors()[0];
  EXPECT_EQ(moved.Tensor(first.name)->bytes.data(), first.bytes.data());
}

TEST(CheckpointTest, ReadsTheReferenceModel) {
  const std::string dir = std::string(MOBI_SOURCE_DIR) + "/../shared/data/wiki-llama";
  if (!fs::exists(dir)) GTEST_SKIP() << dir << " is not there";
  const auto checkpoint = Checkpoint::Open(dir, kVerify);
  ASSERT_EQ(checkpoint.status(), absl::OkStatus());
  int64_t parameters = 0;
  for (const HostTensor& tensor : checkpoint->files()[0].tensors()) {
    parameters += tensor.num_elements();
  }
  EXPECT_EQ(parameters, 27'795'968);
  EXPECT_EQ(checkpoint->config().rope_theta, 500000);
  EXPECT_THAT(checkpoint->config().eos_token_ids, ElementsAre(8177));
}

std::function<void(const std::string&)> EditIndex(std::function<void(json&)> edit) {
  return [edit = std::move(edit)](const std::string& dir) {
    EditJson(dir + "/model.safetensors.index.json", edit);
  };
}

std::function<void(const std::string&)> EditPrices(std::function<void(json&)> edit) {
  return EditConfig([edit = std::move(edit)](json& config) {
    edit(config["quantization_config"]["price_table"]);
  });
}

class BadFloatFolderTest : public ::testing::TestWithParam<BadFolder> {};

TEST_P(BadFloatFolderTest, IsRefused) {
  TempDir dir;
  TestModelOptions options;
  options.num_shards = 2;
  ASSERT_EQ(WriteTestModel(dir.Sub("m"), options), absl::OkStatus());
  GetParam().damage(dir.Sub("m"));
  ExpectRefused(dir.Sub("m"), GetParam());
}

constexpr char kFirstShard[] = "/model-00001-of-00002.safetensors";
constexpr char kIndexFile[] = "/model.safetensors.index.json";
constexpr char kNorm[] = "model.norm.weight";

INSTANTIATE_TEST_SUITE_P(
    Files, BadFloatFolderTest,
    ::testing::Values(
        BadFolder{
            "no folder", [](const std::string& dir) { fs::remove_all(dir); }, {"No such file"}},
        BadFolder{"a file",
                  [](const std::string& dir) {
                    fs::remove_all(dir);
                    Write(dir, "x");
                  },
                  {"not a folder"}},
        BadFolder{"a loop of links",
                  [](const std::string& dir) {
                    fs::remove_all(dir);
                    fs::create_symlink(dir, dir);
                  },
                  {"symbolic links"}},
        BadFolder{"no config",
                  [](const std::string& dir) { fs::remove(dir + "/config.json"); },
                  {"config.json", "No such file"}},
        BadFolder{"config is a folder",
                  [](const std::string& dir) {
                    fs::remove(dir + "/config.json");
                    fs::create_directory(dir + "/config.json");
                  },
                  {"config.json: not a regular file"}},
        BadFolder{"config is a pipe",
                  [](const std::string& dir) {
                    fs::remove(dir + "/config.json");
                    mkfifo((dir + "/config.json").c_str(), 0600);
                  },
                  {"config.json: not a regular file"}},
        BadFolder{"config links to itself",
                  [](const std::string& dir) {
                    fs::remove(dir + "/config.json");
                    fs::create_symlink("config.json", dir + "/config.json");
                  },
                  {"config.json", "symbolic links"}},
        BadFolder{"config of 1 TB",
                  [](const std::string& dir) {
                    fs::resize_file(dir + "/config.json", uint64_t{1} << 40);
                  },
                  {"config.json: 1099511627776 bytes, the limit is 1048576"}},
        BadFolder{"config empty",
                  [](const std::string& dir) { Write(dir + "/config.json", ""); },
                  {"config.json: not valid JSON at byte 1"}},
        BadFolder{"config is a list",
                  [](const std::string& dir) { Write(dir + "/config.json", "[]"); },
                  {"config.json: a list is not an object"}},
        BadFolder{"broken generation config",
                  [](const std::string& dir) { Write(dir + "/generation_config.json", "{"); },
                  {"generation_config.json: not valid JSON"}},
        BadFolder{"end id out of range",
                  [](const std::string& dir) {
                    Write(dir + "/generation_config.json", R"({"eos_token_id": [1, 320]})");
                  },
                  {"generation_config.json: eos_token_id: 320", "vocab_size 320"}},
        BadFolder{"no weights",
                  [](const std::string& dir) { fs::remove(dir + kIndexFile); },
                  {"neither model.safetensors nor model.safetensors.index.json"}},
        BadFolder{"shard missing",
                  [](const std::string& dir) { fs::remove(dir + kFirstShard); },
                  {kFirstShard, "No such file"}},
        BadFolder{"shard empty",
                  [](const std::string& dir) { fs::resize_file(dir + kFirstShard, 0); },
                  {kFirstShard, "0 bytes is too short"}},
        BadFolder{
            "shard of 1 TB",
            [](const std::string& dir) { fs::resize_file(dir + kFirstShard, uint64_t{1} << 40); },
            {kFirstShard, "of which the tensors cover"}},
        BadFolder{"shard cut in the header",
                  [](const std::string& dir) { fs::resize_file(dir + kFirstShard, 100); },
                  {kFirstShard, "goes beyond the file of 100 bytes"}},
        BadFolder{"shard cut in the data",
                  [](const std::string& dir) {
                    fs::resize_file(dir + kFirstShard, fs::file_size(dir + kFirstShard) - 1);
                  },
                  {kFirstShard, "data_offsets: end"}},
        BadFolder{"shard too long",
                  [](const std::string& dir) {
                    fs::resize_file(dir + kFirstShard, fs::file_size(dir + kFirstShard) + 1);
                  },
                  {kFirstShard, "of which the tensors cover"}}));

INSTANTIATE_TEST_SUITE_P(
    Index, BadFloatFolderTest,
    ::testing::Values(
        BadFolder{"no map",
                  EditIndex([](json& index) { index.erase("weight_map"); }),
                  {"weight_map: missing"}},
        BadFolder{"map is a list",
                  EditIndex([](json& index) {
                    index["weight_map"] = {1, 2};
                  }),
                  {"weight_map: a list is not an object"}},
        BadFolder{"file above",
                  EditIndex([](json& index) {
                    index["weight_map"][kNorm] = "../m/model-00001-of-00002.safetensors";
                  }),
                  {"weight_map.model.norm.weight: the file lies outside of the folder"}},
        BadFolder{"absolute file",
                  EditIndex([](json& index) { index["weight_map"][kNorm] = "/dev/zero"; }),
                  {"outside of the folder"}},
        BadFolder{"the folder itself",
                  EditIndex([](json& index) { index["weight_map"][kNorm] = ".."; }),
                  {"outside of the folder"}},
        BadFolder{
            "file name with a zero byte",
            EditIndex([](json& index) { index["weight_map"][kNorm] = std::string("a\0b", 3); }),
            {"outside of the folder"}},
        BadFolder{"file is a number",
                  EditIndex([](json& index) { index["weight_map"][kNorm] = 3; }),
                  {"weight_map.model.norm.weight: 3 is not a string"}},
        BadFolder{"wrong shard",
                  EditIndex([](json& index) {
                    index["weight_map"][kNorm] = "model-00002-of-00002.safetensors";
                  }),
                  {"weight_map.model.norm.weight: not in", "model-00002-of-00002"}},
        BadFolder{"tensor left out",
                  EditIndex([](json& index) { index["weight_map"].erase(kNorm); }),
                  {"model.norm.weight: missing"}}));

INSTANTIATE_TEST_SUITE_P(
    Config, BadFloatFolderTest,
    ::testing::Values(
        BadFolder{"wider",
                  EditConfig([](json& config) { config["hidden_size"] = 256; }),
                  {"model.embed_tokens.weight: shape [320, 128], expected [320, 256]"}},
        BadFolder{"fewer layers",
                  EditConfig([](json& config) { config["num_hidden_layers"] = 1; }),
                  {"model.layers.1.", "num_hidden_layers 1"}},
        BadFolder{"more layers",
                  EditConfig([](json& config) { config["num_hidden_layers"] = 3; }),
                  {"model.layers.2.input_layernorm.weight: missing"}},
        BadFolder{"not tied",
                  EditConfig([](json& config) { config["tie_word_embeddings"] = false; }),
                  {"lm_head.weight: missing"}},
        BadFolder{"mobiquant without prices",
                  EditConfig([](json& config) {
                    config["quantization_config"] = {{"quant_method", "mobiquant"},
                                                     {"version", 1},
                                                     {"group_size", 128},
                                                     {"slice_bits", {2, 2, 2, 2}}};
                  }),
                  {"config.json: quantization_config.price_table: missing"}}));

class BadMobiquantFolderTest : public ::testing::TestWithParam<BadFolder> {};

TEST_P(BadMobiquantFolderTest, IsRefused) {
  TempDir dir;
  ASSERT_EQ(WriteTestModels(dir), absl::OkStatus());
  GetParam().damage(dir.Sub("mobiquant"));
  ExpectRefused(dir.Sub("mobiquant"), GetParam());
}

INSTANTIATE_TEST_SUITE_P(
    Config, BadMobiquantFolderTest,
    ::testing::Values(
        BadFolder{"next version",
                  EditConfig([](json& config) { config["quantization_config"]["version"] = 2; }),
                  {"quantization_config.version: 2 is not in 1..1"}},
        BadFolder{
            "other groups",
            EditConfig([](json& config) { config["quantization_config"]["group_size"] = 64; }),
            {"quantization_config.group_size: 64"}},
        BadFolder{"other slices",
                  EditConfig([](json& config) {
                    config["quantization_config"]["slice_bits"] = {4, 4};
                  }),
                  {"quantization_config.slice_bits: not [2, 2, 2, 2]"}},
        BadFolder{"read as float",
                  EditConfig([](json& config) { config.erase("quantization_config"); }),
                  {"model.layers.0.self_attn.q_proj.weight: missing"}},
        BadFolder{"empty prices",
                  EditPrices([](json& prices) { prices["token"] = json::array(); }),
                  {"price_table.token: 0 points"}},
        BadFolder{"bits descend",
                  EditPrices([](json& prices) {
                    prices["token"] = {{3, 2.0}, {2.5, 1.0}};
                  }),
                  {"price_table.token: point 1: bits do not ascend"}},
        BadFolder{"price rises",
                  EditPrices([](json& prices) {
                    prices["token"] = {{2, 1.0}, {3, 2.0}};
                  }),
                  {"price_table.token: point 1: the price rises"}},
        BadFolder{"price is null",
                  EditPrices([](json& prices) {
                    prices["token"] = {{2, std::nan("")}, {3, 2.0}};
                  }),
                  {"price_table.token: point 0: not [bits, price]"}},
        BadFolder{"price beyond float",
                  EditPrices([](json& prices) {
                    prices["token"] = {{2, 1e300}, {3, 2.0}};
                  }),
                  {"price_table.token: point 0: price inf"}},
        BadFolder{"price zero",
                  EditPrices([](json& prices) {
                    prices["token"] = {{2, 1.0}, {3, 0}};
                  }),
                  {"price_table.token: point 1: price 0"}},
        BadFolder{"nine bits",
                  EditPrices([](json& prices) {
                    prices["token"] = {{9, 1.0}};
                  }),
                  {"price_table.token: point 0: 9 bits"}},
        BadFolder{"coherent batch",
                  EditPrices([](json& prices) { prices["coherent"]["batch"] = 0; }),
                  {"price_table.coherent.batch: 0"}}));

INSTANTIATE_TEST_SUITE_P(
    Manifest, BadMobiquantFolderTest,
    ::testing::Values(
        BadFolder{"missing",
                  [](const std::string& dir) { fs::remove(dir + "/MANIFEST"); },
                  {"MANIFEST", "No such file"}},
        BadFolder{"one bit of the weights",
                  [](const std::string& dir) {
                    std::string bytes = Read(dir + "/model.safetensors");
                    bytes[bytes.size() - 7] ^= 1;
                    Write(dir + "/model.safetensors", bytes);
                  },
                  {"model.safetensors: SHA-256 is", "MANIFEST says"}},
        BadFolder{"a space in the config",
                  [](const std::string& dir) {
                    Write(dir + "/config.json", Read(dir + "/config.json") + " ");
                  },
                  {"config.json: SHA-256 is"}},
        BadFolder{"file not listed",
                  [](const std::string& dir) {
                    std::string text = Read(dir + "/MANIFEST");
                    const size_t begin = text.rfind('\n', text.find("  tokenizer.json")) + 1;
                    Write(dir + "/MANIFEST", text.erase(begin, text.find('\n', begin) + 1 - begin));
                  },
                  {"MANIFEST: tokenizer.json: not listed"}},
        BadFolder{"file removed",
                  [](const std::string& dir) { fs::remove(dir + "/tokenizer_config.json"); },
                  {"tokenizer_config.json", "No such file"}},
        BadFolder{"names a file above",
                  [](const std::string& dir) {
                    Write(dir + "/MANIFEST", Read(dir + "/MANIFEST") + std::string(64, '0') +
                                                 "  ../float/config.json\n");
                  },
                  {"MANIFEST: line 6: the file lies outside"}},
        BadFolder{"names a file twice",
                  [](const std::string& dir) {
                    Write(dir + "/MANIFEST",
                          Read(dir + "/MANIFEST") + std::string(64, '0') + "  config.json\n");
                  },
                  {"MANIFEST: line 6: the file is named twice"}},
        BadFolder{"names a file of 1 TB",
                  [](const std::string& dir) {
                    Write(dir + "/huge", "");
                    fs::resize_file(dir + "/huge", uint64_t{1} << 40);
                    Write(dir + "/MANIFEST",
                          Read(dir + "/MANIFEST") + std::string(64, '0') + "  huge\n");
                  },
                  {"huge: 1099511627776 bytes, the limit is"}},
        BadFolder{"short digest",
                  [](const std::string& dir) { Write(dir + "/MANIFEST", "abc  config.json\n"); },
                  {"MANIFEST: line 1: not a SHA-256"}},
        BadFolder{"binary",
                  [](const std::string& dir) { Write(dir + "/MANIFEST", std::string(300, '\0')); },
                  {"MANIFEST: line 1: not a SHA-256"}}));

// Overwrites part of a tensor in place.
void Poke(const std::string& dir, const std::string& tensor, size_t offset, uint16_t value) {
  const std::string path = dir + "/model.safetensors";
  size_t at = 0;
  {
    const auto file = SafetensorsFile::Open(path);
    ASSERT_EQ(file.status(), absl::OkStatus());
    size_t data = fs::file_size(path);
    for (const HostTensor& t : file->tensors()) data -= t.bytes.size();
    at = data +
         static_cast<size_t>(file->Find(tensor)->bytes.data() - file->tensors()[0].bytes.data());
  }
  std::fstream stream(path, std::ios::in | std::ios::out | std::ios::binary);
  stream.seekp(static_cast<std::streamoff>(at + offset));
  stream.write(reinterpret_cast<const char*>(&value), sizeof(value));
}

TEST(CheckpointTest, RefusesScalesAndRoutersThatAreNotFinite) {
  TempDir dir;
  ASSERT_EQ(WriteTestModels(dir), absl::OkStatus());
  const std::string linear = "model.layers.1.mlp.down_proj";
  const std::string router = "model.layers.1.mlp.down_router";
  Poke(dir.Sub("mobiquant"), linear + ".scales_3", 2 * 77, FloatToHalf(-INFINITY));
  Poke(dir.Sub("mobiquant"), router + ".w2", 4 * 5 + 2, 0x7FC0);  // the upper half of a NaN
  const auto checkpoint = Checkpoint::Open(dir.Sub("mobiquant"), {});
  ASSERT_EQ(checkpoint.status(), absl::OkStatus());
  EXPECT_THAT(
      std::string(checkpoint->Sliced(linear, 128, 256).status().message()),
      AllOf(HasSubstr("model.safetensors"), HasSubstr("down_proj.scales_3: element 77 is")));
  EXPECT_THAT(std::string(checkpoint->RouterOf(router, 1, 256).status().message()),
              HasSubstr("down_router.w2: element 5 is not finite"));
  EXPECT_EQ(checkpoint->Sliced("model.layers.0.mlp.down_proj", 128, 256).status(),
            absl::OkStatus());
}

TEST(CheckpointTest, WrongQuestionsNameWhatIsThere) {
  TempDir dir;
  ASSERT_EQ(WriteTestModels(dir), absl::OkStatus());
  const auto checkpoint = Checkpoint::Open(dir.Sub("mobiquant"), {});
  ASSERT_EQ(checkpoint.status(), absl::OkStatus());
  const auto missing = checkpoint->Tensor("model.layers.7.nothing").status();
  EXPECT_TRUE(absl::IsNotFound(missing));
  EXPECT_THAT(std::string(missing.message()),
              HasSubstr("mobiquant/model.safetensors: model.layers.7.nothing: missing"));
  EXPECT_THAT(std::string(checkpoint->Tensor(kNorm, {1, 128}).status().message()),
              HasSubstr("model.norm.weight: shape [128], expected [1, 128]"));
  const std::string linear = "model.layers.0.self_attn.q_proj";
  EXPECT_THAT(std::string(checkpoint->Sliced(linear, 256, 128).status().message()),
              HasSubstr("q_proj.slice_0: shape [8, 1, 512], expected [16, 1, 512]"));
  EXPECT_THAT(std::string(checkpoint->Sliced(linear, 128, 100).status().message()),
              HasSubstr("100 input features are not a multiple of 128"));
  EXPECT_THAT(
      std::string(
          checkpoint->RouterOf("model.layers.0.self_attn.qkv_router", 2, 128).status().message()),
      HasSubstr("qkv_router.w2: shape [12, 8], expected [8, 8]"));
}

}  // namespace
}  // namespace mobi
