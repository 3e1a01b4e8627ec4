// What a model folder holds, for a person or a script: behind mobi-inspect. Beside both walks;
// reads a folder as the server does, adds nothing to it. Pure functions of the folder.
#ifndef MOBI_CALIBRATOR_INSPECT_H_
#define MOBI_CALIBRATOR_INSPECT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/checkpoint.h"
#include "nlohmann/json.hpp"

namespace mobi {

struct FolderReport {
  std::string dir;
  bool quantized = false;
  ModelConfig config;
  int64_t parameters = 0;         // embeddings, norms and linears; routers are no parameters
  int64_t linear_parameters = 0;  // of the decoder's linears alone
  // What the weight files hold, in the order of the walk: "slice 1", "scales 1", "routers", ...
  std::vector<std::pair<std::string, uint64_t>> bytes;
  uint64_t total_bytes = 0;
  std::vector<std::pair<std::string, uint64_t>> files;  // with tensors
  std::vector<PricePoint> price_table;
  std::vector<PricePoint> coherent_price_table;
  int coherent_batch = 0;
  std::optional<LmHeadLevels> lm_head;  // set when it is in slices
  nlohmann::json recipe;                // null when the folder does not say
  nlohmann::json calibration;           // null when the folder does not say
  // Files whose checksum was compared: 0 for a folder without MANIFEST, nothing when not asked for.
  std::optional<int> verified_files;
};

// With `verify`, all of the folder is read: checksums of MANIFEST, and that scales and routers are
// finite. Errors as Checkpoint::Open's.
absl::StatusOr<FolderReport> InspectFolder(const std::string& dir, bool verify);

std::string ReportAsText(const FolderReport& report);
nlohmann::json ReportAsJson(const FolderReport& report);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_INSPECT_H_
