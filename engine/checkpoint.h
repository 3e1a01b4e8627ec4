// An open model folder, float (as published on a model hub) or mobiquant (as mobi-calibrate writes
// it; engine/CHECKPOINT.md is the format). Opening maps the weights and checks that config, index,
// price table and tensor shapes agree, so that what opens can be loaded; it reads no weights.
// Owns the mappings: spans die with it. Immutable, safe from any thread.
#ifndef MOBI_ENGINE_CHECKPOINT_H_
#define MOBI_ENGINE_CHECKPOINT_H_

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/manifest.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"
#include "engine/weight_source.h"
#include "kernels/sliced_weight.h"
#include "nlohmann/json.hpp"

namespace mobi {

struct CheckpointOptions {
  bool verify_manifest = false;  // Verify, last
};

class Checkpoint final : public WeightSource {
 public:
  // NOT_FOUND, INVALID_ARGUMENT, UNIMPLEMENTED or DATA_LOSS with one line that names file, field
  // and reason.
  static absl::StatusOr<Checkpoint> Open(const std::string& dir, const CheckpointOptions& options);

  Checkpoint(Checkpoint&&) = default;
  Checkpoint& operator=(Checkpoint&&) = default;

  const std::string& dir() const { return dir_; }
  const std::string& name() const override { return dir_; }
  const ModelConfig& config() const override { return config_; }
  bool quantized() const override { return !quantization_config_.is_null(); }
  // config.json as parsed, and its "quantization_config" (null for a float folder).
  const nlohmann::json& config_json() const { return config_json_; }
  const nlohmann::json& quantization_config() const { return quantization_config_; }
  // Ascending bits, prices never rising. Empty for a float folder; coherent mode is optional.
  absl::Span<const PricePoint> price_table() const override { return price_table_; }
  absl::Span<const PricePoint> coherent_price_table() const override {
    return coherent_price_table_;
  }
  int coherent_batch() const override { return coherent_batch_; }  // 0: no coherent table
  std::optional<LmHeadLevels> lm_head() const override { return lm_head_; }

  bool Has(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }
  // NOT_FOUND names file and tensor; the second form also checks the shape (INVALID_ARGUMENT).
  absl::StatusOr<HostTensor> Tensor(std::string_view name) const;
  absl::StatusOr<HostTensor> Tensor(std::string_view name,
                                    absl::Span<const int64_t> shape) const override;
  // "model.layers.0.self_attn.q_proj". Reads the scales once: INVALID_ARGUMENT if one is not
  // finite.
  absl::StatusOr<SlicedTensors> Sliced(std::string_view linear, int64_t rows, int64_t cols) const;
  // "model.layers.0.self_attn.qkv_router". INVALID_ARGUMENT if a weight is not finite.
  absl::StatusOr<RouterTensors> RouterOf(std::string_view router, int num_segments,
                                         int64_t cols) const;
  // The two without a look at the values.
  absl::StatusOr<SlicedTensors> SlicedViews(std::string_view linear, int64_t rows,
                                            int64_t cols) const override;
  absl::StatusOr<RouterTensors> RouterViews(std::string_view router, int num_segments,
                                            int64_t cols) const override;

  // Streams the files of the weights, or, to verify, every file that MANIFEST names. Float folders
  // may lack a MANIFEST, then nothing is compared; mobiquant folders may not.
  absl::Status Read(absl::Span<const absl::Span<const std::byte>> views, const ReadOptions& options,
                    ViewSink sink) const override;

  void ReleasePages() const override;

  const std::vector<SafetensorsFile>& files() const { return files_; }
  // Files that MANIFEST covers and that were found to match; 0 when it was not verified.
  int verified_files() const { return verified_files_; }

 private:
  struct Entry {
    const HostTensor* tensor;
    const SafetensorsFile* file;
  };

  Checkpoint() = default;
  absl::Status ReadConfig();
  absl::Status ReadQuantizationConfig();
  absl::Status OpenTensors();
  absl::Status OpenShards(const std::string& index_path);
  absl::Status Verify();
  absl::Status CheckNames() const;
  absl::Status CheckTensors() const;
  absl::Status CheckLmHead() const;
  absl::Status CheckFloat(std::string_view name, absl::Span<const int64_t> shape) const;
  absl::Status Error(std::string_view name, std::string_view reason) const;
  // With this dtype and shape.
  absl::StatusOr<HostTensor> Typed(const std::string& name, DType dtype,
                                   absl::Span<const int64_t> shape) const;
  bool has_manifest() const;
  // Every byte of the weights' files, or of all that MANIFEST names and then compared with it.
  using FileSink = absl::FunctionRef<void(const SafetensorsFile& file, uint64_t offset,
                                          absl::Span<const std::byte> bytes)>;
  absl::Status StreamWeights(const StreamOptions& options, FileSink sink) const;
  absl::Status StreamListed(const StreamOptions& options, FileSink sink) const;
  std::vector<std::string> FilesRead() const;

  std::string dir_;
  ModelConfig config_;
  nlohmann::json config_json_;
  nlohmann::json quantization_config_;
  std::vector<PricePoint> price_table_;
  std::vector<PricePoint> coherent_price_table_;
  int coherent_batch_ = 0;
  std::optional<LmHeadLevels> lm_head_;  // set when it is in slices
  std::string weights_path_;             // the single file or the index
  std::vector<SafetensorsFile> files_;
  std::map<std::string, Entry, std::less<>> tensors_;  // pointing into files_
  int verified_files_ = 0;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_CHECKPOINT_H_
