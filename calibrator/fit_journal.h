// Finished blocks, and pieces of lm_head, on disk beside the output, so that a calibration that was
// interrupted goes on behind the last of them: OUT.progress/ holds one safetensors file per block
// or piece and stage and the key of the run they belong to. A file is there whole or not at all.
// Belongs to one thread.
#ifndef MOBI_CALIBRATOR_FIT_JOURNAL_H_
#define MOBI_CALIBRATOR_FIT_JOURNAL_H_

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "calibrator/block_calibration.h"

namespace mobi {

class FitJournal {
 public:
  // Blocks of a run with another `key` are thrown away. Nothing is created yet.
  static absl::StatusOr<FitJournal> Open(const std::string& output_dir, std::string key);

  // The block as it was saved; nothing when it was not, or when what is there cannot be read.
  // `shapes` are the groups' [rows, cols].
  std::optional<FittedBlock> Load(std::string_view stage, int layer,
                                  const ModelConfig& config) const;
  // RESOURCE_EXHAUSTED: the disk is full.
  absl::Status Save(std::string_view stage, int layer, const FittedBlock& block);
  // The same for one weight: a piece of lm_head.
  std::optional<NestedWeight> LoadWeight(std::string_view stage, int piece, int64_t rows,
                                         int64_t cols) const;
  absl::Status SaveWeight(std::string_view stage, int piece, const NestedWeight& weight);
  // Removes the folder: the run is done, or can never be.
  void Remove();

 private:
  FitJournal(std::string dir, std::string key) : dir_(std::move(dir)), key_(std::move(key)) {}
  using NamedWeights = absl::Span<const std::pair<const char*, const NestedWeight*>>;
  std::string PathOf(std::string_view stage, int index) const;
  absl::Status Write(const std::string& path, NamedWeights weights);

  std::string dir_;
  std::string key_;
};

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_FIT_JOURNAL_H_
