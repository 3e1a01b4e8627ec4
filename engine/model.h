// A Llama model on a backend: weights in the backend's memory and the one forward pass, the same
// for float folders and for MoBiQuant checkpoints. Sits between the engine (which decides what
// runs) and the backend's ops. One thread at a time; immutable after Load but for the activations
// it is given and the slices that leave and come back. Source: Llama 2 and 3 as in Hugging Face
// transformers (modeling_llama).
#ifndef MOBI_ENGINE_MODEL_H_
#define MOBI_ENGINE_MODEL_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/lm_head.h"
#include "engine/model_config.h"
#include "engine/slice_planes.h"
#include "engine/weight_source.h"
#include "kernels/backend.h"
#include "kernels/sliced_weight.h"
#include "kernels/tensor.h"

namespace mobi {

// The linears of a layer that share an input: q, k, v; o; gate, up; down.
enum class LinearGroup { kQkv, kO, kGateUp, kDown };
inline constexpr int kNumLinearGroups = 4;

// The linears of one group, stacked by rows: float weights or routed slices.
struct Linear {
  Tensor dense;  // [out_features, in_features] when not routed
  std::optional<RoutedWeight> routed;
};

struct DecoderLayer {
  Tensor input_norm;           // fp32 [1, hidden_size]
  Tensor post_attention_norm;  // fp32 [1, hidden_size]
  Linear linears[kNumLinearGroups];

  const Linear& at(LinearGroup group) const { return linears[static_cast<int>(group)]; }
  Linear& at(LinearGroup group) { return linears[static_cast<int>(group)]; }
};

// Everything one step reads that is not weights or KV; arrays in the backend's memory.
struct StepTensors {
  int num_tokens = 0;
  const int32_t* token_ids = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* slots = nullptr;  // KV row of each token; -1: not kept
  RoutingBatch routing;
  bool pinned = false;  // all tokens are: nothing is routed, and linears read routing.max_level
  AttentionBatch attention;
};

// Scratch of a forward pass, sized once for the largest step. Between layers the hidden state is
// residual + delta.
struct Activations {
  static absl::StatusOr<Activations> Create(const ModelConfig& config, int max_tokens,
                                            Backend& backend);
  int max_tokens = 0;
  Tensor residual;            // [max_tokens, hidden_size]
  Tensor delta;               // [max_tokens, hidden_size]
  Tensor normed;              // [max_tokens, hidden_size]
  Tensor qkv;                 // [max_tokens, (heads + 2 kv_heads) head_dim]
  Tensor attention;           // [max_tokens, heads head_dim]
  Tensor gate_up;             // [max_tokens, 2 intermediate_size]
  Tensor swiglu;              // [max_tokens, intermediate_size]
  uint8_t* levels = nullptr;  // [layers, kNumLinearGroups, kMaxSegments, max_tokens]
  std::vector<Buffer> buffers;

  // A linear's, with what it chose the last time: the backend may take that for a guess.
  uint8_t* LevelsOf(int layer, LinearGroup group) const {
    const int64_t linear = int64_t{layer} * kNumLinearGroups + static_cast<int>(group);
    return levels + linear * kMaxSegments * max_tokens;
  }
};

// Sees the input of every linear group on the engine's thread: calibration and measurements.
class LinearObserver {
 public:
  virtual ~LinearObserver() = default;
  // x [num_tokens, in_features] in the backend's memory, valid after Synchronize during the call.
  // levels[segment * levels_stride + token], null for float weights.
  virtual void OnInput(int layer, LinearGroup group, Tensor x, const uint8_t* levels,
                       int64_t levels_stride) = 0;
};

class KvCache;

class Model {
 public:
  // Uploads the source's weights. Errors name the tensor; RESOURCE_EXHAUSTED, before anything is
  // read, says what does not fit. The source may go afterwards unless slices are to be restored.
  // max_positions 0: the configuration's.
  static absl::StatusOr<std::unique_ptr<Model>> Load(const WeightSource& source, Backend& backend,
                                                     int max_positions,
                                                     const ReadOptions& options = {});

  const ModelConfig& config() const { return config_; }
  Backend& backend() const { return backend_; }
  bool routed() const { return routed_; }
  int max_positions() const { return max_positions_; }
  size_t weight_bytes() const { return weight_bytes_; }
  // 16 x 128 tiles of all routed linears: level_tiles of a token over this is its mean level.
  int64_t routed_tiles() const { return routed_tiles_; }
  // Of all routed linears at a level.
  uint64_t routed_bytes(int level) const { return routed_bytes_[level - 1]; }
  // Ids the checkpoint names as the end of text.
  absl::Span<const int32_t> eos_token_ids() const { return config_.eos_token_ids; }

  // residual = embedding of the step's tokens.
  void Embed(const StepTensors& step, const Activations& act) const;
  // One decoder layer over the hidden state; writes its KV. add_delta false: the hidden state is
  // residual alone (the first layer).
  void RunLayer(const DecoderLayer& layer, int index, bool add_delta, const StepTensors& step,
                const KvCache& kv, const Activations& act, LinearObserver* observer) const;
  // The whole stack: the final hidden states, normalised, are left in act.normed.
  void Forward(const StepTensors& step, const KvCache& kv, const Activations& act,
               LinearObserver* observer = nullptr) const;
  // Set when lm_head is in slices.
  const std::optional<SlicedLmHead>& sliced_lm_head() const { return sliced_lm_head_; }
  // Elements from one row of logits to the next that Logits needs at least.
  int64_t logits_stride() const {
    return sliced_lm_head_.has_value() ? sliced_lm_head_->weight.rows : config_.vocab_size;
  }
  // logits [n, vocab_size] fp32 of n rows of normalised hidden states; what lies between the rows
  // is written, too. levels [n] of a sliced lm_head, in the backend's memory before the step; else
  // not looked at.
  void Logits(Tensor hidden, const uint8_t* levels, Tensor logits) const;

  const std::vector<DecoderLayer>& layers() const { return layers_; }
  // Steps may read the levels that are resident, no others.
  SlicePlanes& slice_planes() { return slice_planes_; }

 private:
  friend class ModelLoader;
  Model(const ModelConfig& config, Backend& backend) : config_(config), backend_(backend) {}

  void RunLinear(const Linear& linear, int layer, LinearGroup group, Tensor x,
                 const StepTensors& step, const Activations& act, Tensor out,
                 LinearObserver* observer) const;
  AttentionShape Shape(const KvCache& kv) const;

  ModelConfig config_;
  Backend& backend_;
  bool routed_ = false;
  int max_positions_ = 0;
  size_t weight_bytes_ = 0;
  int64_t routed_tiles_ = 0;
  std::array<uint64_t, kNumLevels> routed_bytes_ = {};
  Tensor embedding_;  // [vocab_size, hidden_size]
  Tensor lm_head_;    // [vocab_size, hidden_size]; the embedding when tied; none when in slices
  std::optional<SlicedLmHead> sliced_lm_head_;
  Tensor final_norm_;  // fp32 [1, hidden_size]
  RopeTable rope_;
  std::vector<DecoderLayer> layers_;
  std::vector<Buffer> buffers_;
  SlicePlanes slice_planes_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_MODEL_H_
