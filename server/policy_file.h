// The policy file on disk: read with bounds, then watched. A change (rewritten, replaced, or
// swapped by symlink as Kubernetes does with ConfigMaps) or a call of Reload applies it to the
// controller; a bad file changes nothing and is reported. Owns a thread; methods are thread-safe.
#ifndef MOBI_SERVER_POLICY_FILE_H_
#define MOBI_SERVER_POLICY_FILE_H_

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "server/policy.h"

namespace mobi {

struct PolicyText {
  std::string yaml;
  Policy policy;
};

// Errors begin with the path: NOT_FOUND and others of the system, INVALID_ARGUMENT "PATH:LINE:
// ...".
absl::StatusOr<PolicyText> ReadPolicyFile(const std::string& path);

struct PolicyFileOptions {
  // A change is read when nothing has happened for so long, so that half a change is not.
  Duration settle = std::chrono::milliseconds(50);
  // Also looked at without a notification, which not every file system sends.
  Duration poll = std::chrono::seconds(10);
};

class PolicyFile {
 public:
  // Puts the policy in force. Called on the watching thread, one call at a time.
  using Apply = std::function<absl::Status(const PolicyText& text)>;
  // Hears of every reload and of a file that cannot be read: OK, or why the old policy stays.
  using Report = std::function<void(const absl::Status& status)>;

  // `loaded_yaml`: the text that is in force already, which is not applied again until it changes.
  // RESOURCE_EXHAUSTED: the system has no more watches.
  static absl::StatusOr<std::unique_ptr<PolicyFile>> Watch(const std::string& path,
                                                           const std::string& loaded_yaml,
                                                           const PolicyFileOptions& options,
                                                           Apply apply, Report report);
  ~PolicyFile();
  PolicyFile(const PolicyFile&) = delete;
  PolicyFile& operator=(const PolicyFile&) = delete;

  // Applies and reports soon, changed or not (SIGHUP).
  void Reload();

 private:
  PolicyFile(const std::string& path, const std::string& loaded_yaml,
             const PolicyFileOptions& options, Apply apply, Report report)
      : path_(path),
        options_(options),
        apply_(std::move(apply)),
        report_(std::move(report)),
        last_yaml_(loaded_yaml) {}
  void Run();
  // Watches the folders in which the path's links and the file itself are.
  void UpdateWatches();
  void DrainNotifications();
  void LoadIfChanged(bool always);

  const std::string path_;
  const PolicyFileOptions options_;
  const Apply apply_;
  const Report report_;
  int notify_fd_ = -1;
  int wake_fd_ = -1;
  // Of the thread.
  std::string last_yaml_;
  absl::Status last_status_;  // of last_yaml_
  absl::Status unreadable_;   // OK when the file could be read
  std::vector<std::pair<std::string, int>> watches_;
  std::thread thread_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_POLICY_FILE_H_
