// Writes a mobiquant folder (engine/CHECKPOINT.md) beside a float one, last step of the calibrator:
// tensors are streamed into a folder DIR.partial-XXXXXX, which Commit completes, checks, syncs and
// renames to DIR. Until then DIR is untouched, and a writer that dies takes its partial folder
// along. Belongs to one thread; the source checkpoint must outlive it.
#ifndef MOBI_ENGINE_CHECKPOINT_WRITER_H_
#define MOBI_ENGINE_CHECKPOINT_WRITER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/checkpoint.h"
#include "engine/safetensors.h"
#include "nlohmann/json.hpp"

namespace mobi {

struct CheckpointWriterOptions {
  std::string output_dir;  // its parent must exist
  // Replace a mobiquant checkpoint that is there already. Anything else that is not an empty folder
  // is never replaced.
  bool overwrite = false;
  uint64_t max_shard_bytes = uint64_t{4} << 30;
};

class CheckpointWriter {
 public:
  // ALREADY_EXISTS: something is in the way at output_dir.
  static absl::StatusOr<std::unique_ptr<CheckpointWriter>> Create(
      const Checkpoint& source, const CheckpointWriterOptions& options);
  // Removes the partial folder unless Commit succeeded.
  ~CheckpointWriter();

  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  // RESOURCE_EXHAUSTED: the disk is full. Bytes are written when the call returns.
  absl::Status AddTensor(std::string_view name, DType dtype, absl::Span<const int64_t> shape,
                         absl::Span<const std::byte> bytes);
  // The slices and scales of "model.layers.0.self_attn.q_proj".
  absl::Status AddSliced(std::string_view linear, const SlicedTensors& tensors);
  // "model.layers.0.self_attn.qkv_router"; the names inside `tensors` are not looked at.
  absl::Status AddRouter(std::string_view router, const RouterTensors& tensors);
  // Embeddings and norms as they are in the source, and lm_head.weight unless it is tied or in
  // slices: then AddSliced(kLmHead, ...) adds them.
  absl::Status AddUnquantized(bool sliced_lm_head = false);

  // Completes the folder: config.json, tokenizer and generation files of the source, MANIFEST. The
  // keys given here ("price_table", "lm_head", "recipe", "calibration") join the fixed ones in
  // config.json's "quantization_config". Opens the result as a reader would before it takes its
  // name, so that what stands at output_dir can be loaded. Call once.
  absl::Status Commit(const nlohmann::json& quantization_config);

  const std::string& partial_dir() const { return partial_dir_; }

 private:
  CheckpointWriter(const Checkpoint& source, const CheckpointWriterOptions& options)
      : source_(source), options_(options) {}
  absl::Status StartShard();
  absl::Status FinishShard();
  absl::Status NameShards();
  absl::Status CopySourceFiles();
  absl::Status Publish();
  absl::Status Replace(const std::string& parent);

  struct Written {
    std::string tensor;
    size_t shard;
  };

  const Checkpoint& source_;
  const CheckpointWriterOptions options_;
  std::string output_dir_;   // options' without symbolic links and trailing slashes
  std::string partial_dir_;  // empty once it took its name
  std::optional<SafetensorsWriter> shard_;
  std::vector<std::string> shard_paths_;
  std::vector<Written> written_;
  uint64_t total_bytes_ = 0;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_CHECKPOINT_WRITER_H_
