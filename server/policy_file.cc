#include "server/policy_file.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "server/policy_yaml.h"

namespace mobi {
namespace {

// What the wake-up counter's value means: reloads add one, stopping adds this.
constexpr uint64_t kStop = uint64_t{1} << 32;

absl::Status SystemError(const std::string& what) {
  const int error = errno;
  return absl::ErrnoToStatus(error, what);
}

// At most kMaxPolicyBytes + 1, which is one too many for the parser.
absl::StatusOr<std::string> ReadText(const std::string& path) {
  // Non-blocking, so that a pipe in the file's place does not hang the thread.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return SystemError(path);
  const auto close_fd = absl::MakeCleanup([fd] { close(fd); });
  struct stat info;
  if (fstat(fd, &info) != 0) return SystemError(path);
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(path + ": is not a file");
  std::string text(kMaxPolicyBytes + 1, '\0');
  size_t size = 0;
  while (size < text.size()) {
    const ssize_t count = read(fd, text.data() + size, text.size() - size);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return SystemError(path);
    if (count == 0) break;
    size += static_cast<size_t>(count);
  }
  text.resize(size);
  return text;
}

// Every folder whose entries decide what the path leads to: its own, and those of each link and of
// the file at the end.
std::vector<std::string> FoldersOf(const std::string& path) {
  std::vector<std::string> folders;
  std::error_code error;
  std::filesystem::path current = std::filesystem::absolute(path, error);
  constexpr int kMaxLinks = 16;
  for (int i = 0; i < kMaxLinks; ++i) {
    folders.push_back(current.parent_path());
    const std::filesystem::path target = std::filesystem::read_symlink(current, error);
    if (error) break;
    current = target.is_absolute() ? target : current.parent_path() / target;
  }
  const std::filesystem::path real = std::filesystem::canonical(path, error);
  if (!error) folders.push_back(real.parent_path());
  std::sort(folders.begin(), folders.end());
  folders.erase(std::unique(folders.begin(), folders.end()), folders.end());
  return folders;
}

}  // namespace

absl::StatusOr<PolicyText> ReadPolicyFile(const std::string& path) {
  MOBI_ASSIGN_OR_RETURN(std::string yaml, ReadText(path));
  MOBI_ASSIGN_OR_RETURN(Policy policy, ParsePolicy(yaml, path));
  return PolicyText{std::move(yaml), std::move(policy)};
}

absl::StatusOr<std::unique_ptr<PolicyFile>> PolicyFile::Watch(const std::string& path,
                                                              const std::string& loaded_yaml,
                                                              const PolicyFileOptions& options,
                                                              Apply apply, Report report) {
  std::unique_ptr<PolicyFile> file(
      new PolicyFile(path, loaded_yaml, options, std::move(apply), std::move(report)));
  file->notify_fd_ = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
  if (file->notify_fd_ < 0) return absl::ResourceExhaustedError("inotify: no watches are left");
  file->wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (file->wake_fd_ < 0) return SystemError("eventfd");
  file->UpdateWatches();
  file->thread_ = std::thread([self = file.get()] { self->Run(); });
  return file;
}

PolicyFile::~PolicyFile() {
  if (thread_.joinable()) {
    eventfd_write(wake_fd_, kStop);
    thread_.join();
  }
  if (notify_fd_ >= 0) close(notify_fd_);
  if (wake_fd_ >= 0) close(wake_fd_);
}

void PolicyFile::Reload() { eventfd_write(wake_fd_, 1); }

void PolicyFile::Run() {
  const auto millis = [](Duration duration) { return static_cast<int>(ToMillis(duration)); };
  constexpr int kMaxUnquiet = 20;  // a busy folder must not put a change off for ever
  bool asked = false;
  int changes = 1;  // since the caller read the file, perhaps
  for (;;) {
    pollfd fds[] = {{.fd = notify_fd_, .events = POLLIN, .revents = 0},
                    {.fd = wake_fd_, .events = POLLIN, .revents = 0}};
    const int ready = poll(fds, 2, millis(changes > 0 ? options_.settle : options_.poll));
    eventfd_t wakes = 0;
    if (eventfd_read(wake_fd_, &wakes) == 0) {
      if (wakes >= kStop) return;
      asked = true;
    }
    if (fds[0].revents != 0) {
      DrainNotifications();
      ++changes;
    }
    // Quiet after a change, asked for, or time to look.
    if (ready != 0 && !asked && changes < kMaxUnquiet) continue;
    UpdateWatches();
    LoadIfChanged(std::exchange(asked, false));
    changes = 0;
  }
}

void PolicyFile::DrainNotifications() {
  char buffer[4096];
  while (read(notify_fd_, buffer, sizeof(buffer)) > 0) {
  }
}

void PolicyFile::UpdateWatches() {
  std::vector<std::pair<std::string, int>> watches;
  for (const std::string& folder : FoldersOf(path_)) {
    const int watch = inotify_add_watch(
        notify_fd_, folder.c_str(),
        IN_CLOSE_WRITE | IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_ONLYDIR);
    if (watch >= 0) watches.emplace_back(folder, watch);
  }
  for (const auto& [folder, watch] : watches_) {
    const bool kept = std::any_of(watches.begin(), watches.end(),
                                  [id = watch](const auto& entry) { return entry.second == id; });
    if (!kept) inotify_rm_watch(notify_fd_, watch);
  }
  watches_ = std::move(watches);
}

void PolicyFile::LoadIfChanged(bool always) {
  const auto text = ReadText(path_);
  if (!text.ok()) {
    const bool news = text.status() != unreadable_;
    unreadable_ = text.status();
    if (always || news) report_(unreadable_);
    return;
  }
  const bool was_unreadable = !std::exchange(unreadable_, absl::OkStatus()).ok();
  if (!always && *text == last_yaml_) {
    if (was_unreadable) report_(last_status_);
    return;
  }
  last_yaml_ = *text;
  auto policy = ParsePolicy(*text, path_);
  last_status_ = policy.status();
  if (policy.ok()) {
    const absl::Status applied = apply_({*text, *std::move(policy)});
    last_status_ = applied.ok()
                       ? applied
                       : absl::Status(applied.code(), absl::StrCat(path_, ": ", applied.message()));
  }
  report_(last_status_);
}

}  // namespace mobi
