#include "engine/checkpoint_writer.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_format.h"
#include "engine/base/file_writer.h"
#include "engine/base/json.h"
#include "engine/base/mapped_file.h"
#include "engine/base/status_macros.h"
#include "engine/manifest.h"

namespace mobi {
namespace {

namespace fs = std::filesystem;

// Copied unchanged where the source has them: tokenizer, defaults for generation, licence.
constexpr const char* kCopiedFiles[] = {"tokenizer.json",
                                        "tokenizer_config.json",
                                        "special_tokens_map.json",
                                        "chat_template.jinja",
                                        "generation_config.json",
                                        "LICENSE",
                                        "LICENSE.txt",
                                        "NOTICE"};
// One tensor in a safetensors header, with room to spare.
constexpr uint64_t kHeaderBytesPerTensor = 160;
constexpr uint64_t kMaxHeaderBytes = kMaxSafetensorsHeaderBytes / 2;

std::string Dump(const nlohmann::json& value) {
  return value.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

template <typename T>
absl::Span<const std::byte> BytesOf(absl::Span<const T> values) {
  return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)};
}

absl::StatusOr<std::string> Resolve(const std::string& dir) {
  std::error_code error;
  std::string path = fs::weakly_canonical(fs::absolute(dir, error), error).string();
  if (error) return absl::ErrnoToStatus(error.value(), dir);
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

// True for a folder that this program wrote and may therefore replace.
bool IsMobiquantFolder(const std::string& dir) {
  const std::string path = dir + "/config.json";
  const auto file = MappedFile::Open(path, JsonLimits{}.max_bytes);
  if (!file.ok()) return false;
  const auto config = ParseJson(file->text(), path);
  if (!config.ok() || !config->is_object()) return false;
  const auto quantization = config->find("quantization_config");
  return quantization != config->end() && quantization->is_object() &&
         quantization->value("quant_method", nlohmann::json()) == "mobiquant";
}

absl::Status CheckOutput(const std::string& dir, bool overwrite) {
  std::error_code error;
  const fs::file_status status = fs::status(dir, error);
  if (status.type() == fs::file_type::not_found) return absl::OkStatus();
  if (error) return absl::ErrnoToStatus(error.value(), dir);
  if (status.type() != fs::file_type::directory) {
    return absl::AlreadyExistsError(dir + ": exists and is not a folder");
  }
  const bool empty = fs::is_empty(dir, error);
  if (error) return absl::ErrnoToStatus(error.value(), dir);
  if (empty) return absl::OkStatus();
  if (!IsMobiquantFolder(dir)) {
    return absl::AlreadyExistsError(dir + ": not empty and not a mobiquant checkpoint");
  }
  if (!overwrite) {
    return absl::AlreadyExistsError(dir +
                                    ": holds a checkpoint, and overwriting was not asked for");
  }
  return absl::OkStatus();
}

// Slices and scales of every linear, routers, norms, embeddings, lm_head.
uint64_t HeaderCapacity(const ModelConfig& config) {
  uint64_t per_layer = 2;
  for (const RoutedGroup& group : RoutedGroupsOfLayer(config, 0)) {
    per_layer += 5 + group.linears.size() * (kNumSlices + kNumLevels);
  }
  const uint64_t tensors = per_layer * static_cast<uint64_t>(config.num_hidden_layers) + 16;
  return std::min(tensors * kHeaderBytesPerTensor, kMaxHeaderBytes);
}

}  // namespace

absl::StatusOr<std::unique_ptr<CheckpointWriter>> CheckpointWriter::Create(
    const Checkpoint& source, const CheckpointWriterOptions& options) {
  std::unique_ptr<CheckpointWriter> writer(new CheckpointWriter(source, options));
  MOBI_ASSIGN_OR_RETURN(writer->output_dir_, Resolve(options.output_dir));
  MOBI_RETURN_IF_ERROR(CheckOutput(writer->output_dir_, options.overwrite));
  std::string partial = writer->output_dir_ + ".partial-XXXXXX";
  if (mkdtemp(partial.data()) == nullptr) {
    return absl::ErrnoToStatus(errno, options.output_dir + ": cannot be created");
  }
  writer->partial_dir_ = partial;
  if (chmod(partial.c_str(), 0755) != 0) return absl::ErrnoToStatus(errno, partial);
  return writer;
}

CheckpointWriter::~CheckpointWriter() {
  std::error_code ignored;
  if (!partial_dir_.empty()) fs::remove_all(partial_dir_, ignored);
}

absl::Status CheckpointWriter::StartShard() {
  shard_paths_.push_back(absl::StrFormat("%s/shard-%05d", partial_dir_, shard_paths_.size() + 1));
  MOBI_ASSIGN_OR_RETURN(
      SafetensorsWriter shard,
      SafetensorsWriter::Create(shard_paths_.back(), HeaderCapacity(source_.config())));
  shard_.emplace(std::move(shard));
  return absl::OkStatus();
}

absl::Status CheckpointWriter::FinishShard() {
  if (!shard_) return absl::OkStatus();
  MOBI_RETURN_IF_ERROR(shard_->Finish());
  shard_.reset();
  return absl::OkStatus();
}

absl::Status CheckpointWriter::AddTensor(std::string_view name, DType dtype,
                                         absl::Span<const int64_t> shape,
                                         absl::Span<const std::byte> bytes) {
  const bool full =
      shard_ && shard_->data_bytes() > 0 &&
      (shard_->data_bytes() + bytes.size() > options_.max_shard_bytes || !shard_->HasRoomFor(name));
  if (full) MOBI_RETURN_IF_ERROR(FinishShard());
  if (!shard_) MOBI_RETURN_IF_ERROR(StartShard());
  MOBI_RETURN_IF_ERROR(shard_->Add(name, dtype, shape, bytes));
  written_.push_back({std::string(name), shard_paths_.size() - 1});
  total_bytes_ += bytes.size();
  return absl::OkStatus();
}

absl::Status CheckpointWriter::AddSliced(std::string_view linear, const SlicedTensors& tensors) {
  const int64_t row_tiles = PaddedRows(tensors.rows) / kTileRows;
  const int64_t groups = tensors.cols / kGroupSize;
  for (size_t i = 0; i < tensors.slices.size(); ++i) {
    MOBI_RETURN_IF_ERROR(AddTensor(absl::StrFormat("%s.slice_%d", linear, i), DType::kU8,
                                   {row_tiles, groups, kTileBytes}, BytesOf(tensors.slices[i])));
  }
  for (size_t i = 0; i < tensors.scales.size(); ++i) {
    MOBI_RETURN_IF_ERROR(AddTensor(absl::StrFormat("%s.scales_%d", linear, i + 1), DType::kF16,
                                   {row_tiles, groups, kTileRows, 2}, BytesOf(tensors.scales[i])));
  }
  return absl::OkStatus();
}

absl::Status CheckpointWriter::AddRouter(std::string_view router, const RouterTensors& tensors) {
  const std::pair<const char*, const HostTensor*> parts[] = {{"w1", &tensors.w1},
                                                             {"b1", &tensors.b1},
                                                             {"u", &tensors.u},
                                                             {"w2", &tensors.w2},
                                                             {"b2", &tensors.b2}};
  for (const auto& [part, tensor] : parts) {
    MOBI_RETURN_IF_ERROR(AddTensor(absl::StrFormat("%s.%s", router, part), tensor->dtype,
                                   tensor->shape, tensor->bytes));
  }
  return absl::OkStatus();
}

absl::Status CheckpointWriter::AddUnquantized(bool sliced_lm_head) {
  std::vector<std::string> names = {"model.embed_tokens.weight", "model.norm.weight"};
  if (!source_.config().tie_word_embeddings && !sliced_lm_head) names.push_back("lm_head.weight");
  for (int layer = 0; layer < source_.config().num_hidden_layers; ++layer) {
    for (const char* norm : {"input_layernorm", "post_attention_layernorm"}) {
      names.push_back(absl::StrFormat("model.layers.%d.%s.weight", layer, norm));
    }
  }
  for (const std::string& name : names) {
    MOBI_ASSIGN_OR_RETURN(const HostTensor tensor, source_.Tensor(name));
    MOBI_RETURN_IF_ERROR(AddTensor(name, tensor.dtype, tensor.shape, tensor.bytes));
  }
  return absl::OkStatus();
}

// The number of shards is part of their names, so they are named last.
absl::Status CheckpointWriter::NameShards() {
  const size_t count = shard_paths_.size();
  nlohmann::json weight_map = nlohmann::json::object();
  std::vector<std::string> names;
  for (size_t i = 0; i < count; ++i) {
    names.push_back(count == 1 ? "model.safetensors"
                               : absl::StrFormat("model-%05d-of-%05d.safetensors", i + 1, count));
    const std::string path = partial_dir_ + "/" + names.back();
    if (rename(shard_paths_[i].c_str(), path.c_str()) != 0) return absl::ErrnoToStatus(errno, path);
  }
  if (count == 1) return absl::OkStatus();
  for (const Written& written : written_) weight_map[written.tensor] = names[written.shard];
  const nlohmann::json index = {{"metadata", {{"total_size", total_bytes_}}},
                                {"weight_map", std::move(weight_map)}};
  return WriteFile(partial_dir_ + "/model.safetensors.index.json", Dump(index));
}

absl::Status CheckpointWriter::CopySourceFiles() {
  for (const char* name : kCopiedFiles) {
    const auto file = MappedFile::Open(source_.dir() + "/" + name, kMaxSideFileBytes);
    if (absl::IsNotFound(file.status())) continue;
    MOBI_RETURN_IF_ERROR(file.status());
    MOBI_RETURN_IF_ERROR(WriteFile(partial_dir_ + "/" + name, file->text()));
  }
  return absl::OkStatus();
}

absl::Status CheckpointWriter::Commit(const nlohmann::json& quantization_config) {
  MOBI_RETURN_IF_ERROR(FinishShard());
  MOBI_RETURN_IF_ERROR(NameShards());
  MOBI_RETURN_IF_ERROR(CopySourceFiles());
  nlohmann::json config = source_.config_json();
  nlohmann::json quantization = quantization_config;
  quantization.update({{"quant_method", "mobiquant"},
                       {"version", 1},
                       {"slice_bits", std::vector<int>(kNumSlices, kSliceBits)},
                       {"group_size", kGroupSize}});
  config["quantization_config"] = std::move(quantization);
  MOBI_RETURN_IF_ERROR(WriteFile(partial_dir_ + "/config.json", Dump(config)));
  MOBI_RETURN_IF_ERROR(WriteManifest(partial_dir_));
  MOBI_RETURN_IF_ERROR(Checkpoint::Open(partial_dir_, {}).status());
  return Publish();
}

absl::Status CheckpointWriter::Publish() {
  MOBI_RETURN_IF_ERROR(SyncDirectory(partial_dir_));
  MOBI_RETURN_IF_ERROR(CheckOutput(output_dir_, options_.overwrite));
  const std::string parent = fs::path(output_dir_).parent_path().string();
  if (rename(partial_dir_.c_str(), output_dir_.c_str()) == 0) {
    partial_dir_.clear();
    return SyncDirectory(parent);
  }
  if (errno != ENOTEMPTY && errno != EEXIST) return absl::ErrnoToStatus(errno, output_dir_);
  return Replace(parent);
}

// Two folders swap names at once where the file system can, and in two steps where it cannot. The
// destructor removes the old one.
absl::Status CheckpointWriter::Replace(const std::string& parent) {
  const int swapped =
      renameat2(AT_FDCWD, partial_dir_.c_str(), AT_FDCWD, output_dir_.c_str(), RENAME_EXCHANGE);
  if (swapped != 0) {
    const std::string old_dir = partial_dir_ + ".old";
    if (rename(output_dir_.c_str(), old_dir.c_str()) != 0) {
      return absl::ErrnoToStatus(errno, output_dir_ + ": cannot be replaced");
    }
    if (rename(partial_dir_.c_str(), output_dir_.c_str()) != 0) {
      const int error = errno;
      rename(old_dir.c_str(), output_dir_.c_str());
      return absl::ErrnoToStatus(error, output_dir_ + ": cannot be replaced");
    }
    partial_dir_ = old_dir;
  }
  return SyncDirectory(parent);
}

}  // namespace mobi
