#include "engine/base/file_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "engine/base/status_macros.h"

namespace mobi {
namespace {

// The system's code for a full disk or an exceeded quota is not the one that callers look for.
absl::Status SystemError(int error, const std::string& what) {
  const absl::Status status = absl::ErrnoToStatus(error, what);
  if (error != ENOSPC && error != EDQUOT && error != EFBIG) return status;
  return absl::ResourceExhaustedError(status.message());
}

}  // namespace

absl::StatusOr<FileWriter> FileWriter::Create(const std::string& path) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd < 0) return SystemError(errno, path + ": cannot be created");
  return FileWriter(path, fd);
}

FileWriter::FileWriter(FileWriter&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}

FileWriter::~FileWriter() {
  if (fd_ >= 0) close(fd_);
}

absl::Status FileWriter::WriteAt(uint64_t offset, absl::Span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = pwrite(fd_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return SystemError(errno, path_ + ": cannot be written");
    bytes.remove_prefix(static_cast<size_t>(written));
    offset += static_cast<uint64_t>(written);
  }
  return absl::OkStatus();
}

absl::Status FileWriter::Close() {
  const int fd = std::exchange(fd_, -1);
  const int sync_error = fsync(fd) == 0 ? 0 : errno;
  const int close_error = close(fd) == 0 ? 0 : errno;
  const int error = sync_error != 0 ? sync_error : close_error;
  return error == 0 ? absl::OkStatus() : SystemError(error, path_ + ": cannot be written");
}

absl::Status WriteFile(const std::string& path, std::string_view contents) {
  MOBI_ASSIGN_OR_RETURN(FileWriter file, FileWriter::Create(path));
  MOBI_RETURN_IF_ERROR(file.WriteAt(0, AsBytes(contents)));
  return file.Close();
}

absl::Status SyncDirectory(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return SystemError(errno, path);
  const int error = fsync(fd) == 0 ? 0 : errno;
  close(fd);
  return error == 0 ? absl::OkStatus() : SystemError(error, path + ": cannot be synced");
}

}  // namespace mobi
