#include "server/policy_file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace mobi {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

std::string YamlOf(float ceiling) {
  return absl::StrFormat("windows: [{name: all, ceiling_bits: %g}]\n", ceiling);
}

class PolicyFileTest : public testing::Test {
 protected:
  PolicyFileTest() {
    std::string pattern = testing::TempDir() + "policy-XXXXXX";
    folder_ = mkdtemp(pattern.data());
    path_ = folder_ / "policy.yaml";
  }
  ~PolicyFileTest() override {
    file_.reset();
    fs::remove_all(folder_);
  }

  static void Write(const fs::path& path, const std::string& text) { std::ofstream(path) << text; }

  void Watch(const std::string& loaded, Duration poll = std::chrono::hours(1)) {
    auto file = PolicyFile::Watch(
        path_, loaded, {.settle = std::chrono::milliseconds(20), .poll = poll},
        [this](const PolicyText& text) {
          std::lock_guard lock(mutex_);
          ceilings_.push_back(text.policy.windows[0].ceiling_bits);
          return refusal_;
        },
        [this](const absl::Status& status) {
          std::lock_guard lock(mutex_);
          reports_.push_back(status);
        });
    ASSERT_TRUE(file.ok()) << file.status();
    file_ = *std::move(file);
  }

  // True when the watcher's news fulfil the condition; a busy machine takes its time.
  template <typename Condition>
  bool Eventually(const Condition& condition) {
    for (int i = 0; i < 24'000; ++i) {
      {
        std::lock_guard lock(mutex_);
        if (condition()) return true;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }
  bool EventuallyAt(float ceiling) {
    return Eventually([&] { return !ceilings_.empty() && ceilings_.back() == ceiling; });
  }

  fs::path folder_;
  fs::path path_;
  std::mutex mutex_;
  std::vector<float> ceilings_;
  std::vector<absl::Status> reports_;
  absl::Status refusal_;
  std::unique_ptr<PolicyFile> file_;
};

TEST_F(PolicyFileTest, ReadsAndNamesWhatIsWrong) {
  Write(path_, YamlOf(5));
  const auto text = ReadPolicyFile(path_);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_EQ(text->policy.windows[0].ceiling_bits, 5);
  EXPECT_EQ(text->yaml, YamlOf(5));

  EXPECT_EQ(ReadPolicyFile(folder_ / "none").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(ReadPolicyFile(folder_).status().message()), HasSubstr("is not a file"));
  Write(path_, YamlOf(9));
  EXPECT_THAT(std::string(ReadPolicyFile(path_).status().message()),
              HasSubstr(path_.string() + ":1: windows[0].ceiling_bits: 9 is out of range"));
  Write(path_, std::string(1 << 20, ' '));
  EXPECT_THAT(std::string(ReadPolicyFile(path_).status().message()), HasSubstr("at most 262144"));
  // A pipe without a writer does not hang.
  fs::remove(path_);
  ASSERT_EQ(mkfifo(path_.c_str(), 0600), 0);
  EXPECT_THAT(std::string(ReadPolicyFile(path_).status().message()), HasSubstr("is not a file"));
}

TEST_F(PolicyFileTest, FollowsRewritingAndReplacing) {
  Write(path_, YamlOf(5));
  Watch(YamlOf(5));
  Write(path_, YamlOf(6));
  EXPECT_TRUE(EventuallyAt(6));
  Write(folder_ / "new", YamlOf(7));
  fs::rename(folder_ / "new", path_);
  EXPECT_TRUE(EventuallyAt(7));
  fs::remove(path_);
  EXPECT_TRUE(Eventually([&] { return !reports_.back().ok(); }));
  Write(path_, YamlOf(4));
  EXPECT_TRUE(EventuallyAt(4));
}

TEST_F(PolicyFileTest, FollowsConfigMapSwaps) {
  // As the kubelet does it: policy.yaml -> ..data/policy.yaml, ..data -> a dated folder that is
  // replaced by renaming a new link over it; then the old folder goes.
  const auto publish = [&](const std::string& version, float ceiling) {
    fs::create_directory(folder_ / version);
    Write(folder_ / version / "policy.yaml", YamlOf(ceiling));
    fs::create_symlink(version, folder_ / "..data_tmp");
    fs::rename(folder_ / "..data_tmp", folder_ / "..data");
  };
  publish("..2024_1", 5);
  fs::create_symlink("..data/policy.yaml", path_);
  Watch(YamlOf(5));
  for (int i = 2; i < 6; ++i) {
    publish(absl::StrFormat("..2024_%d", i), 3 + i * 0.5f);
    fs::remove_all(folder_ / absl::StrFormat("..2024_%d", i - 1));
    EXPECT_TRUE(EventuallyAt(3 + i * 0.5f)) << i;
  }
  std::lock_guard lock(mutex_);
  EXPECT_EQ(ceilings_.size(), 4u);
  for (const absl::Status& report : reports_) EXPECT_TRUE(report.ok()) << report;
}

TEST_F(PolicyFileTest, FollowsAFileBehindALinkElsewhere) {
  const fs::path other = folder_ / "other";
  fs::create_directory(other);
  Write(other / "real.yaml", YamlOf(5));
  fs::create_symlink(other / "real.yaml", path_);
  Watch(YamlOf(5));
  Write(other / "real.yaml", YamlOf(6));
  EXPECT_TRUE(EventuallyAt(6));
}

TEST_F(PolicyFileTest, BadFilesChangeNothingAndAreReportedOnce) {
  Write(path_, YamlOf(5));
  Watch(YamlOf(5), std::chrono::milliseconds(50));
  Write(path_, "windows: 5\n");
  EXPECT_TRUE(Eventually([&] { return !reports_.empty(); }));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));  // several polls
  {
    std::lock_guard lock(mutex_);
    ASSERT_EQ(reports_.size(), 1u);
    EXPECT_THAT(std::string(reports_[0].message()), HasSubstr("policy.yaml:1: windows: must be"));
    EXPECT_TRUE(ceilings_.empty());
  }
  fs::remove(path_);
  EXPECT_TRUE(Eventually([&] { return reports_.size() == 2; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  Write(path_, YamlOf(6));
  EXPECT_TRUE(EventuallyAt(6));
  std::lock_guard lock(mutex_);
  EXPECT_EQ(reports_.size(), 3u);
}

TEST_F(PolicyFileTest, ReloadAppliesAnUnchangedFileAgain) {
  Write(path_, YamlOf(5));
  Watch(YamlOf(5));
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_TRUE(ceilings_.empty());
  file_->Reload();
  EXPECT_TRUE(EventuallyAt(5));
}

TEST_F(PolicyFileTest, AFileThatComesBackIsReportedWell) {
  Write(path_, YamlOf(5));
  Watch(YamlOf(5));
  fs::rename(path_, folder_ / "away");
  EXPECT_TRUE(Eventually([&] { return !reports_.empty() && !reports_.back().ok(); }));
  fs::rename(folder_ / "away", path_);
  EXPECT_TRUE(Eventually([&] { return reports_.back().ok(); }));
  EXPECT_TRUE(ceilings_.empty());
}

TEST_F(PolicyFileTest, AChangeMadeBeforeWatchingIsSeen) {
  Write(path_, YamlOf(6));
  Watch(YamlOf(5));
  EXPECT_TRUE(EventuallyAt(6));
}

TEST_F(PolicyFileTest, ARefusalByTheControllerIsReported) {
  Write(path_, YamlOf(5));
  refusal_ = absl::FailedPreconditionError("no promql here");
  Watch("");
  EXPECT_TRUE(Eventually([&] { return !reports_.empty(); }));
  std::lock_guard lock(mutex_);
  EXPECT_EQ(reports_[0].code(), refusal_.code());
  EXPECT_EQ(reports_[0].message(), path_.string() + ": no promql here");
}

TEST_F(PolicyFileTest, ABusyFolderDoesNotPutAChangeOffForEver) {
  Write(path_, YamlOf(5));
  Watch(YamlOf(5));
  std::atomic<bool> stop = false;
  std::thread noise([&] {
    while (!stop) {
      Write(folder_ / "noise", "x");
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  Write(path_, YamlOf(6));
  EXPECT_TRUE(EventuallyAt(6));
  stop = true;
  noise.join();
}

}  // namespace
}  // namespace mobi
