#include "calibrator/fit_journal.h"

#include <filesystem>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/file_writer.h"
#include "engine/base/mapped_file.h"
#include "engine/base/status_macros.h"
#include "engine/checkpoint.h"
#include "engine/safetensors.h"

namespace mobi {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kHeaderBytes = 8192;
constexpr const char* kGroupNames[] = {"qkv", "o", "gate_up", "down"};
constexpr const char* kWeightName = "weight";
constexpr size_t kMaxKeyBytes = 1 << 20;

std::string KeyPath(const std::string& dir) { return dir + "/key"; }

template <typename T>
bool Read(const SafetensorsFile& file, const std::string& name, std::vector<T>& out) {
  const HostTensor* tensor = file.Find(name);
  if (tensor == nullptr || tensor->bytes.size() != out.size() * sizeof(T)) return false;
  const auto values = tensor->As<T>();
  std::copy(values.begin(), values.end(), out.begin());
  return true;
}

template <typename T>
absl::Status Write(SafetensorsWriter& file, const std::string& name, DType dtype,
                   absl::Span<const int64_t> shape, const std::vector<T>& values) {
  return file.Add(name, dtype, shape,
                  {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)});
}

absl::Status WriteWeight(SafetensorsWriter& file, const std::string& name,
                         const NestedWeight& weight) {
  for (int level = 1; level <= kNumLevels; ++level) {
    MOBI_RETURN_IF_ERROR(Write(file, absl::StrCat(name, ".scales_", level), DType::kF32,
                               {weight.rows, weight.groups(), 2}, weight.scales[level - 1]));
  }
  return Write(file, name + ".codes", DType::kU8, {weight.rows, weight.cols}, weight.codes);
}

absl::Status WriteWeights(const std::string& path,
                          absl::Span<const std::pair<const char*, const NestedWeight*>> weights) {
  MOBI_ASSIGN_OR_RETURN(SafetensorsWriter file, SafetensorsWriter::Create(path, kHeaderBytes));
  for (const auto& [name, weight] : weights) {
    MOBI_RETURN_IF_ERROR(WriteWeight(file, name, *weight));
  }
  return file.Finish();
}

std::optional<NestedWeight> ReadWeight(const SafetensorsFile& file, const std::string& name,
                                       int64_t rows, int64_t cols) {
  NestedWeight weight(rows, cols);
  for (int level = 1; level <= kNumLevels; ++level) {
    if (!Read(file, absl::StrCat(name, ".scales_", level), weight.scales[level - 1])) {
      return std::nullopt;
    }
  }
  if (!Read(file, name + ".codes", weight.codes)) return std::nullopt;
  return weight;
}

}  // namespace

absl::StatusOr<FitJournal> FitJournal::Open(const std::string& output_dir, std::string key) {
  std::string dir = output_dir;
  while (dir.size() > 1 && dir.back() == '/') dir.pop_back();
  FitJournal journal(dir + ".progress", std::move(key));
  std::error_code error;
  if (!fs::exists(journal.dir_, error)) return journal;
  const auto file = MappedFile::Open(KeyPath(journal.dir_), kMaxKeyBytes);
  if (!file.ok() || file->text() != journal.key_) {
    // Only a folder that looks like one of ours is thrown away.
    if (!fs::is_empty(journal.dir_, error) && !fs::exists(KeyPath(journal.dir_), error)) {
      return absl::AlreadyExistsError(absl::StrCat(journal.dir_, ": is in the way"));
    }
    journal.Remove();
  }
  return journal;
}

std::string FitJournal::PathOf(std::string_view stage, int index) const {
  return absl::StrCat(dir_, "/", std::string(stage), "-", index, ".safetensors");
}

std::optional<FittedBlock> FitJournal::Load(std::string_view stage, int layer,
                                            const ModelConfig& config) const {
  const auto file = SafetensorsFile::Open(PathOf(stage, layer));
  if (!file.ok()) return std::nullopt;
  FittedBlock block;
  const auto groups = RoutedGroupsOfLayer(config, layer);
  for (int g = 0; g < kNumLinearGroups; ++g) {
    int64_t rows = 0;
    for (const LinearShape& linear : groups[g].linears) rows += linear.rows;
    auto weight = ReadWeight(*file, kGroupNames[g], rows, groups[g].linears.front().cols);
    if (!weight) return std::nullopt;
    block.linear[g] = *std::move(weight);
  }
  return block;
}

std::optional<NestedWeight> FitJournal::LoadWeight(std::string_view stage, int piece, int64_t rows,
                                                   int64_t cols) const {
  const auto file = SafetensorsFile::Open(PathOf(stage, piece));
  if (!file.ok()) return std::nullopt;
  return ReadWeight(*file, kWeightName, rows, cols);
}

absl::Status FitJournal::Save(std::string_view stage, int layer, const FittedBlock& block) {
  std::array<std::pair<const char*, const NestedWeight*>, kNumLinearGroups> weights;
  for (int g = 0; g < kNumLinearGroups; ++g) weights[g] = {kGroupNames[g], &block.linear[g]};
  return Write(PathOf(stage, layer), weights);
}

absl::Status FitJournal::SaveWeight(std::string_view stage, int piece, const NestedWeight& weight) {
  return Write(PathOf(stage, piece), {{kWeightName, &weight}});
}

absl::Status FitJournal::Write(const std::string& path, NamedWeights weights) {
  std::error_code error;
  if (!fs::exists(KeyPath(dir_), error)) {
    fs::create_directory(dir_, error);
    if (error) return absl::ErrnoToStatus(error.value(), dir_ + ": cannot be created");
    MOBI_RETURN_IF_ERROR(WriteFile(KeyPath(dir_), key_));
  }
  const std::string partial = path + ".partial";
  fs::remove(partial, error);
  const absl::Status written = WriteWeights(partial, weights);
  if (!written.ok()) {
    fs::remove(partial, error);
    return written;
  }
  fs::rename(partial, path, error);
  if (error) return absl::ErrnoToStatus(error.value(), path);
  return absl::OkStatus();
}

void FitJournal::Remove() {
  std::error_code ignored;
  fs::remove_all(dir_, ignored);
}

}  // namespace mobi
