#include "engine/base/file_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace mobi {

absl::StatusOr<FileDescriptor> FileDescriptor::Open(const std::string& path, uint64_t max_bytes) {
  // O_NONBLOCK: opening a pipe without a writer would wait for ever.
  FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat info;
  if (file.fd_ < 0 || fstat(file.fd_, &info) != 0) return absl::ErrnoToStatus(errno, path);
  file.size_ = static_cast<uint64_t>(info.st_size);
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(path + ": not a regular file");
  if (file.size_ > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", file.size_, " bytes, the limit is ", max_bytes));
  }
  return file;
}

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(size_, other.size_);
  return *this;
}

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) close(fd_);
}

absl::StatusOr<FileReader> FileReader::Open(const std::string& path, uint64_t max_bytes,
                                            bool direct) {
  MOBI_ASSIGN_OR_RETURN(FileDescriptor file, FileDescriptor::Open(path, max_bytes));
  FileDescriptor past_cache;
  if (direct) {
    // By its descriptor: the path may name another file by now. Without /proc, or on a file system
    // that has no such reads, there is none, which is no error.
    const std::string self = absl::StrCat("/proc/self/fd/", file.get());
    past_cache = FileDescriptor(open(self.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
  }
  return FileReader(path, std::move(file), std::move(past_cache));
}

// The last byte stands for the piece: what opened the file read its beginning, and some more.
bool FileReader::IsCached(uint64_t offset, size_t bytes) const {
  char byte;
  const iovec to = {&byte, 1};
  return preadv2(file_.get(), &to, 1, static_cast<off_t>(offset + bytes - 1), RWF_NOWAIT) == 1;
}

absl::Status FileReader::Read(uint64_t offset, size_t bytes, std::byte* to) const {
  if (bytes == 0) return absl::OkStatus();
  if (direct_.get() < 0 || IsCached(offset, bytes)) return ReadAll(false, offset, bytes, to);
  const absl::Status status = ReadAll(true, offset, bytes, to);
  // Asking has made the kernel fetch the page that it was asked of: to the next who asks it would
  // stand for a piece that is not there.
  posix_fadvise(file_.get(), static_cast<off_t>((offset + bytes - 1) / kAlignment * kAlignment),
                kAlignment, POSIX_FADV_DONTNEED);
  return status;
}

absl::Status FileReader::ReadAll(bool direct, uint64_t offset, size_t bytes, std::byte* to) const {
  size_t done = 0;
  while (done < bytes) {
    // What a direct read leaves off in the middle of a block goes through the page cache.
    direct = direct && done % kAlignment == 0;
    const size_t left = bytes - done;
    const size_t asked = direct ? (left + kAlignment - 1) / kAlignment * kAlignment : left;
    const ssize_t n = pread(direct ? direct_.get() : file_.get(), to + done, asked,
                            static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EINVAL && direct) {
      direct = false;  // a file system with larger blocks, or that refuses only now
      continue;
    }
    if (n < 0) {
      return absl::ErrnoToStatus(errno, absl::StrCat(path_, ": reading at ", offset + done));
    }
    if (n == 0) {
      return absl::DataLossError(absl::StrCat(path_, ": ends at ", offset + done, " of ", size(),
                                              " bytes: shortened while it is read"));
    }
    done += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

}  // namespace mobi
