// A file read piece by piece into the caller's memory, without going through the page cache where
// that is asked for and the pages are not there: what is read once need not take memory twice.
// Immutable, so safe from any thread.
#ifndef MOBI_ENGINE_BASE_FILE_READER_H_
#define MOBI_ENGINE_BASE_FILE_READER_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace mobi {

// An open descriptor of a regular file; owns it.
class FileDescriptor {
 public:
  // As MappedFile::Open says.
  static absl::StatusOr<FileDescriptor> Open(const std::string& path, uint64_t max_bytes);

  FileDescriptor() = default;
  explicit FileDescriptor(int fd, uint64_t size = 0) : fd_(fd), size_(size) {}
  FileDescriptor(FileDescriptor&& other) noexcept { *this = std::move(other); }
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor();

  int get() const { return fd_; }
  uint64_t size() const { return size_; }  // when it was opened

 private:
  int fd_ = -1;
  uint64_t size_ = 0;
};

class FileReader {
 public:
  // Where pieces begin in the file and in memory, and what their room is a multiple of.
  static constexpr size_t kAlignment = 4096;

  // Errors as MappedFile::Open's. `direct`: past the page cache, on file systems that can.
  static absl::StatusOr<FileReader> Open(const std::string& path, uint64_t max_bytes, bool direct);

  const std::string& path() const { return path_; }
  uint64_t size() const { return file_.size(); }
  // Reads [offset, offset + bytes) to `to`, which has room for whole multiples of kAlignment.
  // DATA_LOSS when the file has become shorter; else what the system says. Names the path.
  absl::Status Read(uint64_t offset, size_t bytes, std::byte* to) const;

 private:
  FileReader(std::string path, FileDescriptor file, FileDescriptor direct)
      : path_(std::move(path)), file_(std::move(file)), direct_(std::move(direct)) {}
  bool IsCached(uint64_t offset, size_t bytes) const;
  absl::Status ReadAll(bool direct, uint64_t offset, size_t bytes, std::byte* to) const;

  std::string path_;
  FileDescriptor file_;
  FileDescriptor direct_;  // the same file past the page cache, or none
};

}  // namespace mobi

#endif  // MOBI_ENGINE_BASE_FILE_READER_H_
