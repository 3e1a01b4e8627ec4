#include "server/watched_files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr size_t kMaxFileBytes = 1 << 20;

absl::StatusOr<std::string> ReadText(const std::string& path) {
  // Non-blocking, so that a pipe in the file's place does not hang the thread.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return absl::ErrnoToStatus(errno, path);
  const auto close_fd = absl::MakeCleanup([fd] { close(fd); });
  struct stat info;
  if (fstat(fd, &info) != 0) return absl::ErrnoToStatus(errno, path);
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(path + ": is not a file");
  std::string text(kMaxFileBytes + 1, '\0');
  size_t size = 0;
  while (size < text.size()) {
    const ssize_t count = read(fd, text.data() + size, text.size() - size);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return absl::ErrnoToStatus(errno, path);
    if (count == 0) break;
    size += static_cast<size_t>(count);
  }
  if (size > kMaxFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": is longer than ", kMaxFileBytes, " bytes"));
  }
  text.resize(size);
  text.shrink_to_fit();
  return text;
}

absl::StatusOr<std::vector<std::string>> ReadTexts(const std::vector<std::string>& paths) {
  std::vector<std::string> texts;
  for (const std::string& path : paths) {
    MOBI_ASSIGN_OR_RETURN(std::string text, ReadText(path));
    texts.push_back(std::move(text));
  }
  return texts;
}

}  // namespace

absl::StatusOr<std::optional<std::vector<std::string>>> WatchedFiles::Read() {
  auto texts = ReadTexts(paths_);
  if (last_ && *last_ == texts) return std::nullopt;
  last_ = texts;
  MOBI_RETURN_IF_ERROR(texts.status());
  return std::optional(*std::move(texts));
}

}  // namespace mobi
