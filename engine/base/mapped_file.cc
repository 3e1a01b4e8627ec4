#include "engine/base/mapped_file.h"

#include <sys/mman.h>

#include <cerrno>
#include <utility>

#include "engine/base/file_reader.h"
#include "engine/base/status_macros.h"

namespace mobi {

absl::StatusOr<MappedFile> MappedFile::Open(const std::string& path, uint64_t max_bytes) {
  MOBI_ASSIGN_OR_RETURN(const FileDescriptor file, FileDescriptor::Open(path, max_bytes));
  const uint64_t size = file.size();
  void* data = nullptr;
  if (size > 0) data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (data == MAP_FAILED) return absl::ErrnoToStatus(errno, path + ": cannot be mapped");
  return MappedFile(static_cast<const std::byte*>(data), size);
}

void MappedFile::ReleasePages() const {
  if (data_ != nullptr) madvise(const_cast<std::byte*>(data_), size_, MADV_DONTNEED);
}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_);
}

}  // namespace mobi
