#include "engine/safetensors.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "engine/base/json.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr uint64_t kLengthBytes = 8;
constexpr size_t kMaxRank = 8;
// Longest JSON of one tensor besides its name: eight dimensions and two offsets of twenty digits.
constexpr size_t kMaxEntryBytes = 256;
constexpr std::string_view kMetadata = "__metadata__";
constexpr std::string_view kHeaderBegin = R"({"__metadata__":{"format":"pt"})";
constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kI32, DType::kU8};

std::optional<DType> DTypeOf(std::string_view name) {
  for (const DType dtype : kDTypes) {
    if (Name(dtype) == name) return dtype;
  }
  return std::nullopt;
}

// Bytes of a tensor, or nothing when that does not fit 63 bits.
std::optional<uint64_t> ByteSize(DType dtype, absl::Span<const int64_t> shape) {
  auto bytes = static_cast<int64_t>(SizeOf(dtype));
  for (const int64_t dimension : shape) {
    if (dimension < 0 || __builtin_mul_overflow(bytes, dimension, &bytes)) return std::nullopt;
  }
  return static_cast<uint64_t>(bytes);
}

// Needs no escaping in JSON, so its length in the header is known.
bool IsPlainName(std::string_view name) {
  return std::all_of(name.begin(), name.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
  });
}

absl::StatusOr<std::vector<int64_t>> ReadIntegers(const JsonObject& entry, std::string_view key,
                                                  size_t max_count) {
  MOBI_ASSIGN_OR_RETURN(const nlohmann::json* list, entry.Array(key));
  if (list->size() > max_count) {
    return entry.Error(key,
                       absl::StrFormat("%u numbers, the limit is %u", list->size(), max_count));
  }
  std::vector<int64_t> numbers;
  for (const auto& value : *list) {
    const bool valid =
        value.is_number_unsigned() && value.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX);
    if (!valid) return entry.Error(key, JsonExcerpt(value) + " is not a size");
    numbers.push_back(value.get<int64_t>());
  }
  return numbers;
}

// One entry of the header; `data` is what follows the header in the file.
absl::StatusOr<HostTensor> ReadEntry(const std::string& name, const JsonObject& entry,
                                     absl::Span<const std::byte> data) {
  HostTensor tensor;
  tensor.name = name;
  MOBI_ASSIGN_OR_RETURN(const std::string dtype, entry.String("dtype"));
  const std::optional<DType> known = DTypeOf(dtype);
  if (!known) {
    return absl::UnimplementedError(
        std::string(entry.Error("dtype", JsonExcerpt(dtype) + " is not supported").message()));
  }
  tensor.dtype = *known;
  MOBI_ASSIGN_OR_RETURN(tensor.shape, ReadIntegers(entry, "shape", kMaxRank));
  MOBI_ASSIGN_OR_RETURN(const std::vector<int64_t> offsets, ReadIntegers(entry, "data_offsets", 2));
  if (offsets.size() != 2 || offsets[0] > offsets[1]) {
    return entry.Error("data_offsets", "not a begin and an end");
  }
  if (static_cast<uint64_t>(offsets[1]) > data.size()) {
    return entry.Error("data_offsets", absl::StrFormat("end %d is beyond the %u bytes of data",
                                                       offsets[1], data.size()));
  }
  const std::optional<uint64_t> expected = ByteSize(tensor.dtype, tensor.shape);
  const auto length = static_cast<uint64_t>(offsets[1] - offsets[0]);
  if (!expected || *expected != length) {
    return entry.Error("shape", absl::StrFormat("%s %s does not fit %u bytes", dtype,
                                                ShapeString(tensor.shape), length));
  }
  tensor.bytes = data.subspan(static_cast<size_t>(offsets[0]), length);
  if (reinterpret_cast<uintptr_t>(tensor.bytes.data()) % SizeOf(tensor.dtype) != 0) {
    return entry.Error("data_offsets",
                       absl::StrFormat("begin %d is not aligned for %s", offsets[0], dtype));
  }
  return tensor;
}

absl::Status CheckCoverage(const std::vector<HostTensor>& tensors, absl::Span<const std::byte> data,
                           std::string_view file) {
  size_t end = 0;
  for (const HostTensor& tensor : tensors) {
    const auto begin = static_cast<size_t>(tensor.bytes.data() - data.data());
    if (begin != end) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "%s: %s: data_offsets: begin %u %s %u", file, tensor.name, begin,
          begin < end ? "overlaps the tensor that ends at" : "leaves a gap after", end));
    }
    end += tensor.bytes.size();
  }
  if (end != data.size()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s: %u bytes of data, of which the tensors cover %u", file, data.size(), end));
  }
  return absl::OkStatus();
}

// The header's JSON, its length checked against the file.
absl::StatusOr<std::string_view> HeaderOf(absl::Span<const std::byte> bytes,
                                          std::string_view file) {
  if (bytes.size() < kLengthBytes) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: %u bytes is too short for a safetensors file", file, bytes.size()));
  }
  uint64_t length = 0;
  for (uint64_t i = 0; i < kLengthBytes; ++i) {
    length |= std::to_integer<uint64_t>(bytes[i]) << (8 * i);
  }
  if (length > bytes.size() - kLengthBytes) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s: header of %u bytes goes beyond the file of %u bytes", file, length, bytes.size()));
  }
  if (length > kMaxSafetensorsHeaderBytes) {
    return absl::InvalidArgumentError(absl::StrFormat("%s: header of %u bytes, the limit is %u",
                                                      file, length, kMaxSafetensorsHeaderBytes));
  }
  return std::string_view(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, length);
}

template <typename T>
std::optional<size_t> FirstNonFinite(absl::Span<const T> bits, T exponent_mask) {
  bool any = false;  // without an early exit the loop runs at the speed of memory
  for (const T value : bits) any |= (value & exponent_mask) == exponent_mask;
  if (!any) return std::nullopt;
  const auto found = std::find_if(bits.begin(), bits.end(), [exponent_mask](T value) {
    return (value & exponent_mask) == exponent_mask;
  });
  return static_cast<size_t>(found - bits.begin());
}

}  // namespace

std::optional<size_t> FirstNonFinite(DType dtype, absl::Span<const std::byte> bytes) {
  if (dtype == DType::kF32) return FirstNonFinite(ElementsOf<uint32_t>(bytes), 0x7F800000u);
  const uint16_t mask = dtype == DType::kF16 ? 0x7C00 : 0x7F80;
  return FirstNonFinite(ElementsOf<uint16_t>(bytes), mask);
}

int64_t HostTensor::num_elements() const {
  return static_cast<int64_t>(bytes.size() / SizeOf(dtype));
}

std::string ShapeString(absl::Span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

absl::StatusOr<std::vector<HostTensor>> ParseSafetensors(absl::Span<const std::byte> bytes,
                                                         std::string_view file) {
  MOBI_ASSIGN_OR_RETURN(const std::string_view header, HeaderOf(bytes, file));
  const absl::Span<const std::byte> data = bytes.subspan(kLengthBytes + header.size());
  constexpr JsonLimits kLimits = {.max_bytes = kMaxSafetensorsHeaderBytes, .max_depth = 3};
  MOBI_ASSIGN_OR_RETURN(const nlohmann::json document, ParseJson(header, file, kLimits));
  MOBI_ASSIGN_OR_RETURN(const JsonObject root, JsonObject::Of(document, file));
  std::vector<HostTensor> tensors;
  for (const auto& [name, value] : document.items()) {
    if (name == kMetadata) continue;
    MOBI_ASSIGN_OR_RETURN(const JsonObject entry, root.Object(name));
    MOBI_ASSIGN_OR_RETURN(HostTensor tensor, ReadEntry(name, entry, data));
    tensors.push_back(std::move(tensor));
  }
  std::sort(tensors.begin(), tensors.end(), [](const HostTensor& a, const HostTensor& b) {
    return std::pair(a.bytes.data(), a.bytes.size()) < std::pair(b.bytes.data(), b.bytes.size());
  });
  MOBI_RETURN_IF_ERROR(CheckCoverage(tensors, data, file));
  return tensors;
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  SafetensorsFile file;
  file.path_ = path;
  MOBI_ASSIGN_OR_RETURN(file.file_, MappedFile::Open(path));
  MOBI_ASSIGN_OR_RETURN(file.tensors_, ParseSafetensors(file.file_.bytes(), path));
  for (size_t i = 0; i < file.tensors_.size(); ++i) file.index_[file.tensors_[i].name] = i;
  return file;
}

const HostTensor* SafetensorsFile::Find(std::string_view name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

SafetensorsWriter::SafetensorsWriter(FileWriter file, uint64_t header_capacity)
    : file_(std::move(file)), header_capacity_(header_capacity), header_(kHeaderBegin) {}

absl::StatusOr<SafetensorsWriter> SafetensorsWriter::Create(const std::string& path,
                                                            uint64_t header_capacity) {
  // Data begins at a multiple of 64 bytes, so that mapped slices start on a cache line.
  constexpr uint64_t kAlignment = 64;
  const uint64_t wanted = kLengthBytes + std::max<uint64_t>(header_capacity, 2 * kMaxEntryBytes);
  const uint64_t aligned = (wanted + kAlignment - 1) / kAlignment * kAlignment;
  MOBI_ASSIGN_OR_RETURN(FileWriter file, FileWriter::Create(path));
  return SafetensorsWriter(std::move(file), aligned - kLengthBytes);
}

bool SafetensorsWriter::HasRoomFor(std::string_view name) const {
  return header_.size() + name.size() + kMaxEntryBytes <= header_capacity_;
}

absl::Status SafetensorsWriter::Add(std::string_view name, DType dtype,
                                    absl::Span<const int64_t> shape,
                                    absl::Span<const std::byte> bytes) {
  const auto refuse = [&](std::string_view reason) {
    return absl::InvalidArgumentError(absl::StrFormat("%s: %s: %s", path(), name, reason));
  };
  if (!IsPlainName(name)) return refuse("not a plain name");
  const std::optional<uint64_t> expected = ByteSize(dtype, shape);
  if (shape.size() > kMaxRank || !expected || *expected != bytes.size()) {
    return refuse(absl::StrFormat("%s %s does not fit %u bytes", Name(dtype), ShapeString(shape),
                                  bytes.size()));
  }
  if (data_bytes_ % SizeOf(dtype) != 0) return refuse("would not be aligned");
  if (!HasRoomFor(name)) {
    return absl::ResourceExhaustedError(absl::StrFormat("%s: %s: no room in the header of %u bytes",
                                                        path(), name, header_capacity_));
  }
  if (!names_.emplace(name).second) return refuse("added twice");
  MOBI_RETURN_IF_ERROR(file_.WriteAt(kLengthBytes + header_capacity_ + data_bytes_, bytes));
  absl::StrAppendFormat(&header_, R"(,"%s":{"dtype":"%s","shape":%s,"data_offsets":[%u,%u]})", name,
                        Name(dtype), ShapeString(shape), data_bytes_, data_bytes_ + bytes.size());
  data_bytes_ += bytes.size();
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Finish() {
  header_ += '}';
  header_.resize(header_capacity_, ' ');
  std::string length(kLengthBytes, '\0');
  for (uint64_t i = 0; i < kLengthBytes; ++i) {
    length[i] = static_cast<char>(header_capacity_ >> (8 * i));
  }
  MOBI_RETURN_IF_ERROR(file_.WriteAt(0, AsBytes(length + header_)));
  return file_.Close();
}

}  // namespace mobi
