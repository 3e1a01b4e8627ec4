// One Llama decoder block over whole sequences in fp32, forward and backward, as calibration needs
// it: any weights, no KV cache, the input of every linear in hand. Rows are the tokens of one or
// more sequences of `seq_len`, one after another. The serving forward pass is engine/model.h; a
// test holds the two together. Functions are pure and thread-safe; products use the BLAS threads
// that are set. Source: transformers' modeling_llama.
#ifndef MOBI_CALIBRATOR_LLAMA_BLOCK_H_
#define MOBI_CALIBRATOR_LLAMA_BLOCK_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/matrix.h"
#include "engine/model.h"
#include "engine/model_config.h"
#include "engine/rope.h"

namespace mobi {

// Weights [out_features, in_features] of the four groups: q, k, v stacked by rows; gate, up too.
struct BlockWeights {
  std::array<Matrix, kNumLinearGroups> linear;
  std::vector<float> input_norm;
  std::vector<float> post_attention_norm;

  const Matrix& of(LinearGroup group) const { return linear[static_cast<int>(group)]; }
  Matrix& of(LinearGroup group) { return linear[static_cast<int>(group)]; }
  // Of all linears, for products by many sequences.
  std::vector<DeviceCopy> DeviceCopies() const;
};

// out = x / rms(x) * weight.
void RmsNorm(ConstMatrixView x, const std::vector<float>& weight, float eps, MatrixView out);
// d_x += the gradient of RmsNorm.
void RmsNormBackward(ConstMatrixView x, const std::vector<float>& weight, float eps,
                     ConstMatrixView d_out, MatrixView d_x);

// out = silu(gate) * up;  gate_up [tokens, 2 intermediate].
void SwiGlu(ConstMatrixView gate_up, MatrixView out);
void SwiGluBackward(ConstMatrixView gate_up, ConstMatrixView d_out, MatrixView d_gate_up);

// What a backward pass needs of the forward pass of one block.
struct BlockTrace {
  Matrix input;       // residual stream entering the block
  Matrix normed;      // input of q, k, v
  Matrix qkv;         // rotated
  Matrix attention;   // input of o
  Matrix middle;      // residual stream between attention and MLP
  Matrix mlp_normed;  // input of gate, up
  Matrix gate_up;
  Matrix activation;  // input of down

  const Matrix& InputOf(LinearGroup group) const;
};

// out = the group's linears of x; whoever routes tokens to levels brings its own.
using LinearFn = absl::FunctionRef<void(LinearGroup group, ConstMatrixView x, MatrixView out)>;
// Sees a group's input and the loss's gradient at its output.
using LinearGradientFn =
    absl::FunctionRef<void(LinearGroup group, ConstMatrixView x, ConstMatrixView d_out)>;

// A block's fixed surroundings: what all passes over it share.
struct BlockContext {
  const ModelConfig& config;
  const RopeValues& rope;
  int64_t seq_len;
};

// out = attention within each sequence; qkv is rotated.
void Attend(const BlockContext& context, MatrixView qkv, MatrixView out);
// hidden [tokens, hidden_size] becomes the block's output. Bit for bit what the float stream of a
// calibration becomes (block_calibration.h).
void ForwardBlock(const BlockContext& context, const BlockWeights& weights, MatrixView hidden);
// The same through `linear`, keeping a trace. Norms are those of `weights`.
void TraceBlock(const BlockContext& context, const BlockWeights& weights, LinearFn linear,
                MatrixView hidden, BlockTrace& trace);
// d_hidden, the gradient at the block's output, becomes the one at its input. `linear_backward`
// computes d_x = d_out W for a group.
void BackwardBlock(const BlockContext& context, const BlockWeights& weights,
                   const BlockTrace& trace, LinearFn linear_backward, LinearGradientFn on_gradient,
                   MatrixView d_hidden);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_LLAMA_BLOCK_H_
