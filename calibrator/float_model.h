// A float model folder in fp32 on the host, block by block: what calibration reads. Only
// embeddings, final norm and head stay in memory. Values that are not finite are refused by tensor
// name. Immutable after Open; the checkpoint must outlive it. Thread-safe.
#ifndef MOBI_CALIBRATOR_FLOAT_MODEL_H_
#define MOBI_CALIBRATOR_FLOAT_MODEL_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/llama_block.h"
#include "calibrator/matrix.h"
#include "engine/checkpoint.h"

namespace mobi {

class FloatModel {
 public:
  // `positions`: the longest sequence that will be run. UNIMPLEMENTED names linears whose
  // in-features are not a multiple of the group; FAILED_PRECONDITION for a quantized folder.
  static absl::StatusOr<FloatModel> Open(const Checkpoint& checkpoint, int positions);

  const ModelConfig& config() const { return checkpoint_->config(); }
  const RopeValues& rope() const { return rope_; }
  int num_layers() const { return config().num_hidden_layers; }

  absl::StatusOr<BlockWeights> LoadBlock(int layer) const;

  // out [ids, hidden_size] = embedding rows.
  void Embed(absl::Span<const int32_t> ids, MatrixView out) const;
  // lm_head's weight, [vocab_size, hidden_size].
  const Matrix& head() const { return lm_head_.empty() ? embedding_ : lm_head_; }
  // What lm_head sees of the last block's output.
  void Normalise(ConstMatrixView hidden, MatrixView out) const;
  // logits [tokens, vocab_size] of the last block's output.
  void Logits(ConstMatrixView hidden, MatrixView logits) const;
  // d_hidden = gradient at the last block's output.
  void LogitsBackward(ConstMatrixView hidden, ConstMatrixView d_logits, MatrixView d_hidden) const;

 private:
  FloatModel() = default;

  const Checkpoint* checkpoint_ = nullptr;
  RopeValues rope_;
  Matrix embedding_;
  Matrix lm_head_;  // empty when tied
  std::vector<float> final_norm_;
  DeviceCopy head_copy_;
};

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_FLOAT_MODEL_H_
