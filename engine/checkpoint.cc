#include "engine/checkpoint.h"

#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/json.h"
#include "engine/base/mapped_file.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr char kConfigName[] = "config.json";
constexpr char kGenerationConfigName[] = "generation_config.json";
constexpr char kSingleFileName[] = "model.safetensors";
constexpr char kIndexName[] = "model.safetensors.index.json";
constexpr std::string_view kLayerPrefix = "model.layers.";
constexpr uint64_t kMaxConfigBytes = 1 << 20;
constexpr size_t kMaxShards = 4096;
constexpr size_t kMaxPricePoints = 4096;

bool Exists(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 || errno != ENOENT;
}

absl::Status CheckIsFolder(const std::string& dir) {
  struct stat info;
  if (stat(dir.c_str(), &info) != 0) return absl::ErrnoToStatus(errno, dir);
  if (!S_ISDIR(info.st_mode)) return absl::InvalidArgumentError(dir + ": not a folder");
  return absl::OkStatus();
}

// [[bits, price], ...]: bits ascend, prices never rise.
absl::StatusOr<std::vector<PricePoint>> ReadPriceTable(const JsonObject& object,
                                                       std::string_view key) {
  MOBI_ASSIGN_OR_RETURN(const nlohmann::json* list, object.Array(key));
  if (list->empty() || list->size() > kMaxPricePoints) {
    return object.Error(
        key, absl::StrFormat("%u points are not in 1..%u", list->size(), kMaxPricePoints));
  }
  std::vector<PricePoint> table;
  for (const auto& pair : *list) {
    const auto refuse = [&](std::string_view reason) {
      return object.Error(key, absl::StrFormat("point %u: %s", table.size(), reason));
    };
    if (!pair.is_array() || pair.size() != 2 || !pair[0].is_number() || !pair[1].is_number()) {
      return refuse("not [bits, price]");
    }
    const PricePoint point = {pair[0].get<float>(), pair[1].get<float>()};
    if (!(point.bits >= kSliceBits && point.bits <= kSliceBits * kNumSlices)) {
      return refuse(absl::StrFormat("%g bits are not in 2..8", point.bits));
    }
    if (!(point.price > 0 && std::isfinite(point.price))) {
      return refuse(absl::StrFormat("price %g is not positive and finite", point.price));
    }
    if (!table.empty() && !(point.bits > table.back().bits)) return refuse("bits do not ascend");
    if (!table.empty() && point.price > table.back().price) return refuse("the price rises");
    table.push_back(point);
  }
  return table;
}

absl::StatusOr<LmHeadLevels> ReadLmHead(const JsonObject& object) {
  LmHeadLevels lm_head;
  MOBI_ASSIGN_OR_RETURN(const int64_t min_level, object.Int("min_level", 1, kNumLevels));
  lm_head.min_level = static_cast<int>(min_level);
  MOBI_ASSIGN_OR_RETURN(const nlohmann::json* loss, object.Array("loss"));
  if (loss->size() != kNumLevels) {
    return object.Error("loss", absl::StrFormat("%u values, not one for each of %d levels",
                                                loss->size(), kNumLevels));
  }
  for (size_t i = 0; i < kNumLevels; ++i) {
    const nlohmann::json& value = (*loss)[i];
    lm_head.loss[i] = value.is_number() ? value.get<float>() : NAN;
    if (!(lm_head.loss[i] >= 0 && std::isfinite(lm_head.loss[i]))) {
      return object.Error("loss", absl::StrFormat("level %u: not a finite number from 0", i + 1));
    }
  }
  return lm_head;
}

// Which of some views, that are views into mapped files, a piece of a file belongs to.
class ViewFinder {
 public:
  explicit ViewFinder(absl::Span<const absl::Span<const std::byte>> views) {
    for (size_t i = 0; i < views.size(); ++i) {
      if (!views[i].empty()) by_address_.emplace(views[i].data(), View{i, views[i].size()});
      left_ += views[i].size();
    }
  }

  // `bytes` are what the files have at `at`.
  void PassOn(const std::byte* at, absl::Span<const std::byte> bytes, ViewSink sink) {
    auto view = by_address_.upper_bound(at);
    if (view != by_address_.begin()) --view;
    for (; view != by_address_.end() && view->first < at + bytes.size(); ++view) {
      const auto& [begin, of] = *view;
      const std::byte* const from = std::max(begin, at);
      const std::byte* const to = std::min(begin + of.size, at + bytes.size());
      if (from >= to) continue;
      const auto length = static_cast<size_t>(to - from);
      sink(of.index, static_cast<size_t>(from - begin),
           bytes.subspan(static_cast<size_t>(from - at), length));
      left_ -= length;
    }
  }

  bool complete() const { return left_ == 0; }

 private:
  struct View {
    size_t index;
    size_t size;
  };
  std::map<const std::byte*, View, std::less<>> by_address_;
  std::atomic<size_t> left_{0};
};

std::string Concat(std::string_view a, std::string_view b) {
  return std::string(a) + std::string(b);
}

}  // namespace

std::array<RoutedGroup, 4> RoutedGroupsOfLayer(const ModelConfig& config, int layer) {
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  const std::string attention = prefix + "self_attn.";
  const std::string mlp = prefix + "mlp.";
  const int64_t hidden = config.hidden_size;
  const int64_t inner = config.intermediate_size;
  const int64_t query = config.attention_size();
  const int64_t key_value = config.key_value_size();
  return {RoutedGroup{attention + "qkv_router",
                      {{attention + "q_proj", query, hidden},
                       {attention + "k_proj", key_value, hidden},
                       {attention + "v_proj", key_value, hidden}}},
          RoutedGroup{attention + "o_router", {{attention + "o_proj", hidden, query}}},
          RoutedGroup{mlp + "gate_up_router",
                      {{mlp + "gate_proj", inner, hidden}, {mlp + "up_proj", inner, hidden}}},
          RoutedGroup{mlp + "down_router", {{mlp + "down_proj", hidden, inner}}}};
}

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& dir,
                                            const CheckpointOptions& options) {
  Checkpoint checkpoint;
  checkpoint.dir_ = dir;
  while (checkpoint.dir_.size() > 1 && checkpoint.dir_.back() == '/') checkpoint.dir_.pop_back();
  MOBI_RETURN_IF_ERROR(CheckIsFolder(checkpoint.dir_));
  MOBI_RETURN_IF_ERROR(checkpoint.ReadConfig());
  MOBI_RETURN_IF_ERROR(checkpoint.OpenTensors());
  MOBI_RETURN_IF_ERROR(checkpoint.CheckNames());
  MOBI_RETURN_IF_ERROR(checkpoint.CheckTensors());
  if (options.verify_manifest) {
    MOBI_RETURN_IF_ERROR(checkpoint.Verify());
  }
  return checkpoint;
}

absl::Status Checkpoint::Verify() {
  if (!has_manifest()) return absl::OkStatus();
  MOBI_ASSIGN_OR_RETURN(verified_files_,
                        VerifyManifest(dir_, FilesRead(), {}, [](auto, auto, auto) {}));
  return absl::OkStatus();
}

// A mobiquant folder without one is refused when it is looked for.
bool Checkpoint::has_manifest() const { return quantized() || Exists(dir_ + "/" + kManifestName); }

absl::Status Checkpoint::ReadConfig() {
  const std::string path = dir_ + "/" + kConfigName;
  MOBI_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path, kMaxConfigBytes));
  MOBI_ASSIGN_OR_RETURN(config_, ParseModelConfig(file.text(), path));
  MOBI_ASSIGN_OR_RETURN(config_json_, ParseJson(file.text(), path));
  const std::string generation_path = dir_ + "/" + kGenerationConfigName;
  if (Exists(generation_path)) {
    MOBI_ASSIGN_OR_RETURN(const MappedFile generation,
                          MappedFile::Open(generation_path, kMaxConfigBytes));
    MOBI_RETURN_IF_ERROR(MergeGenerationConfig(generation.text(), generation_path, config_));
  }
  return ReadQuantizationConfig();
}

absl::Status Checkpoint::ReadQuantizationConfig() {
  const std::string path = dir_ + "/" + kConfigName;
  MOBI_ASSIGN_OR_RETURN(const JsonObject root, JsonObject::Of(config_json_, path));
  if (!root.Has("quantization_config")) return absl::OkStatus();
  MOBI_ASSIGN_OR_RETURN(const JsonObject object, root.Object("quantization_config"));
  MOBI_RETURN_IF_ERROR(object.Int("version", 1, 1).status());
  MOBI_RETURN_IF_ERROR(object.Int("group_size", kGroupSize, kGroupSize).status());
  MOBI_ASSIGN_OR_RETURN(const nlohmann::json* slice_bits, object.Array("slice_bits"));
  if (*slice_bits != nlohmann::json::array({2, 2, 2, 2})) {
    return object.Error("slice_bits", "not [2, 2, 2, 2]");
  }
  MOBI_ASSIGN_OR_RETURN(const JsonObject prices, object.Object("price_table"));
  MOBI_ASSIGN_OR_RETURN(price_table_, ReadPriceTable(prices, "token"));
  if (prices.Has("coherent")) {
    constexpr int kMaxBatch = 1 << 16;
    MOBI_ASSIGN_OR_RETURN(const JsonObject coherent, prices.Object("coherent"));
    MOBI_ASSIGN_OR_RETURN(const int64_t batch, coherent.Int("batch", 1, kMaxBatch));
    MOBI_ASSIGN_OR_RETURN(coherent_price_table_, ReadPriceTable(coherent, "table"));
    coherent_batch_ = static_cast<int>(batch);
  }
  if (object.Has("lm_head")) {
    MOBI_ASSIGN_OR_RETURN(const JsonObject lm_head, object.Object("lm_head"));
    MOBI_ASSIGN_OR_RETURN(lm_head_, ReadLmHead(lm_head));
  }
  quantization_config_ = object.value();
  return absl::OkStatus();
}

absl::Status Checkpoint::OpenTensors() {
  const std::string single = dir_ + "/" + kSingleFileName;
  const std::string index = dir_ + "/" + kIndexName;
  if (!Exists(single)) {
    if (Exists(index)) return OpenShards(index);
    return absl::NotFoundError(
        absl::StrFormat("%s: neither %s nor %s is there", dir_, kSingleFileName, kIndexName));
  }
  weights_path_ = single;
  MOBI_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(single));
  files_.push_back(std::move(file));
  for (const HostTensor& tensor : files_[0].tensors()) {
    tensors_[tensor.name] = {&tensor, &files_[0]};
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::OpenShards(const std::string& index_path) {
  weights_path_ = index_path;
  constexpr JsonLimits kLimits = {.max_bytes = kMaxSafetensorsHeaderBytes, .max_depth = 8};
  MOBI_ASSIGN_OR_RETURN(const MappedFile index, MappedFile::Open(index_path, kLimits.max_bytes));
  MOBI_ASSIGN_OR_RETURN(const nlohmann::json document,
                        ParseJson(index.text(), index_path, kLimits));
  MOBI_ASSIGN_OR_RETURN(const JsonObject root, JsonObject::Of(document, index_path));
  MOBI_ASSIGN_OR_RETURN(const JsonObject weight_map, root.Object("weight_map"));
  std::map<std::string, const SafetensorsFile*> shards;
  for (const auto& [tensor, unused] : weight_map.value().items()) {
    MOBI_ASSIGN_OR_RETURN(const std::string name, weight_map.String(tensor));
    if (!IsPlainFileName(name)) {
      return weight_map.Error(tensor, "the file lies outside of the folder");
    }
    shards[name] = nullptr;
  }
  if (shards.size() > kMaxShards) {
    return root.Error("weight_map",
                      absl::StrFormat("%u files, the limit is %u", shards.size(), kMaxShards));
  }
  files_.reserve(shards.size());  // entries point into it
  for (auto& [name, file] : shards) {
    MOBI_ASSIGN_OR_RETURN(SafetensorsFile opened, SafetensorsFile::Open(dir_ + "/" + name));
    files_.push_back(std::move(opened));
    file = &files_.back();
  }
  for (const auto& [tensor, name] : weight_map.value().items()) {
    const SafetensorsFile* file = shards.at(name.get<std::string>());
    const HostTensor* found = file->Find(tensor);
    if (found == nullptr) return weight_map.Error(tensor, "not in " + file->path());
    tensors_[tensor] = {found, file};
  }
  return absl::OkStatus();
}

// Names that contradict the config: they would be ignored in silence otherwise.
absl::Status Checkpoint::CheckNames() const {
  for (const auto& [name, entry] : tensors_) {
    if (!absl::StartsWith(name, absl::string_view(kLayerPrefix.data(), kLayerPrefix.size()))) {
      continue;
    }
    const std::string number =
        name.substr(kLayerPrefix.size(), name.find('.', kLayerPrefix.size()) - kLayerPrefix.size());
    int layer = 0;
    if (!absl::SimpleAtoi(number, &layer) || layer < 0 || layer >= config_.num_hidden_layers) {
      return Error(name, absl::StrFormat("but config.json has num_hidden_layers %d",
                                         config_.num_hidden_layers));
    }
    if (absl::EndsWith(name, ".bias")) {
      return absl::UnimplementedError(
          std::string(Error(name, "biases are not supported").message()));
    }
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::CheckTensors() const {
  const int64_t hidden = config_.hidden_size;
  const int64_t vocab = config_.vocab_size;
  MOBI_RETURN_IF_ERROR(CheckFloat("model.embed_tokens.weight", {vocab, hidden}));
  MOBI_RETURN_IF_ERROR(CheckFloat("model.norm.weight", {hidden}));
  MOBI_RETURN_IF_ERROR(CheckLmHead());
  for (int layer = 0; layer < config_.num_hidden_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    MOBI_RETURN_IF_ERROR(CheckFloat(prefix + "input_layernorm.weight", {hidden}));
    MOBI_RETURN_IF_ERROR(CheckFloat(prefix + "post_attention_layernorm.weight", {hidden}));
    for (const RoutedGroup& group : RoutedGroupsOfLayer(config_, layer)) {
      for (const LinearShape& linear : group.linears) {
        if (quantized()) {
          MOBI_RETURN_IF_ERROR(SlicedViews(linear.name, linear.rows, linear.cols).status());
        } else {
          MOBI_RETURN_IF_ERROR(CheckFloat(linear.name + ".weight", {linear.rows, linear.cols}));
        }
      }
      if (!quantized()) continue;
      const auto segments = static_cast<int>(group.linears.size());
      MOBI_RETURN_IF_ERROR(RouterViews(group.router, segments, group.linears[0].cols).status());
    }
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::CheckLmHead() const {
  const int64_t vocab = config_.vocab_size, hidden = config_.hidden_size;
  if (lm_head_.has_value()) return SlicedViews(kLmHead, vocab, hidden).status();
  if (Has("lm_head.slice_0")) {
    return Error("lm_head.slice_0", "but config.json's quantization_config has no lm_head");
  }
  if (config_.tie_word_embeddings) return absl::OkStatus();
  return CheckFloat("lm_head.weight", {vocab, hidden});
}

absl::Status Checkpoint::CheckFloat(std::string_view name, absl::Span<const int64_t> shape) const {
  MOBI_ASSIGN_OR_RETURN(const HostTensor tensor, Tensor(name, shape));
  if (tensor.dtype == DType::kI32 || tensor.dtype == DType::kU8) {
    return Error(name, absl::StrFormat("%s is not a type of weights", Name(tensor.dtype)));
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::Error(std::string_view name, std::string_view reason) const {
  const auto found = tensors_.find(name);
  const std::string& path = found == tensors_.end() ? weights_path_ : found->second.file->path();
  return absl::InvalidArgumentError(absl::StrFormat("%s: %s: %s", path, name, reason));
}

absl::StatusOr<HostTensor> Checkpoint::Tensor(std::string_view name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    return absl::NotFoundError(std::string(Error(name, "missing").message()));
  }
  return *found->second.tensor;
}

absl::StatusOr<HostTensor> Checkpoint::Tensor(std::string_view name,
                                              absl::Span<const int64_t> shape) const {
  MOBI_ASSIGN_OR_RETURN(HostTensor tensor, Tensor(name));
  if (tensor.shape != shape) {
    return Error(name, absl::StrFormat("shape %s, expected %s", ShapeString(tensor.shape),
                                       ShapeString(shape)));
  }
  return tensor;
}

absl::StatusOr<HostTensor> Checkpoint::Typed(const std::string& name, DType dtype,
                                             absl::Span<const int64_t> shape) const {
  MOBI_ASSIGN_OR_RETURN(HostTensor tensor, Tensor(name, shape));
  if (tensor.dtype != dtype) {
    return Error(name, absl::StrFormat("dtype %s, expected %s", Name(tensor.dtype), Name(dtype)));
  }
  return tensor;
}

absl::StatusOr<SlicedTensors> Checkpoint::SlicedViews(std::string_view linear, int64_t rows,
                                                      int64_t cols) const {
  if (cols % kGroupSize != 0) {
    return Error(linear,
                 absl::StrFormat("%d input features are not a multiple of %d", cols, kGroupSize));
  }
  SlicedTensors tensors{rows, cols, {}, {}};
  const int64_t row_tiles = PaddedRows(rows) / kTileRows;
  const int64_t groups = cols / kGroupSize;
  for (int i = 0; i < kNumSlices; ++i) {
    MOBI_ASSIGN_OR_RETURN(const HostTensor slice,
                          Typed(absl::StrFormat("%s.slice_%d", linear, i), DType::kU8,
                                {row_tiles, groups, kTileBytes}));
    tensors.slices[static_cast<size_t>(i)] = slice.As<uint8_t>();
  }
  for (int level = 1; level <= kNumLevels; ++level) {
    MOBI_ASSIGN_OR_RETURN(const HostTensor scales,
                          Typed(absl::StrFormat("%s.scales_%d", linear, level), DType::kF16,
                                {row_tiles, groups, kTileRows, 2}));
    tensors.scales[static_cast<size_t>(level - 1)] = scales.As<uint16_t>();
  }
  return tensors;
}

absl::StatusOr<SlicedTensors> Checkpoint::Sliced(std::string_view linear, int64_t rows,
                                                 int64_t cols) const {
  MOBI_ASSIGN_OR_RETURN(SlicedTensors tensors, SlicedViews(linear, rows, cols));
  for (int level = 1; level <= kNumLevels; ++level) {
    const std::string name = absl::StrFormat("%s.scales_%d", linear, level);
    MOBI_ASSIGN_OR_RETURN(const HostTensor scales, Tensor(name));
    if (const auto index = FirstNonFinite(scales.dtype, scales.bytes)) {
      return Error(name, absl::StrFormat("element %u is not finite", *index));
    }
  }
  return tensors;
}

absl::StatusOr<RouterTensors> Checkpoint::RouterViews(std::string_view router, int num_segments,
                                                      int64_t cols) const {
  const std::string w1_name = Concat(router, ".w1");
  MOBI_ASSIGN_OR_RETURN(const HostTensor w1, Tensor(w1_name));
  if (w1.shape.size() != 2 || w1.shape[0] < 1 || w1.shape[0] > kMaxRouterHidden) {
    return Error(w1_name, absl::StrFormat("shape %s, expected [1..%d, %d]", ShapeString(w1.shape),
                                          kMaxRouterHidden, cols));
  }
  const int64_t hidden = w1.shape[0];
  const int64_t scores = int64_t{num_segments} * kNumLevels;
  RouterTensors tensors;
  tensors.num_hidden = static_cast<int>(hidden);
  tensors.num_segments = num_segments;
  MOBI_ASSIGN_OR_RETURN(tensors.w1, Typed(w1_name, DType::kF16, {hidden, cols}));
  MOBI_ASSIGN_OR_RETURN(tensors.b1, Typed(Concat(router, ".b1"), DType::kF32, {hidden}));
  MOBI_ASSIGN_OR_RETURN(tensors.u, Typed(Concat(router, ".u"), DType::kF32, {hidden}));
  MOBI_ASSIGN_OR_RETURN(tensors.w2, Typed(Concat(router, ".w2"), DType::kF32, {scores, hidden}));
  MOBI_ASSIGN_OR_RETURN(tensors.b2, Typed(Concat(router, ".b2"), DType::kF32, {scores}));
  return tensors;
}

absl::StatusOr<RouterTensors> Checkpoint::RouterOf(std::string_view router, int num_segments,
                                                   int64_t cols) const {
  MOBI_ASSIGN_OR_RETURN(RouterTensors tensors, RouterViews(router, num_segments, cols));
  for (const HostTensor* tensor :
       {&tensors.w1, &tensors.b1, &tensors.u, &tensors.w2, &tensors.b2}) {
    if (const auto index = FirstNonFinite(tensor->dtype, tensor->bytes)) {
      return Error(tensor->name, absl::StrFormat("element %u is not finite", *index));
    }
  }
  return tensors;
}

absl::Status Checkpoint::Read(absl::Span<const absl::Span<const std::byte>> views,
                              const ReadOptions& options, ViewSink sink) const {
  ViewFinder finder(views);
  const auto pass_on = [&](const SafetensorsFile& file, uint64_t offset,
                           absl::Span<const std::byte> bytes) {
    // A file that was replaced by a longer one does not pass for what was opened.
    if (offset + bytes.size() > file.bytes().size()) return;
    finder.PassOn(file.bytes().data() + offset, bytes, sink);
  };
  const StreamOptions stream = {.hash = options.verify && has_manifest(),
                                .direct = options.direct,
                                .progress = options.progress};
  MOBI_RETURN_IF_ERROR(stream.hash ? StreamListed(stream, pass_on)
                                   : StreamWeights(stream, pass_on));
  if (finder.complete()) return absl::OkStatus();
  return absl::DataLossError(dir_ + ": the weights were replaced while they were loaded");
}

absl::Status Checkpoint::StreamWeights(const StreamOptions& options, FileSink sink) const {
  std::vector<StreamedFile> files;
  for (const SafetensorsFile& file : files_) files.push_back({.path = file.path()});
  return StreamFiles(absl::MakeSpan(files), options, [&](size_t i, uint64_t offset, auto bytes) {
    sink(files_[i], offset, bytes);
  });
}

absl::Status Checkpoint::StreamListed(const StreamOptions& options, FileSink sink) const {
  std::map<std::string, const SafetensorsFile*, std::less<>> weights;
  for (const SafetensorsFile& file : files_) weights[file.path().substr(dir_.size() + 1)] = &file;
  return VerifyManifest(dir_, FilesRead(), options,
                        [&](std::string_view name, uint64_t offset, auto bytes) {
                          const auto found = weights.find(name);
                          if (found != weights.end()) sink(*found->second, offset, bytes);
                        })
      .status();
}

void Checkpoint::ReleasePages() const {
  for (const SafetensorsFile& file : files_) file.ReleasePages();
}

// What MANIFEST has to cover: everything that the program reads from the folder.
std::vector<std::string> Checkpoint::FilesRead() const {
  std::vector<std::string> names = {kConfigName};
  for (const char* name : {kGenerationConfigName, "tokenizer.json", "tokenizer_config.json",
                           "special_tokens_map.json", "chat_template.jinja"}) {
    if (Exists(dir_ + "/" + name)) names.push_back(name);
  }
  const std::string prefix = dir_ + "/";
  if (absl::EndsWith(weights_path_, kIndexName)) names.push_back(kIndexName);
  for (const SafetensorsFile& file : files_) names.push_back(file.path().substr(prefix.size()));
  return names;
}

}  // namespace mobi
