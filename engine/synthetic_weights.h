// Weights of any Llama shape made up on the spot, so that kernels and whole steps can be timed at
// real shapes without a download. Gaussian weights go through the real slicer once, in a pool that
// every linear repeats; routers are random, so levels are meaningful only where they are pinned.
// Costs host memory of about the embedding, and seconds. Immutable, safe from any thread.
#ifndef MOBI_ENGINE_SYNTHETIC_WEIGHTS_H_
#define MOBI_ENGINE_SYNTHETIC_WEIGHTS_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/weight_source.h"

namespace mobi {

struct SyntheticOptions {
  bool quantized = true;
  int router_hidden = 32;
  int lm_head_min_level =
      0;  // when quantized, 1..4: lm_head in slices, read at this level at least
  uint64_t seed = 1;
};

// "llama-3-8b", "llama-3.2-1b", "llama-2-7b", ...: NOT_FOUND lists the known names.
absl::StatusOr<ModelConfig> ConfigOfShape(std::string_view shape);

class SyntheticWeights final : public WeightSource {
 public:
  // INVALID_ARGUMENT when quantized and an input size is not a multiple of the group.
  static absl::StatusOr<SyntheticWeights> Create(std::string name, const ModelConfig& config,
                                                 const SyntheticOptions& options);

  const std::string& name() const override { return name_; }
  const ModelConfig& config() const override { return config_; }
  bool quantized() const override { return options_.quantized; }
  absl::StatusOr<HostTensor> Tensor(std::string_view name,
                                    absl::Span<const int64_t> shape) const override;
  absl::StatusOr<SlicedTensors> SlicedViews(std::string_view linear, int64_t rows,
                                            int64_t cols) const override;
  absl::StatusOr<RouterTensors> RouterViews(std::string_view router, int num_segments,
                                            int64_t cols) const override;
  absl::Status Read(absl::Span<const absl::Span<const std::byte>> views, const ReadOptions& options,
                    ViewSink sink) const override;
  std::optional<LmHeadLevels> lm_head() const override;
  absl::Span<const PricePoint> price_table() const override { return price_table_; }
  absl::Span<const PricePoint> coherent_price_table() const override { return {}; }

 private:
  SyntheticWeights(std::string name, const ModelConfig& config, const SyntheticOptions& options)
      : name_(std::move(name)), config_(config), options_(options) {}
  void MakeFloats();
  void MakeSlices();
  void MakeRouters();

  std::string name_;
  ModelConfig config_;
  SyntheticOptions options_;
  std::vector<uint16_t> floats_;  // bf16, as many as the largest float tensor has
  std::vector<uint16_t> norms_;   // bf16 ones
  std::array<std::vector<uint8_t>, kNumSlices> slices_;   // as the largest linear
  std::array<std::vector<uint16_t>, kNumLevels> scales_;  // as the largest linear
  std::vector<uint16_t> router_w1_;                       // fp16
  std::vector<float> router_w2_, router_zeros_, router_b2_;
  std::vector<PricePoint> price_table_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_SYNTHETIC_WEIGHTS_H_
