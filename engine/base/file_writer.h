// A file being written: every byte written or an error, on disk or an error. Used where a torn file
// would be worse than none. Owns the descriptor; not thread-safe. A file that is not closed by
// Close is as good as missing: the caller removes it.
#ifndef MOBI_ENGINE_BASE_FILE_WRITER_H_
#define MOBI_ENGINE_BASE_FILE_WRITER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace mobi {

class FileWriter {
 public:
  // Creates PATH, which must not exist. Errors of all methods name the path and the system's
  // reason; a full disk is RESOURCE_EXHAUSTED.
  static absl::StatusOr<FileWriter> Create(const std::string& path);

  FileWriter(FileWriter&& other) noexcept;
  FileWriter& operator=(FileWriter&&) = delete;
  ~FileWriter();

  absl::Status WriteAt(uint64_t offset, absl::Span<const std::byte> bytes);
  // fsync and close.
  absl::Status Close();

  const std::string& path() const { return path_; }

 private:
  FileWriter(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}

  std::string path_;
  int fd_ = -1;
};

inline absl::Span<const std::byte> AsBytes(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

// Create, write, Close.
absl::Status WriteFile(const std::string& path, std::string_view contents);

// Makes creations and renames inside a folder durable.
absl::Status SyncDirectory(const std::string& path);

}  // namespace mobi

#endif  // MOBI_ENGINE_BASE_FILE_WRITER_H_
