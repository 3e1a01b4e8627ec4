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
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"
#include "kernels/sliced_weight.h"
#include "nlohmann/json.hpp"

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

struct CheckpointOptions {
  // Compare every file with MANIFEST's SHA-256 (reads everything). Float folders may lack a
  // MANIFEST, mobiquant folders may not.
  bool verify_manifest = false;
};

class Checkpoint {
 public:
  // NOT_FOUND, INVALID_ARGUMENT, UNIMPLEMENTED or DATA_LOSS with one line that names file, field
  // and reason.
  static absl::StatusOr<Checkpoint> Open(const std::string& dir, const CheckpointOptions& options);

  Checkpoint(Checkpoint&&) = default;
  Checkpoint& operator=(Checkpoint&&) = default;

  const std::string& dir() const { return dir_; }
  const ModelConfig& config() const { return config_; }
  bool quantized() const { return !quantization_config_.is_null(); }
  // config.json as parsed, and its "quantization_config" (null for a float folder).
  const nlohmann::json& config_json() const { return config_json_; }
  const nlohmann::json& quantization_config() const { return quantization_config_; }
  // Ascending bits, prices never rising. Empty for a float folder; coherent mode is optional.
  absl::Span<const PricePoint> price_table() const { return price_table_; }
  absl::Span<const PricePoint> coherent_price_table() const { return coherent_price_table_; }
  int coherent_batch() const { return coherent_batch_; }  // 0: no coherent table

  bool Has(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }
  // NOT_FOUND names file and tensor; the second form also checks the shape (INVALID_ARGUMENT).
  absl::StatusOr<HostTensor> Tensor(std::string_view name) const;
  absl::StatusOr<HostTensor> Tensor(std::string_view name, absl::Span<const int64_t> shape) const;
  // "model.layers.0.self_attn.q_proj". Reads the scales once: INVALID_ARGUMENT if one is not
  // finite.
  absl::StatusOr<SlicedTensors> Sliced(std::string_view linear, int64_t rows, int64_t cols) const;
  // "model.layers.0.self_attn.qkv_router". INVALID_ARGUMENT if a weight is not finite.
  absl::StatusOr<RouterTensors> RouterOf(std::string_view router, int num_segments,
                                         int64_t cols) const;

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
  absl::Status CheckNames() const;
  absl::Status CheckTensors() const;
  absl::Status CheckFloat(std::string_view name, absl::Span<const int64_t> shape) const;
  absl::Status Error(std::string_view name, std::string_view reason) const;
  // With this dtype and shape.
  absl::StatusOr<HostTensor> Typed(const std::string& name, DType dtype,
                                   absl::Span<const int64_t> shape) const;
  // Sliced and RouterOf without a look at the values.
  absl::StatusOr<SlicedTensors> SlicedViews(std::string_view linear, int64_t rows,
                                            int64_t cols) const;
  absl::StatusOr<RouterTensors> RouterViews(std::string_view router, int num_segments,
                                            int64_t cols) const;
  std::vector<std::string> FilesRead() const;

  std::string dir_;
  ModelConfig config_;
  nlohmann::json config_json_;
  nlohmann::json quantization_config_;
  std::vector<PricePoint> price_table_;
  std::vector<PricePoint> coherent_price_table_;
  int coherent_batch_ = 0;
  std::string weights_path_;  // the single file or the index
  std::vector<SafetensorsFile> files_;
  std::map<std::string, Entry, std::less<>> tensors_;  // pointing into files_
  int verified_files_ = 0;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_CHECKPOINT_H_
