// Where a model's weights come from: a folder on disk (checkpoint.h), or made up to a shape for
// timing (synthetic_weights.h). Model::Load reads through this. Spans live as long as the source.
#ifndef MOBI_ENGINE_WEIGHT_SOURCE_H_
#define MOBI_ENGINE_WEIGHT_SOURCE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"
#include "kernels/sliced_weight.h"

namespace mobi {

// The price at which calibration tokens used `bits` on average.
struct PricePoint {
  float bits = 0;
  float price = 0;
};

// Host views of one linear, rows padded to kTileRows, laid out as in kernels/sliced_weight.h.
struct SlicedTensors {
  int64_t rows = 0;  // of the model; padding comes on top
  int64_t cols = 0;
  std::array<absl::Span<const uint8_t>, kNumSlices> slices;
  std::array<absl::Span<const uint16_t>, kNumLevels> scales;

  absl::Span<const std::byte> slice_bytes(int i) const {
    return {reinterpret_cast<const std::byte*>(slices[i].data()), slices[i].size()};
  }
  absl::Span<const std::byte> scale_bytes(int i) const {
    return {reinterpret_cast<const std::byte*>(scales[i].data()),
            scales[i].size() * sizeof(uint16_t)};
  }
};

struct RouterTensors {
  int num_hidden = 0;
  int num_segments = 0;
  HostTensor w1;  // F16 [num_hidden, cols]
  HostTensor b1;  // F32 [num_hidden]
  HostTensor u;   // F32 [num_hidden]
  HostTensor w2;  // F32 [num_segments * kNumLevels, num_hidden]
  HostTensor b2;  // F32 [num_segments * kNumLevels]
};

inline constexpr int kMaxRouterHidden = 4096;

// Of an lm_head in slices: the lowest level that it may be read at, and what a token's logits lose
// at each level, in nats, the same for every token.
struct LmHeadLevels {
  int min_level = 1;
  std::array<float, kNumLevels> loss{};
};

inline constexpr std::string_view kLmHead = "lm_head";

// A linear of a decoder layer: its name in the folder and its shape.
struct LinearShape {
  std::string name;  // "model.layers.0.self_attn.q_proj"
  int64_t rows = 0;
  int64_t cols = 0;
};

// Linears of one layer that see the same input and share a router.
struct RoutedGroup {
  std::string router;  // "model.layers.0.self_attn.qkv_router"
  std::vector<LinearShape> linears;
};

// The four groups of a layer in the order of the walk: qkv, o, gate_up, down.
std::array<RoutedGroup, 4> RoutedGroupsOfLayer(const ModelConfig& config, int layer);

struct ReadOptions {
  bool verify = false;  // what is read is compared with the checkpoint's sums
  bool direct = false;  // past the page cache: StreamOptions
  std::function<void(uint64_t done, uint64_t total)> progress = {};  // bytes; one thread at a time
};

// Takes bytes of views[view] from `offset` on, whole elements; called by several threads at once,
// in any order.
using ViewSink =
    absl::FunctionRef<void(size_t view, size_t offset, absl::Span<const std::byte> bytes)>;

class WeightSource {
 public:
  virtual ~WeightSource() = default;

  virtual const std::string& name() const = 0;  // for messages
  virtual const ModelConfig& config() const = 0;
  virtual bool quantized() const = 0;
  // NOT_FOUND names source and tensor, DATA_LOSS a wrong shape or value.
  virtual absl::StatusOr<HostTensor> Tensor(std::string_view name,
                                            absl::Span<const int64_t> shape) const = 0;
  virtual absl::StatusOr<SlicedTensors> SlicedViews(std::string_view linear, int64_t rows,
                                                    int64_t cols) const = 0;
  virtual absl::StatusOr<RouterTensors> RouterViews(std::string_view router, int num_segments,
                                                    int64_t cols) const = 0;
  // Gives every byte of `views`, which were got from the methods above and do not overlap, to
  // `sink`. Reading a view is slower, and unchecked. DATA_LOSS: a file is not what it was written
  // as.
  virtual absl::Status Read(absl::Span<const absl::Span<const std::byte>> views,
                            const ReadOptions& options, ViewSink sink) const = 0;
  // Set: SlicedViews(kLmHead, vocab_size, hidden_size) gives the logits. Else lm_head.weight or the
  // tied embedding does.
  virtual std::optional<LmHeadLevels> lm_head() const { return std::nullopt; }
  // Ascending bits, prices never rising. Empty for float weights; coherent mode is optional.
  virtual absl::Span<const PricePoint> price_table() const = 0;
  virtual absl::Span<const PricePoint> coherent_price_table() const = 0;
  // Tokens that shared a level when that table was measured; 0 without one.
  virtual int coherent_batch() const { return 0; }
  // Gives back the memory that reading took, where the bytes can be read from elsewhere again.
  virtual void ReleasePages() const {}
};

}  // namespace mobi

#endif  // MOBI_ENGINE_WEIGHT_SOURCE_H_
