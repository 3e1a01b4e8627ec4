// Tiny random models on disk for tests of every room: a float Llama folder as a hub would publish
// it (config, tokenizer, weights), and the mobiquant folder made from any float folder. Everything
// follows from the seed. Linked into every room's test program; no test lives here.
#ifndef MOBI_TESTS_ENGINE_TEST_MODELS_H_
#define MOBI_TESTS_ENGINE_TEST_MODELS_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/checkpoint.h"
#include "engine/model_config.h"
#include "nlohmann/json.hpp"

namespace mobi {

// A folder of its own under the system's temporary one, removed with everything in it.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::string& path() const { return path_; }
  std::string Sub(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// Sizes are config.json's. Input sizes that are multiples of 128 can be quantized.
struct TestModelOptions {
  uint64_t seed = 1;
  int vocab_size = 320;  // at least 288; the tokenizer fills it
  int hidden_size = 128;
  int intermediate_size = 256;
  int num_hidden_layers = 2;
  int num_attention_heads = 4;
  int num_key_value_heads = 2;
  int head_dim = 32;
  int max_position_embeddings = 256;
  bool tie_word_embeddings = true;
  std::optional<RopeScaling> rope_scaling;
  DType dtype = DType::kBF16;
  int num_shards = 1;  // above 1: with model.safetensors.index.json
};

// Special tokens of the test tokenizer (byte-level BPE in Llama 3's layout, with a Llama 3 chat
// template). Bytes and merges come before them, reserved tokens after.
inline constexpr int32_t kTestBos = 276;  // <|begin_of_text|>
inline constexpr int32_t kTestEos = 277;  // <|end_of_text|>
inline constexpr int32_t kTestEot = 280;  // <|eot_id|>, in generation_config.json only

// The config.json that WriteTestModel writes.
nlohmann::json TestConfigJson(const TestModelOptions& options);

// Writes a float folder; `dir` must not exist. Hidden states stay of order one through the layers,
// and logits spread over a few units, so that greedy and sampled tokens vary.
absl::Status WriteTestModel(const std::string& dir, const TestModelOptions& options = {});

// What config.json says of an lm_head in slices.
inline constexpr LmHeadLevels kTestLmHead = {2, {0.5f, 0.03125f, 0.001953125f, 0.0001220703125f}};

struct TestQuantizeOptions {
  uint64_t seed = 1;
  int router_hidden = 8;
  bool coherent_table = true;
  bool sliced_lm_head = false;  // read at kTestLmHead
  uint64_t max_shard_bytes = uint64_t{4} << 30;
  bool overwrite = false;
};

// Quantizes the float folder into a mobiquant folder: codes by each group's minimum and maximum
// (close to the float model at 8 bits, poor at 2), random routers whose predicted loss falls about
// sixteen-fold a level, and the price table that these routers have on random inputs.
absl::Status WriteQuantizedTestModel(const std::string& float_dir, const std::string& dir,
                                     const TestQuantizeOptions& options = {});

// Both in one call: DIR/float and DIR/mobiquant.
absl::Status WriteTestModels(const TempDir& dir, const TestModelOptions& options = {},
                             const TestQuantizeOptions& quantize = {});

// A float, F16 or BF16 tensor's values.
std::vector<float> TestFloats(const HostTensor& tensor);

// One linear quantized by each group's minimum and maximum, the same pair for all levels.
struct TestSliced {
  std::array<std::vector<uint8_t>, kNumSlices> slices;
  std::array<std::vector<uint16_t>, kNumLevels> scales;
  SlicedTensors views;  // into the above
};
TestSliced QuantizeMinMax(const std::vector<float>& weights, int64_t rows, int64_t cols);

}  // namespace mobi

#endif  // MOBI_TESTS_ENGINE_TEST_MODELS_H_
