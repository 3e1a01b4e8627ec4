#include "calibrator/llama_block.h"

#include <algorithm>
#include <cmath>

#include "calibrator/linear_algebra.h"
#include "calibrator/vector_math.h"

namespace mobi {
namespace {

// Query rows scored at once: keys behind the block's last row are never touched.
constexpr int64_t kQueryBlock = 256;

// Columns of one query head's q, k and v in a row of qkv.
struct HeadColumns {
  int64_t q, k, v;
};

HeadColumns ColumnsOf(const ModelConfig& config, int64_t head) {
  const int64_t kv = head / (config.num_attention_heads / config.num_key_value_heads);
  const int64_t heads = config.num_attention_heads, kv_heads = config.num_key_value_heads;
  return {head * config.head_dim, (heads + kv) * config.head_dim,
          (heads + kv_heads + kv) * config.head_dim};
}

// Causal softmax of scores[i, 0 .. first + i]; later keys get 0.
void CausalSoftmax(MatrixView scores, int64_t first) {
  for (int64_t i = 0; i < scores.rows; ++i) {
    const int64_t seen = first + i + 1;
    float* row = scores.Row(i);
    Scale(row, 1.0f / ExpMinusMax(row, seen), seen);
    std::fill(row + seen, row + scores.cols, 0.0f);
  }
}

float InverseRms(const float* x, int64_t cols, float eps) {
  return 1.0f / std::sqrt(DotProduct(x, x, cols) / static_cast<float>(cols) + eps);
}

float AttentionScale(const ModelConfig& config) {
  return 1.0f / std::sqrt(static_cast<float>(config.head_dim));
}

}  // namespace

std::vector<DeviceCopy> BlockWeights::DeviceCopies() const {
  std::vector<DeviceCopy> copies;
  copies.reserve(linear.size());
  for (const Matrix& matrix : linear) copies.emplace_back(matrix);
  return copies;
}

void RmsNorm(ConstMatrixView x, const std::vector<float>& weight, float eps, MatrixView out) {
  for (int64_t i = 0; i < x.rows; ++i) {
    const float* in = x.Row(i);
    const float scale = InverseRms(in, x.cols, eps);
    float* row = out.Row(i);
    for (int64_t j = 0; j < x.cols; ++j) row[j] = in[j] * scale * weight[j];
  }
}

void RmsNormBackward(ConstMatrixView x, const std::vector<float>& weight, float eps,
                     ConstMatrixView d_out, MatrixView d_x) {
  for (int64_t i = 0; i < x.rows; ++i) {
    const float* in = x.Row(i);
    const float* grad = d_out.Row(i);
    float* out = d_x.Row(i);
    const float scale = InverseRms(in, x.cols, eps);
    float along = 0;  // of the gradient at the normalised value, along x
    for (int64_t j = 0; j < x.cols; ++j) along += grad[j] * weight[j] * in[j];
    along *= scale * scale / static_cast<float>(x.cols);
    for (int64_t j = 0; j < x.cols; ++j) out[j] += scale * (grad[j] * weight[j] - along * in[j]);
  }
}

namespace {

// Rotates q and k of qkv [tokens, (heads + 2 kv_heads) head_dim] in place, each sequence from
// position 0. `direction` -1 turns back.
void Rotate(const ModelConfig& config, const RopeValues& rope, int64_t seq_len, MatrixView qkv,
            float direction = 1) {
  const int64_t half = config.head_dim / 2;
  for (int64_t t = 0; t < qkv.rows; ++t) {
    const float* cos = rope.cos.data() + t % seq_len * half;
    const float* sin = rope.sin.data() + t % seq_len * half;
    for (int64_t head = 0; head < config.num_attention_heads + config.num_key_value_heads; ++head) {
      float* x = qkv.Row(t) + head * config.head_dim;
      for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half], s = direction * sin[i];
        x[i] = a * cos[i] - b * s;
        x[i + half] = b * cos[i] + a * s;
      }
    }
  }
}

// Causal attention of one sequence; qkv is rotated already, out [tokens, heads * head_dim].
void CausalAttention(const ModelConfig& config, ConstMatrixView qkv, MatrixView out) {
  const int64_t tokens = qkv.rows, dim = config.head_dim;
  if (CausalAttentionOnDevice(qkv, config.num_attention_heads, config.num_key_value_heads,
                              AttentionScale(config), out)) {
    return;
  }
  Matrix scores(std::min(kQueryBlock, tokens), tokens);
  for (int64_t head = 0; head < config.num_attention_heads; ++head) {
    const HeadColumns at = ColumnsOf(config, head);
    for (int64_t first = 0; first < tokens; first += kQueryBlock) {
      const int64_t count = std::min(kQueryBlock, tokens - first), seen = first + count;
      const MatrixView block{scores.data(), count, seen, tokens};
      MultiplyTransposed(qkv.Columns(at.q, dim).Rows(first, count),
                         qkv.Columns(at.k, dim).Rows(0, seen), block, AttentionScale(config));
      CausalSoftmax(block, first);
      Multiply(block, qkv.Columns(at.v, dim).Rows(0, seen),
               out.Rows(first, count).Columns(head * dim, dim));
    }
  }
}

void CausalAttentionBackward(const ModelConfig& config, ConstMatrixView qkv, ConstMatrixView d_out,
                             MatrixView d_qkv) {
  const int64_t tokens = qkv.rows, dim = config.head_dim;
  const float scale = AttentionScale(config);
  for (int64_t t = 0; t < tokens; ++t) std::fill_n(d_qkv.Row(t), d_qkv.cols, 0.0f);
  Matrix scores(std::min(kQueryBlock, tokens), tokens);
  Matrix d_scores(std::min(kQueryBlock, tokens), tokens);
  for (int64_t head = 0; head < config.num_attention_heads; ++head) {
    const HeadColumns at = ColumnsOf(config, head);
    for (int64_t first = 0; first < tokens; first += kQueryBlock) {
      const int64_t count = std::min(kQueryBlock, tokens - first), seen = first + count;
      const MatrixView p{scores.data(), count, seen, tokens};
      const MatrixView d_p{d_scores.data(), count, seen, tokens};
      const ConstMatrixView q = qkv.Columns(at.q, dim).Rows(first, count);
      const ConstMatrixView k = qkv.Columns(at.k, dim).Rows(0, seen);
      const ConstMatrixView d_head = d_out.Columns(head * dim, dim).Rows(first, count);
      MultiplyTransposed(q, k, p, scale);
      CausalSoftmax(p, first);
      MultiplyTransposed(d_head, qkv.Columns(at.v, dim).Rows(0, seen), d_p);
      TransposedMultiply(p, d_head, d_qkv.Columns(at.v, dim).Rows(0, seen), 1, 1);
      for (int64_t i = 0; i < count; ++i) {
        float* row = d_p.Row(i);
        const float mean = DotProduct(row, p.Row(i), seen);
        for (int64_t j = 0; j < seen; ++j) row[j] = p.Row(i)[j] * (row[j] - mean);
      }
      Multiply(d_p, k, d_qkv.Columns(at.q, dim).Rows(first, count), scale, 1);
      TransposedMultiply(d_p, q, d_qkv.Columns(at.k, dim).Rows(0, seen), scale, 1);
    }
  }
}

}  // namespace

void SwiGlu(ConstMatrixView gate_up, MatrixView out) {
  if (SwiGluOnDevice(gate_up, out)) return;
  for (int64_t i = 0; i < gate_up.rows; ++i) {
    SiluTimes(gate_up.Row(i), gate_up.Row(i) + out.cols, out.Row(i), out.cols);
  }
}

void SwiGluBackward(ConstMatrixView gate_up, ConstMatrixView d_out, MatrixView d_gate_up) {
  for (int64_t i = 0; i < gate_up.rows; ++i) {
    SiluTimesBackward(gate_up.Row(i), gate_up.Row(i) + d_out.cols, d_out.Row(i), d_gate_up.Row(i),
                      d_gate_up.Row(i) + d_out.cols, d_out.cols);
  }
}

const Matrix& BlockTrace::InputOf(LinearGroup group) const {
  switch (group) {
    case LinearGroup::kQkv:
      return normed;
    case LinearGroup::kO:
      return attention;
    case LinearGroup::kGateUp:
      return mlp_normed;
    case LinearGroup::kDown:
      return activation;
  }
  return normed;
}

void Attend(const BlockContext& context, MatrixView qkv, MatrixView out) {
  Rotate(context.config, context.rope, context.seq_len, qkv);
  for (int64_t first = 0; first < qkv.rows; first += context.seq_len) {
    CausalAttention(context.config, ConstMatrixView(qkv).Rows(first, context.seq_len),
                    out.Rows(first, context.seq_len));
  }
}

void ForwardBlock(const BlockContext& context, const BlockWeights& weights, MatrixView hidden) {
  const ModelConfig& config = context.config;
  const int64_t tokens = hidden.rows;
  const auto times = [&](ConstMatrixView x, LinearGroup group) {
    Matrix out(tokens, weights.of(group).rows());
    MultiplyTransposed(x, weights.of(group), out);
    return out;
  };
  Matrix normed(tokens, hidden.cols), attention(tokens, config.attention_size());
  RmsNorm(hidden, weights.input_norm, config.rms_norm_eps, normed);
  Matrix qkv = times(normed, LinearGroup::kQkv);
  Attend(context, qkv, attention);
  MultiplyTransposed(attention, weights.of(LinearGroup::kO), hidden, 1, 1);
  RmsNorm(hidden, weights.post_attention_norm, config.rms_norm_eps, normed);
  Matrix activation(tokens, config.intermediate_size);
  SwiGlu(times(normed, LinearGroup::kGateUp), activation);
  MultiplyTransposed(activation, weights.of(LinearGroup::kDown), hidden, 1, 1);
}

void TraceBlock(const BlockContext& context, const BlockWeights& weights, LinearFn linear,
                MatrixView hidden, BlockTrace& trace) {
  const ModelConfig& config = context.config;
  const int64_t tokens = hidden.rows;
  const auto copy = [&](Matrix& out) {
    out = Matrix(tokens, hidden.cols);
    for (int64_t t = 0; t < tokens; ++t) std::copy_n(hidden.Row(t), hidden.cols, out.Row(t));
  };
  Matrix delta(tokens, hidden.cols);
  const auto add_delta = [&] {
    for (int64_t t = 0; t < tokens; ++t) AddScaled(hidden.Row(t), delta.Row(t), 1, hidden.cols);
  };
  copy(trace.input);
  trace.normed = Matrix(tokens, hidden.cols);
  RmsNorm(hidden, weights.input_norm, config.rms_norm_eps, trace.normed);
  trace.qkv = Matrix(tokens, weights.of(LinearGroup::kQkv).rows());
  linear(LinearGroup::kQkv, trace.normed, trace.qkv);
  trace.attention = Matrix(tokens, config.attention_size());
  Attend(context, trace.qkv, trace.attention);
  linear(LinearGroup::kO, trace.attention, delta);
  add_delta();
  copy(trace.middle);
  trace.mlp_normed = Matrix(tokens, hidden.cols);
  RmsNorm(hidden, weights.post_attention_norm, config.rms_norm_eps, trace.mlp_normed);
  trace.gate_up = Matrix(tokens, 2 * int64_t{config.intermediate_size});
  linear(LinearGroup::kGateUp, trace.mlp_normed, trace.gate_up);
  trace.activation = Matrix(tokens, config.intermediate_size);
  SwiGlu(trace.gate_up, trace.activation);
  linear(LinearGroup::kDown, trace.activation, delta);
  add_delta();
}

void BackwardBlock(const BlockContext& context, const BlockWeights& weights,
                   const BlockTrace& trace, LinearFn linear_backward, LinearGradientFn on_gradient,
                   MatrixView d_hidden) {
  const ModelConfig& config = context.config;
  const int64_t tokens = d_hidden.rows;
  // Shared by every group: report the gradient at the output, turn it into the one at the input.
  const auto through = [&](LinearGroup group, ConstMatrixView d_out) {
    const Matrix& x = trace.InputOf(group);
    on_gradient(group, x, d_out);
    Matrix d_x(tokens, x.cols());
    linear_backward(group, d_out, d_x);
    return d_x;
  };
  const Matrix d_activation = through(LinearGroup::kDown, d_hidden);
  Matrix d_gate_up(tokens, trace.gate_up.cols());
  SwiGluBackward(trace.gate_up, d_activation, d_gate_up);
  const Matrix d_mlp_normed = through(LinearGroup::kGateUp, d_gate_up);
  RmsNormBackward(trace.middle, weights.post_attention_norm, config.rms_norm_eps, d_mlp_normed,
                  d_hidden);
  const Matrix d_attention = through(LinearGroup::kO, d_hidden);
  Matrix d_qkv(tokens, trace.qkv.cols());
  for (int64_t first = 0; first < tokens; first += context.seq_len) {
    CausalAttentionBackward(config, ConstMatrixView(trace.qkv).Rows(first, context.seq_len),
                            ConstMatrixView(d_attention).Rows(first, context.seq_len),
                            MatrixView(d_qkv).Rows(first, context.seq_len));
  }
  Rotate(config, context.rope, context.seq_len, d_qkv, -1);
  const Matrix d_normed = through(LinearGroup::kQkv, d_qkv);
  RmsNormBackward(trace.input, weights.input_norm, config.rms_norm_eps, d_normed, d_hidden);
}

}  // namespace mobi
