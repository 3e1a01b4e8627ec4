#include "engine/model.h"

#include <initializer_list>
#include <string>
#include <utility>

#include "engine/base/status_macros.h"
#include "engine/kv_cache.h"

namespace mobi {

absl::StatusOr<Activations> Activations::Create(const ModelConfig& config, int max_tokens,
                                                Backend& backend) {
  Activations act;
  act.max_tokens = max_tokens;
  const DType dtype = backend.activation_dtype();
  const int64_t heads = int64_t{config.num_attention_heads} * config.head_dim;
  const int64_t kv_heads = int64_t{config.num_key_value_heads} * config.head_dim;
  const std::initializer_list<std::pair<Tensor*, int64_t>> tensors = {
      {&act.residual, config.hidden_size},
      {&act.delta, config.hidden_size},
      {&act.normed, config.hidden_size},
      {&act.qkv, heads + 2 * kv_heads},
      {&act.attention, heads},
      {&act.gate_up, int64_t{2} * config.intermediate_size},
      {&act.swiglu, config.intermediate_size}};
  for (const auto& [tensor, cols] : tensors) {
    MOBI_ASSIGN_OR_RETURN(
        Buffer buffer,
        backend.Allocate(static_cast<size_t>(max_tokens * cols) * SizeOf(dtype), "activations"));
    *tensor = Tensor::Of(buffer.data(), dtype, max_tokens, cols);
    act.buffers.push_back(std::move(buffer));
  }
  const int64_t linears = int64_t{config.num_hidden_layers} * kNumLinearGroups;
  const auto level_bytes = static_cast<size_t>(linears * kMaxSegments * max_tokens);
  MOBI_ASSIGN_OR_RETURN(Buffer levels, backend.Allocate(level_bytes, "levels"));
  backend.Zero(levels.data(), level_bytes);
  act.levels = levels.As<uint8_t>();
  act.buffers.push_back(std::move(levels));
  return act;
}

AttentionShape Model::Shape(const KvCache& kv) const {
  return {config_.num_attention_heads, config_.num_key_value_heads, config_.head_dim,
          kv.block_size()};
}

void Model::Embed(const StepTensors& step, const Activations& act) const {
  backend_.Embed(embedding_, step.token_ids, act.residual.FirstRows(step.num_tokens));
}

void Model::RunLinear(const Linear& linear, int layer, LinearGroup group, Tensor x,
                      const StepTensors& step, const Activations& act, Tensor out,
                      LinearObserver* observer) const {
  const uint8_t* levels = nullptr;
  int64_t stride = act.max_tokens;
  if (linear.routed.has_value() && step.pinned) {
    levels = step.routing.max_level;
    stride = 0;  // the same for all segments
  } else if (linear.routed.has_value()) {
    uint8_t* const chosen = act.LevelsOf(layer, group);
    backend_.Route(x, *linear.routed, step.routing, chosen, stride);
    levels = chosen;
  }
  if (observer != nullptr) observer->OnInput(layer, group, x, levels, stride);
  if (linear.routed.has_value()) {
    backend_.SlicedMatmul(x, linear.routed->weight, levels, stride, out);
  } else {
    backend_.DenseMatmul(x, linear.dense, out);
  }
}

void Model::RunLayer(const DecoderLayer& layer, int index, bool add_delta, const StepTensors& step,
                     const KvCache& kv, const Activations& act, LinearObserver* observer) const {
  const int n = step.num_tokens;
  const float eps = config_.rms_norm_eps;
  const Tensor residual = act.residual.FirstRows(n), delta = act.delta.FirstRows(n);
  const Tensor normed = act.normed.FirstRows(n), qkv = act.qkv.FirstRows(n);
  const Tensor attention = act.attention.FirstRows(n), gate_up = act.gate_up.FirstRows(n);
  const Tensor swiglu = act.swiglu.FirstRows(n);
  const auto linear = [&](LinearGroup group, Tensor x, Tensor out) {
    RunLinear(layer.at(group), index, group, x, step, act, out, observer);
  };

  if (add_delta) {
    backend_.AddRmsNorm(delta, layer.input_norm, eps, residual, normed);
  } else {
    backend_.RmsNorm(residual, layer.input_norm, eps, normed);
  }
  linear(LinearGroup::kQkv, normed, qkv);
  const AttentionShape shape = Shape(kv);
  backend_.RopeAndWriteKv(qkv, rope_, step.positions, step.slots, shape, kv.layer(index));
  backend_.Attention(qkv.Columns(0, attention.cols), kv.layer(index), step.attention, shape,
                     attention);
  linear(LinearGroup::kO, attention, delta);
  backend_.AddRmsNorm(delta, layer.post_attention_norm, eps, residual, normed);
  linear(LinearGroup::kGateUp, normed, gate_up);
  backend_.SwiGlu(gate_up, swiglu);
  linear(LinearGroup::kDown, swiglu, delta);
}

void Model::Forward(const StepTensors& step, const KvCache& kv, const Activations& act,
                    LinearObserver* observer) const {
  Embed(step, act);
  for (int i = 0; i < config_.num_hidden_layers; ++i) {
    RunLayer(layers_[i], i, /*add_delta=*/i > 0, step, kv, act, observer);
  }
  const int n = step.num_tokens;
  backend_.AddRmsNorm(act.delta.FirstRows(n), final_norm_, config_.rms_norm_eps,
                      act.residual.FirstRows(n), act.normed.FirstRows(n));
}

void Model::Logits(Tensor hidden, const uint8_t* levels, Tensor logits) const {
  if (sliced_lm_head_.has_value()) {
    logits.cols = sliced_lm_head_->weight.rows;  // with the padding of the vocabulary
    backend_.SlicedMatmul(hidden, sliced_lm_head_->weight, levels, /*levels_stride=*/0, logits);
  } else {
    backend_.DenseMatmul(hidden, lm_head_, logits);
  }
}

}  // namespace mobi
