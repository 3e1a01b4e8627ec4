// Who may call what: bearer tokens, known by their SHA-256, with scopes. Looked at by every method
// of every service before it does anything. Without a token file every call is allowed; with one,
// every call without a token that has the method's scope is refused. Thread-safe.
//
// The file has a line per token: a name (for people), its scopes joined by commas, and the SHA-256
// of the token in hex. '#' starts a comment.
//   shop      generate         2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b
//   operator  generate,admin   9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
#ifndef MOBI_SERVER_ACCESS_CONTROL_H_
#define MOBI_SERVER_ACCESS_CONTROL_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/mutex.h"
#include "grpcpp/server_context.h"
#include "server/watched_files.h"

namespace mobi {

enum class Scope : uint8_t {
  kGenerate = 1,  // the data port
  kAdmin = 2,     // the admin port
};

struct AccessToken {
  std::string name;
  uint8_t scopes = 0;  // of Scope's bits
  std::array<uint8_t, 32> sha256{};
};

// INVALID_ARGUMENT "PATH:LINE: reason"; no line is refused as well, since nobody could call.
absl::StatusOr<std::vector<AccessToken>> ParseAccessTokens(std::string_view text,
                                                           const std::string& path);

class AccessControl {
 public:
  // `path` empty: every call is allowed. Errors of the file as one line.
  static absl::StatusOr<std::unique_ptr<AccessControl>> Open(const std::string& path);

  bool enabled() const { return !path_.empty(); }

  // UNAUTHENTICATED: no token, or one that is not known. PERMISSION_DENIED: it lacks the scope.
  absl::Status Check(const grpc::ServerContextBase& context, Scope scope) const;
  // The same for the value of the header `authorization`; nullopt when there is none.
  absl::Status CheckHeader(std::optional<std::string_view> authorization, Scope scope) const;

  // Takes the file over when it changed: true. An error says why the old tokens stay. For one
  // thread at a time.
  absl::StatusOr<bool> Reload();

 private:
  explicit AccessControl(const std::string& path) : path_(path), file_({path}) {}

  const std::string path_;
  WatchedFiles file_;
  mutable Mutex mutex_;
  std::vector<AccessToken> tokens_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mobi

#endif  // MOBI_SERVER_ACCESS_CONTROL_H_
