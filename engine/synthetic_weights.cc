#include "engine/synthetic_weights.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "kernels/numeric.h"

namespace mobi {
namespace {

constexpr int64_t kPoolTiles = 1024;  // 2 M weights go through the slicer
constexpr float kWeightDeviation = 0.02f;

ModelConfig Llama(int vocab, int hidden, int intermediate, int layers, int heads, int kv_heads,
                  int head_dim, double theta, bool tied) {
  ModelConfig config;
  config.vocab_size = vocab;
  config.hidden_size = hidden;
  config.intermediate_size = intermediate;
  config.num_hidden_layers = layers;
  config.num_attention_heads = heads;
  config.num_key_value_heads = kv_heads;
  config.head_dim = head_dim;
  config.max_position_embeddings = 8192;
  config.rms_norm_eps = 1e-5f;
  config.rope_theta = theta;
  config.tie_word_embeddings = tied;
  return config;
}

template <typename T>
absl::Span<const std::byte> Bytes(const std::vector<T>& values, size_t count) {
  return {reinterpret_cast<const std::byte*>(values.data()), count * sizeof(T)};
}

// Repeats the first `filled` elements to the end.
template <typename T>
void Repeat(std::vector<T>& values, size_t filled) {
  for (size_t i = filled; i < values.size(); i += filled) {
    std::copy_n(values.begin(), std::min(filled, values.size() - i), values.begin() + i);
  }
}

}  // namespace

absl::StatusOr<ModelConfig> ConfigOfShape(std::string_view shape) {
  if (shape == "llama-2-7b") return Llama(32000, 4096, 11008, 32, 32, 32, 128, 1e4, false);
  if (shape == "llama-3-8b") return Llama(128256, 4096, 14336, 32, 32, 8, 128, 5e5, false);
  if (shape == "llama-3.2-1b") return Llama(128256, 2048, 8192, 16, 32, 8, 64, 5e5, true);
  if (shape == "llama-3.2-3b") return Llama(128256, 3072, 8192, 28, 24, 8, 128, 5e5, true);
  if (shape == "wiki-llama") return Llama(8192, 512, 1408, 8, 8, 4, 64, 5e5, true);
  return absl::NotFoundError(absl::StrCat("shape: \"", std::string(shape),
                                          "\" is none of llama-2-7b, llama-3-8b, llama-3.2-1b, "
                                          "llama-3.2-3b, wiki-llama"));
}

absl::StatusOr<SyntheticWeights> SyntheticWeights::Create(std::string name,
                                                          const ModelConfig& config,
                                                          const SyntheticOptions& options) {
  for (const int size : {config.hidden_size, config.attention_size(), config.intermediate_size}) {
    if (options.quantized && size % kGroupSize != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": input size ", size, " is not a multiple of ", kGroupSize));
    }
  }
  SyntheticWeights weights(std::move(name), config, options);
  weights.MakeFloats();
  if (options.quantized) {
    weights.MakeSlices();
    weights.MakeRouters();
  }
  return weights;
}

void SyntheticWeights::MakeFloats() {
  const int64_t hidden = config_.hidden_size;
  int64_t size = hidden * config_.vocab_size;
  if (!options_.quantized) size = std::max(size, hidden * config_.intermediate_size);
  floats_.resize(size);
  norms_.assign(hidden, FloatToBFloat16(1.0f));
  std::mt19937_64 random(options_.seed);
  std::normal_distribution<float> normal(0.0f, kWeightDeviation);
  const size_t pool = std::min<size_t>(floats_.size(), (1 << 20) + 7);  // not a divisor of a row
  for (size_t i = 0; i < pool; ++i) floats_[i] = FloatToBFloat16(normal(random));
  Repeat(floats_, pool);
}

// The pool is one linear of kPoolTiles row tiles by one group: packed tiles stand one after
// another, so any shape is a run of them.
void SyntheticWeights::MakeSlices() {
  const int64_t rows = kPoolTiles * kTileRows;
  std::mt19937_64 random(options_.seed + 1);
  std::normal_distribution<float> normal(0.0f, kWeightDeviation);
  std::vector<uint8_t> codes(rows * kGroupSize);
  std::vector<uint16_t> pairs(rows * 2);
  std::vector<float> group(kGroupSize);
  for (int64_t row = 0; row < rows; ++row) {
    for (float& w : group) w = normal(random);
    const auto [lo, hi] = std::minmax_element(group.begin(), group.end());
    const float range = *hi - *lo;
    pairs[2 * row] = FloatToHalf(range);
    pairs[2 * row + 1] = FloatToHalf(*lo);
    for (int i = 0; i < kGroupSize; ++i) {
      codes[row * kGroupSize + i] = static_cast<uint8_t>(EncodeWeight(group[i], *lo, range));
    }
  }
  const int64_t hidden = config_.hidden_size, wide = config_.intermediate_size;
  int64_t largest = std::max(hidden * wide, hidden * config_.attention_size());
  if (options_.lm_head_min_level > 0)
    largest = std::max(largest, hidden * PaddedRows(config_.vocab_size));
  const size_t pool_bytes = SliceBytes(rows, kGroupSize);
  uint8_t* slices[kNumSlices];
  for (int s = 0; s < kNumSlices; ++s) {
    slices_[s].resize(std::max<size_t>(largest / 4, pool_bytes));
    slices[s] = slices_[s].data();
  }
  PackSlices(codes.data(), rows, kGroupSize, slices);
  for (int s = 0; s < kNumSlices; ++s) Repeat(slices_[s], pool_bytes);
  for (auto& scales : scales_) {
    scales = pairs;
    scales.resize(std::max<size_t>(largest / kGroupSize * 2, pairs.size()));
    Repeat(scales, pairs.size());
  }
}

void SyntheticWeights::MakeRouters() {
  const int hidden = options_.router_hidden;
  const int64_t cols =
      std::max({config_.hidden_size, config_.attention_size(), config_.intermediate_size});
  std::mt19937_64 random(options_.seed + 2);
  std::normal_distribution<float> normal;
  router_w1_.resize(hidden * cols);
  const float deviation = 1.0f / std::sqrt(static_cast<float>(cols));
  for (uint16_t& w : router_w1_) w = FloatToHalf(deviation * normal(random));
  router_zeros_.assign(hidden, 0.0f);
  router_w2_.resize(kMaxSegments * kNumLevels * hidden);
  for (float& w : router_w2_) w = 0.3f * normal(random);
  // Each level leaves about a sixteenth of the error of the one before.
  router_b2_.resize(kMaxSegments * kNumLevels);
  for (int i = 0; i < kMaxSegments * kNumLevels; ++i) {
    router_b2_[i] = -std::log(16.0f) * static_cast<float>(i % kNumLevels);
  }
  for (int i = 0; i <= 60; ++i) {
    const float bits = 2.0f + 0.1f * static_cast<float>(i);
    price_table_.push_back({bits, 1e-6f * std::pow(4.0f, -bits)});
  }
}

absl::StatusOr<HostTensor> SyntheticWeights::Tensor(std::string_view name,
                                                    absl::Span<const int64_t> shape) const {
  const auto size = static_cast<size_t>(
      std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>()));
  HostTensor tensor{std::string(name), DType::kBF16, {shape.begin(), shape.end()}, {}};
  tensor.bytes = shape.size() == 1 ? Bytes(norms_, size) : Bytes(floats_, size);
  return tensor;
}

absl::StatusOr<SlicedTensors> SyntheticWeights::SlicedViews(std::string_view, int64_t rows,
                                                            int64_t cols) const {
  SlicedTensors tensors{rows, cols, {}, {}};
  for (int i = 0; i < kNumSlices; ++i) {
    tensors.slices[i] = absl::MakeConstSpan(slices_[i]).first(SliceBytes(rows, cols));
    tensors.scales[i] = absl::MakeConstSpan(scales_[i]).first(ScaleBytes(rows, cols) / 2);
  }
  return tensors;
}

std::optional<LmHeadLevels> SyntheticWeights::lm_head() const {
  if (!options_.quantized || options_.lm_head_min_level == 0) return std::nullopt;
  return LmHeadLevels{.min_level = options_.lm_head_min_level,
                      .loss = {1, 1.0f / 16, 1.0f / 256, 1.0f / 4096}};
}

absl::StatusOr<RouterTensors> SyntheticWeights::RouterViews(std::string_view router,
                                                            int num_segments, int64_t cols) const {
  const int64_t hidden = options_.router_hidden, outputs = int64_t{num_segments} * kNumLevels;
  const std::string name(router);
  RouterTensors tensors;
  tensors.num_hidden = options_.router_hidden;
  tensors.num_segments = num_segments;
  tensors.w1 = {name + ".w1", DType::kF16, {hidden, cols}, Bytes(router_w1_, hidden * cols)};
  tensors.b1 = {name + ".b1", DType::kF32, {hidden}, Bytes(router_zeros_, hidden)};
  tensors.u = {name + ".u", DType::kF32, {hidden}, Bytes(router_zeros_, hidden)};
  tensors.w2 = {name + ".w2", DType::kF32, {outputs, hidden}, Bytes(router_w2_, outputs * hidden)};
  tensors.b2 = {name + ".b2", DType::kF32, {outputs}, Bytes(router_b2_, outputs)};
  return tensors;
}

absl::Status SyntheticWeights::Read(absl::Span<const absl::Span<const std::byte>> views,
                                    const ReadOptions& /*options*/, ViewSink sink) const {
  for (size_t i = 0; i < views.size(); ++i) sink(i, 0, views[i]);
  return absl::OkStatus();
}

}  // namespace mobi
