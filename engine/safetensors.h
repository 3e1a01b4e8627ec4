// The safetensors container: a little-endian 64-bit header length, a JSON header, raw tensors.
// Reader: every claim of the header is checked against the file before a tensor can be touched;
// tensors are views into the mapping. Writer: streams, so the largest thing in memory is one
// tensor. Readers are immutable and safe from any thread; a writer belongs to one. Source:
// https://github.com/huggingface/safetensors (format).
#ifndef MOBI_ENGINE_SAFETENSORS_H_
#define MOBI_ENGINE_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/base/file_writer.h"
#include "engine/base/mapped_file.h"
#include "kernels/tensor.h"

namespace mobi {

template <typename T>
absl::Span<const T> ElementsOf(absl::Span<const std::byte> bytes) {
  return {reinterpret_cast<const T*>(bytes.data()), bytes.size() / sizeof(T)};
}

// A view of a tensor in host memory. The bytes are little-endian, row-major, and aligned to the
// element size.
struct HostTensor {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  absl::Span<const std::byte> bytes;

  int64_t num_elements() const;
  template <typename T>
  absl::Span<const T> As() const {
    return ElementsOf<T>(bytes);
  }
};

// Index of the first value that is infinite or not a number; `bytes` are whole elements of a float
// type.
std::optional<size_t> FirstNonFinite(DType dtype, absl::Span<const std::byte> bytes);

// "[2, 3]".
std::string ShapeString(absl::Span<const int64_t> shape);

// Headers longer than this are refused: 25,000 tensors fit.
inline constexpr uint64_t kMaxSafetensorsHeaderBytes = 4 << 20;

// Checks a whole file given as bytes and returns its tensors in the order of their offsets. `file`
// is named in errors. INVALID_ARGUMENT: the header lies or is broken; UNIMPLEMENTED: a dtype that
// is not F32, F16, BF16, I32 or U8.
absl::StatusOr<std::vector<HostTensor>> ParseSafetensors(absl::Span<const std::byte> bytes,
                                                         std::string_view file);

class SafetensorsFile {
 public:
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);

  SafetensorsFile(SafetensorsFile&&) = default;
  SafetensorsFile& operator=(SafetensorsFile&&) = default;

  const std::string& path() const { return path_; }
  // The whole file, into which the tensors are views.
  absl::Span<const std::byte> bytes() const { return file_.bytes(); }
  const std::vector<HostTensor>& tensors() const { return tensors_; }
  void ReleasePages() const { file_.ReleasePages(); }
  // nullptr when there is none of that name.
  const HostTensor* Find(std::string_view name) const;

 private:
  SafetensorsFile() = default;

  std::string path_;
  MappedFile file_;
  std::vector<HostTensor> tensors_;
  std::map<std::string, size_t, std::less<>> index_;
};

// Writes PATH tensor by tensor. The header comes first in the file but is known last, so room is
// kept for it and padded with spaces, as the format allows. Without Finish the file is left broken:
// the caller removes it.
class SafetensorsWriter {
 public:
  // Creates the file, which must not exist. RESOURCE_EXHAUSTED and so on as the system says.
  static absl::StatusOr<SafetensorsWriter> Create(const std::string& path,
                                                  uint64_t header_capacity);

  // True when the header has room for one more tensor of this name.
  bool HasRoomFor(std::string_view name) const;
  // INVALID_ARGUMENT: the name holds more than letters, digits and ._-, bytes do not fit the shape,
  // the tensor would not be aligned to its elements,
  // or the name is taken. RESOURCE_EXHAUSTED: no room in the header, or the disk is full.
  absl::Status Add(std::string_view name, DType dtype, absl::Span<const int64_t> shape,
                   absl::Span<const std::byte> bytes);
  // Writes the header, fsyncs and closes.
  absl::Status Finish();

  const std::string& path() const { return file_.path(); }
  uint64_t data_bytes() const { return data_bytes_; }

 private:
  SafetensorsWriter(FileWriter file, uint64_t header_capacity);

  FileWriter file_;
  uint64_t header_capacity_;
  uint64_t data_bytes_ = 0;
  std::string header_;  // JSON without the closing brace
  std::set<std::string, std::less<>> names_;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_SAFETENSORS_H_
