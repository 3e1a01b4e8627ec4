// Files that are read again when they change: keys, certificates, tokens. Looked at when asked, by
// content, so that rewriting, renaming and symlink swaps (as Kubernetes does with Secrets) are all
// seen. One thread at a time.
#ifndef MOBI_SERVER_WATCHED_FILES_H_
#define MOBI_SERVER_WATCHED_FILES_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace mobi {

class WatchedFiles {
 public:
  explicit WatchedFiles(std::vector<std::string> paths) : paths_(std::move(paths)) {}

  // The texts of all files, in order of the paths, when this differs from what the last call
  // found; nothing when it does not. Errors begin with the path and come once until they change.
  absl::StatusOr<std::optional<std::vector<std::string>>> Read();

 private:
  const std::vector<std::string> paths_;
  std::optional<absl::StatusOr<std::vector<std::string>>> last_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_WATCHED_FILES_H_
