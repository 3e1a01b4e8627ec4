// A file mapped read-only into memory: reading a checkpoint copies nothing, and pages that are
// never touched are never read. Owns the mapping; spans into bytes() die with it. Immutable, so
// safe from any thread. A file that somebody shortens while it is mapped faults on access, as with
// any mmap: checkpoints are replaced by rename, never written in place.
#ifndef MOBI_ENGINE_BASE_MAPPED_FILE_H_
#define MOBI_ENGINE_BASE_MAPPED_FILE_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace mobi {

class MappedFile {
 public:
  // NOT_FOUND, PERMISSION_DENIED and so on as the system says; INVALID_ARGUMENT for what is not a
  // regular file or is longer than max_bytes. Never blocks on a pipe or device. Symbolic links are
  // followed (model hubs keep their caches that way).
  static absl::StatusOr<MappedFile> Open(const std::string& path,
                                         uint64_t max_bytes = std::numeric_limits<int64_t>::max());

  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  absl::Span<const std::byte> bytes() const { return {data_, size_}; }
  // The process no longer holds what it has read; reading again fetches it from the file.
  void ReleasePages() const;
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

 private:
  MappedFile(const std::byte* data, size_t size) : data_(data), size_(size) {}

  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_BASE_MAPPED_FILE_H_
