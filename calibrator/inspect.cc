#include "calibrator/inspect.h"

#include <algorithm>
#include <map>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

using nlohmann::json;

int64_t LinearParameters(const ModelConfig& config) {
  int64_t count = 0;
  for (const RoutedGroup& group : RoutedGroupsOfLayer(config, 0)) {
    for (const LinearShape& linear : group.linears) count += linear.rows * linear.cols;
  }
  return count * config.num_hidden_layers;
}

int64_t OtherParameters(const ModelConfig& config) {
  const int64_t hidden = config.hidden_size;
  const int64_t tables = config.tie_word_embeddings ? 1 : 2;
  return tables * config.vocab_size * hidden + (2 * config.num_hidden_layers + 1) * hidden;
}

// Which line of the report a tensor's bytes belong to.
std::string PartOf(const std::string& tensor) {
  if (absl::StartsWith(tensor, "lm_head.")) return "lm_head";  // in slices or not
  const std::string last = tensor.substr(tensor.rfind('.') + 1);
  if (absl::StartsWith(last, "slice_")) return absl::StrCat("slice ", last.back() - '0' + 1);
  if (absl::StartsWith(last, "scales_")) return absl::StrCat("scales ", last.substr(7));
  if (absl::StrContains(tensor, "_router.")) return "routers";
  if (absl::StrContains(tensor, "norm.")) return "norms";
  if (absl::StartsWith(tensor, "model.embed_tokens.")) return "embeddings";
  return absl::StrContains(tensor, "_proj.") ? "linears" : "other";
}

constexpr const char* kParts[] = {"linears",  "slice 1",    "slice 2",  "slice 3",  "slice 4",
                                  "scales 1", "scales 2",   "scales 3", "scales 4", "routers",
                                  "norms",    "embeddings", "lm_head",  "other"};

absl::Status CheckFinite(const Checkpoint& checkpoint) {
  const ModelConfig& config = checkpoint.config();
  if (checkpoint.lm_head().has_value()) {
    MOBI_RETURN_IF_ERROR(
        checkpoint.Sliced(kLmHead, config.vocab_size, config.hidden_size).status());
  }
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    for (const RoutedGroup& group : RoutedGroupsOfLayer(config, layer)) {
      for (const LinearShape& linear : group.linears) {
        MOBI_RETURN_IF_ERROR(checkpoint.Sliced(linear.name, linear.rows, linear.cols).status());
      }
      MOBI_RETURN_IF_ERROR(
          checkpoint
              .RouterOf(group.router, static_cast<int>(group.linears.size()), group.linears[0].cols)
              .status());
    }
  }
  return absl::OkStatus();
}

// 27795968 as 27,795,968.
std::string Grouped(uint64_t value) {
  const std::string digits = absl::StrCat(value);
  std::string grouped;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) grouped += ',';
    grouped += digits[i];
  }
  return grouped;
}

std::string ModelLine(const ModelConfig& config) {
  return absl::StrFormat(
      "llama, %d layers, hidden_size %d, intermediate_size %d, %d heads of %d, %d key-value heads, "
      "vocab_size %d, context %d%s",
      config.num_hidden_layers, config.hidden_size, config.intermediate_size,
      config.num_attention_heads, config.head_dim, config.num_key_value_heads, config.vocab_size,
      config.max_position_embeddings, config.tie_word_embeddings ? ", tied embeddings" : "");
}

std::string RopeLine(const ModelConfig& config) {
  std::string line = absl::StrFormat("theta %g", config.rope_theta);
  if (config.rope_scaling) {
    absl::StrAppendFormat(&line, ", llama3 scaling by %g from %d positions",
                          config.rope_scaling->factor,
                          config.rope_scaling->original_max_position_embeddings);
  }
  return line;
}

std::string PriceLine(const std::vector<PricePoint>& table) {
  return absl::StrFormat("%d points, %.2f bits at %.3g to %.2f bits at %.3g", table.size(),
                         table.front().bits, table.front().price, table.back().bits,
                         table.back().price);
}

std::string LmHeadLine(const LmHeadLevels& lm_head) {
  return absl::StrFormat(
      "in slices, read at level %d and up; a token loses %s nats at levels 1 to 4",
      lm_head.min_level, absl::StrJoin(lm_head.loss, ", ", [](std::string* out, float loss) {
        absl::StrAppendFormat(out, "%.3g", loss);
      }));
}

std::string ManifestLine(const FolderReport& report) {
  if (!report.verified_files) return "not checked";
  if (*report.verified_files == 0) return "none";
  return absl::StrFormat("%d files match", *report.verified_files);
}

json PriceJson(const std::vector<PricePoint>& table) {
  json points = json::array();
  for (const PricePoint& point : table) points.push_back({point.bits, point.price});
  return points;
}

json ConfigJson(const ModelConfig& config) {
  json object = {{"vocab_size", config.vocab_size},
                 {"hidden_size", config.hidden_size},
                 {"intermediate_size", config.intermediate_size},
                 {"num_hidden_layers", config.num_hidden_layers},
                 {"num_attention_heads", config.num_attention_heads},
                 {"num_key_value_heads", config.num_key_value_heads},
                 {"head_dim", config.head_dim},
                 {"max_position_embeddings", config.max_position_embeddings},
                 {"rms_norm_eps", config.rms_norm_eps},
                 {"rope_theta", config.rope_theta},
                 {"tie_word_embeddings", config.tie_word_embeddings},
                 {"bos_token_id", config.bos_token_id},
                 {"eos_token_id", config.eos_token_ids}};
  if (config.rope_scaling) {
    object["rope_scaling"] = {{"rope_type", "llama3"},
                              {"factor", config.rope_scaling->factor},
                              {"low_freq_factor", config.rope_scaling->low_freq_factor},
                              {"high_freq_factor", config.rope_scaling->high_freq_factor},
                              {"original_max_position_embeddings",
                               config.rope_scaling->original_max_position_embeddings}};
  }
  return object;
}

}  // namespace

absl::StatusOr<FolderReport> InspectFolder(const std::string& dir, bool verify) {
  MOBI_ASSIGN_OR_RETURN(const Checkpoint checkpoint,
                        Checkpoint::Open(dir, {.verify_manifest = verify}));
  if (verify && checkpoint.quantized()) MOBI_RETURN_IF_ERROR(CheckFinite(checkpoint));
  FolderReport report;
  report.dir = checkpoint.dir();
  report.quantized = checkpoint.quantized();
  report.config = checkpoint.config();
  report.linear_parameters = LinearParameters(report.config);
  report.parameters = report.linear_parameters + OtherParameters(report.config);
  std::map<std::string, uint64_t> bytes;
  for (const SafetensorsFile& file : checkpoint.files()) {
    uint64_t file_bytes = 0;
    for (const HostTensor& tensor : file.tensors()) {
      bytes[PartOf(tensor.name)] += tensor.bytes.size();
      file_bytes += tensor.bytes.size();
    }
    report.files.emplace_back(file.path().substr(file.path().rfind('/') + 1), file_bytes);
    report.total_bytes += file_bytes;
  }
  for (const char* part : kParts) {
    if (bytes.contains(part)) report.bytes.emplace_back(part, bytes[part]);
  }
  const auto copy = [](absl::Span<const PricePoint> table) {
    return std::vector<PricePoint>(table.begin(), table.end());
  };
  report.price_table = copy(checkpoint.price_table());
  report.coherent_price_table = copy(checkpoint.coherent_price_table());
  report.coherent_batch = checkpoint.coherent_batch();
  report.lm_head = checkpoint.lm_head();
  if (report.quantized) {
    report.recipe = checkpoint.quantization_config().value("recipe", json());
    report.calibration = checkpoint.quantization_config().value("calibration", json());
  }
  if (verify) report.verified_files = checkpoint.verified_files();
  return report;
}

std::string ReportAsText(const FolderReport& report) {
  std::string text = absl::StrFormat("%s: %s model folder\n", report.dir,
                                     report.quantized ? "mobiquant" : "float");
  const auto line = [&text](std::string_view key, std::string_view value) {
    absl::StrAppendFormat(&text, "  %-15s %s\n", key, value);
  };
  line("model", ModelLine(report.config));
  line("rope", RopeLine(report.config));
  line("parameters", absl::StrFormat("%s, of which linears %s", Grouped(report.parameters),
                                     Grouped(report.linear_parameters)));
  for (const auto& [file, bytes] : report.files) line(file, Grouped(bytes) + " bytes");
  for (const auto& [part, bytes] : report.bytes) {
    const double bits =
        8.0 * static_cast<double>(bytes) / static_cast<double>(report.linear_parameters);
    line(absl::StrCat("  ", part),
         absl::StrFormat("%15s bytes, %6.3f bits per linear weight", Grouped(bytes), bits));
  }
  if (report.quantized) {
    line("price table", PriceLine(report.price_table));
    if (report.coherent_batch > 0) {
      line("coherent", absl::StrFormat("batch %d, %s", report.coherent_batch,
                                       PriceLine(report.coherent_price_table)));
    }
    if (report.lm_head.has_value()) line("lm_head", LmHeadLine(*report.lm_head));
    line("recipe", report.recipe.is_null() ? "not recorded" : report.recipe.dump());
    line("calibration", report.calibration.is_null() ? "not recorded" : report.calibration.dump());
  }
  line("manifest", ManifestLine(report));
  return text;
}

json ReportAsJson(const FolderReport& report) {
  json object = {{"dir", report.dir},
                 {"kind", report.quantized ? "mobiquant" : "float"},
                 {"config", ConfigJson(report.config)},
                 {"parameters", report.parameters},
                 {"linear_parameters", report.linear_parameters},
                 {"total_bytes", report.total_bytes},
                 {"bytes", json::object()},
                 {"files", json::object()},
                 {"manifest_files", nullptr}};
  for (const auto& [part, bytes] : report.bytes) object["bytes"][part] = bytes;
  for (const auto& [file, bytes] : report.files) object["files"][file] = bytes;
  if (report.verified_files) object["manifest_files"] = *report.verified_files;
  if (!report.quantized) return object;
  object["price_table"]["token"] = PriceJson(report.price_table);
  if (report.coherent_batch > 0) {
    object["price_table"]["coherent"] = {{"batch", report.coherent_batch},
                                         {"table", PriceJson(report.coherent_price_table)}};
  }
  if (report.lm_head.has_value()) {
    object["lm_head"] = {{"min_level", report.lm_head->min_level}, {"loss", report.lm_head->loss}};
  }
  object["recipe"] = report.recipe;
  object["calibration"] = report.calibration;
  return object;
}

}  // namespace mobi
