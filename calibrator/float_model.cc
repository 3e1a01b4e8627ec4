#include "calibrator/float_model.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "calibrator/linear_algebra.h"
#include "engine/base/status_macros.h"
#include "kernels/numeric.h"

namespace mobi {
namespace {

absl::Status Decode(const HostTensor& tensor, const std::string& dir, float* out) {
  const auto count = static_cast<size_t>(tensor.num_elements());
  switch (tensor.dtype) {
    case DType::kF32:
      std::memcpy(out, tensor.bytes.data(), count * sizeof(float));
      break;
    case DType::kF16:
      for (size_t i = 0; i < count; ++i) out[i] = HalfToFloat(tensor.As<uint16_t>()[i]);
      break;
    case DType::kBF16:
      for (size_t i = 0; i < count; ++i) out[i] = BFloat16ToFloat(tensor.As<uint16_t>()[i]);
      break;
    default:
      return absl::InvalidArgumentError(absl::StrCat(dir, ": tensor ", tensor.name, " is ",
                                                     std::string(Name(tensor.dtype)),
                                                     ", not a float type"));
  }
  for (size_t i = 0; i < count; ++i) {
    if (!std::isfinite(out[i])) {
      return absl::InvalidArgumentError(absl::StrCat(dir, ": tensor ", tensor.name, " holds ",
                                                     std::isnan(out[i]) ? "NaN" : "infinity",
                                                     " at element ", i));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Matrix> ReadMatrix(const Checkpoint& checkpoint, const std::string& name,
                                  int64_t rows, int64_t cols) {
  MOBI_ASSIGN_OR_RETURN(const HostTensor tensor, checkpoint.Tensor(name, {rows, cols}));
  Matrix out(rows, cols);
  MOBI_RETURN_IF_ERROR(Decode(tensor, checkpoint.dir(), out.data()));
  return out;
}

absl::StatusOr<std::vector<float>> ReadVector(const Checkpoint& checkpoint, const std::string& name,
                                              int64_t size) {
  MOBI_ASSIGN_OR_RETURN(const HostTensor tensor, checkpoint.Tensor(name, {size}));
  std::vector<float> out(static_cast<size_t>(size));
  MOBI_RETURN_IF_ERROR(Decode(tensor, checkpoint.dir(), out.data()));
  return out;
}

absl::Status CheckGroups(const Checkpoint& checkpoint) {
  for (const RoutedGroup& group : RoutedGroupsOfLayer(checkpoint.config(), 0)) {
    for (const LinearShape& linear : group.linears) {
      if (linear.cols % kGroupSize == 0 && linear.rows % kTileRows == 0) continue;
      return absl::UnimplementedError(absl::StrCat(
          checkpoint.dir(), ": ", linear.name, " is ", linear.rows, " x ", linear.cols,
          "; in-features must be a multiple of ", kGroupSize, ", out-features of ", kTileRows));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<FloatModel> FloatModel::Open(const Checkpoint& checkpoint, int positions) {
  if (checkpoint.quantized()) {
    return absl::FailedPreconditionError(
        absl::StrCat(checkpoint.dir(), ": already quantized; calibration needs the float model"));
  }
  const ModelConfig& config = checkpoint.config();
  MOBI_RETURN_IF_ERROR(CheckGroups(checkpoint));
  FloatModel model;
  model.checkpoint_ = &checkpoint;
  model.rope_ = ComputeRope(config, positions);
  MOBI_ASSIGN_OR_RETURN(model.embedding_, ReadMatrix(checkpoint, "model.embed_tokens.weight",
                                                     config.vocab_size, config.hidden_size));
  if (!config.tie_word_embeddings) {
    MOBI_ASSIGN_OR_RETURN(model.lm_head_, ReadMatrix(checkpoint, "lm_head.weight",
                                                     config.vocab_size, config.hidden_size));
  }
  MOBI_ASSIGN_OR_RETURN(model.final_norm_,
                        ReadVector(checkpoint, "model.norm.weight", config.hidden_size));
  model.head_copy_ = DeviceCopy(model.head());
  return model;
}

absl::StatusOr<BlockWeights> FloatModel::LoadBlock(int layer) const {
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  const int64_t hidden = config().hidden_size;
  BlockWeights block;
  MOBI_ASSIGN_OR_RETURN(block.input_norm,
                        ReadVector(*checkpoint_, prefix + "input_layernorm.weight", hidden));
  MOBI_ASSIGN_OR_RETURN(
      block.post_attention_norm,
      ReadVector(*checkpoint_, prefix + "post_attention_layernorm.weight", hidden));
  const auto groups = RoutedGroupsOfLayer(config(), layer);
  for (int g = 0; g < kNumLinearGroups; ++g) {
    int64_t rows = 0;
    for (const LinearShape& linear : groups[g].linears) rows += linear.rows;
    Matrix& stacked = block.linear[g];
    stacked = Matrix(rows, groups[g].linears.front().cols);
    int64_t at = 0;
    for (const LinearShape& linear : groups[g].linears) {
      MOBI_ASSIGN_OR_RETURN(const Matrix part, ReadMatrix(*checkpoint_, linear.name + ".weight",
                                                          linear.rows, linear.cols));
      std::copy_n(part.data(), part.size(), stacked.Row(at));
      at += linear.rows;
    }
  }
  return block;
}

void FloatModel::Embed(absl::Span<const int32_t> ids, MatrixView out) const {
  for (size_t i = 0; i < ids.size(); ++i) {
    std::copy_n(embedding_.Row(ids[i]), embedding_.cols(), out.Row(static_cast<int64_t>(i)));
  }
}

void FloatModel::Normalise(ConstMatrixView hidden, MatrixView out) const {
  RmsNorm(hidden, final_norm_, config().rms_norm_eps, out);
}

void FloatModel::Logits(ConstMatrixView hidden, MatrixView logits) const {
  Matrix normed(hidden.rows, hidden.cols);
  Normalise(hidden, normed);
  MultiplyTransposed(normed, head(), logits);
}

void FloatModel::LogitsBackward(ConstMatrixView hidden, ConstMatrixView d_logits,
                                MatrixView d_hidden) const {
  Matrix d_normed(hidden.rows, hidden.cols);
  Multiply(d_logits, head(), d_normed);
  for (int64_t t = 0; t < d_hidden.rows; ++t) std::fill_n(d_hidden.Row(t), d_hidden.cols, 0.0f);
  RmsNormBackward(hidden, final_norm_, config().rms_norm_eps, d_normed, d_hidden);
}

}  // namespace mobi
