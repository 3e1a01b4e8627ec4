// Files read in pieces, past the page cache or through it: every byte once, the digests of whole
// files, and what an interrupted or shortened file is told as.
#include "engine/base/file_stream.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/base/file_reader.h"
#include "engine/base/file_writer.h"
#include "engine/base/mapped_file.h"
#include "engine/base/mutex.h"
#include "engine/base/sha256.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

using ::testing::HasSubstr;

constexpr size_t kMany = (13 << 20) + 4097;  // several pieces and an odd end

// Whether direct reads are asked for.
class FileStreamTest : public testing::TestWithParam<bool> {
 protected:
  std::string Write(const std::string& name, size_t size) {
    std::string text(size, '\0');
    std::mt19937_64 random(size);
    for (size_t i = 0; i < size; i += sizeof(uint64_t)) {
      const uint64_t value = random();
      std::memcpy(&text[i], &value, std::min(sizeof(value), size - i));
    }
    EXPECT_EQ(WriteFile(dir_.Sub(name), text), absl::OkStatus());
    files_.push_back({dir_.Sub(name), INT64_MAX});
    texts_.push_back(text);
    return dir_.Sub(name);
  }

  // Puts the pieces where they belong in texts that were of another letter before.
  absl::Status Stream(StreamOptions options = {}) {
    options.direct = GetParam();
    got_.clear();
    for (const std::string& text : texts_) got_.emplace_back(text.size(), '?');
    times_.assign(texts_.size(), 0);
    return StreamFiles(absl::MakeSpan(files_), options,
                       [&](size_t file, uint64_t offset, absl::Span<const std::byte> bytes) {
                         EXPECT_EQ(offset % FileReader::kAlignment, 0u);
                         const auto address = reinterpret_cast<uintptr_t>(bytes.data());
                         EXPECT_EQ(address % FileReader::kAlignment, 0u);
                         ASSERT_LE(offset + bytes.size(), got_[file].size());
                         std::memcpy(&got_[file][offset], bytes.data(), bytes.size());
                         MutexLock lock(mutex_);
                         times_[file] += bytes.size();
                       });
  }

  TempDir dir_;
  std::vector<StreamedFile> files_;
  std::vector<std::string> texts_;
  std::vector<std::string> got_;
  Mutex mutex_;
  std::vector<uint64_t> times_;  // bytes given, of each file
};

TEST_P(FileStreamTest, GivesEveryByteOnceAndTheDigestsOfWholeFiles) {
  for (const size_t size :
       {size_t{0}, size_t{1}, size_t{4095}, size_t{4096}, size_t{4097}, size_t{4} << 20, kMany}) {
    Write(std::to_string(size), size);
  }
  ASSERT_EQ(Stream(), absl::OkStatus());
  for (size_t i = 0; i < texts_.size(); ++i) {
    EXPECT_TRUE(got_[i] == texts_[i]) << files_[i].path;
    EXPECT_EQ(times_[i], texts_[i].size());
    Sha256 hash;
    hash.Update(AsBytes(texts_[i]));
    EXPECT_EQ(files_[i].sha256, hash.HexDigest());
  }
}

TEST_P(FileStreamTest, WithoutHashesTheBytesAreTheSame) {
  Write("a", kMany);
  Write("b", 5000);
  ASSERT_EQ(Stream({.hash = false}), absl::OkStatus());
  EXPECT_TRUE(got_ == texts_);
  EXPECT_EQ(files_[0].sha256, "");
}

TEST_P(FileStreamTest, TellsOfEveryByteWhenItIsDone) {
  Write("a", kMany);
  Write("b", kMany);
  uint64_t last = 0;
  StreamOptions options;
  options.progress = [&](uint64_t done, uint64_t total) {
    EXPECT_GT(done, last);
    EXPECT_EQ(total, 2 * kMany);
    last = done;
  };
  ASSERT_EQ(Stream(options), absl::OkStatus());
  EXPECT_EQ(last, 2 * kMany);
}

TEST_P(FileStreamTest, NoFilesAreNoWork) { EXPECT_EQ(Stream(), absl::OkStatus()); }

TEST_P(FileStreamTest, RefusesWhatIsNoFileOrTooLong) {
  files_ = {{dir_.Sub("none"), INT64_MAX}};
  EXPECT_TRUE(absl::IsNotFound(Stream()));
  files_ = {{dir_.path(), INT64_MAX}};
  EXPECT_THAT(std::string(Stream().message()), HasSubstr(dir_.path() + ": not a regular file"));
  files_.clear();
  Write("a", 100);
  files_[0].max_bytes = 99;
  EXPECT_THAT(std::string(Stream().message()), HasSubstr("a: 100 bytes, the limit is 99"));
}

TEST_P(FileStreamTest, AFileThatIsShortenedOnTheWayIsAnErrorOfItsName) {
  const std::string path = Write("short", kMany);
  const auto reader = FileReader::Open(path, INT64_MAX, GetParam());
  ASSERT_EQ(reader.status(), absl::OkStatus());
  std::filesystem::resize_file(path, 5000);
  const std::unique_ptr<std::byte, decltype(&std::free)> room(
      static_cast<std::byte*>(std::aligned_alloc(FileReader::kAlignment, 16384)), &std::free);
  const absl::Status status = reader->Read(0, 16384, room.get());
  EXPECT_TRUE(absl::IsDataLoss(status));
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("short: ends at 5000 of " + std::to_string(kMany) + " bytes: shortened"));
  EXPECT_EQ(std::memcmp(room.get(), texts_[0].data(), 5000), 0);
}

INSTANTIATE_TEST_SUITE_P(Ways, FileStreamTest, testing::Bool(),
                         [](const auto& info) { return info.param ? "Direct" : "Cached"; });

size_t PagesInCache(const std::string& path) {
  const auto file = MappedFile::Open(path);
  const auto bytes = file->bytes();
  std::vector<unsigned char> pages((bytes.size() + 4095) / 4096);
  EXPECT_EQ(mincore(const_cast<std::byte*>(bytes.data()), bytes.size(), pages.data()), 0);
  return static_cast<size_t>(
      std::count_if(pages.begin(), pages.end(), [](auto p) { return p & 1; }));
}

TEST(DirectReadTest, LeavesThePageCacheAsItWas) {
  TempDir dir;
  const std::string path = dir.Sub("f");
  ASSERT_EQ(WriteFile(path, std::string(kMany, 'x')), absl::OkStatus());
  const int fd = open(path.c_str(), O_RDONLY);
  posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  close(fd);
  const int direct = open(path.c_str(), O_RDONLY | O_DIRECT);
  if (direct >= 0) close(direct);
  if (direct < 0 || PagesInCache(path) > 0) {
    GTEST_SKIP() << "NOT RUN: the file system of " << dir.path() << " is its page cache";
  }
  std::vector<StreamedFile> files = {{path, INT64_MAX}};
  const auto nothing = [](auto, auto, auto) {};
  for (int start = 1; start <= 2; ++start) {
    ASSERT_EQ(StreamFiles(absl::MakeSpan(files), {.direct = true}, nothing), absl::OkStatus());
    EXPECT_EQ(PagesInCache(path), 0u) << "start " << start;
  }
  ASSERT_EQ(StreamFiles(absl::MakeSpan(files), {.direct = false}, nothing), absl::OkStatus());
  const size_t cached = PagesInCache(path);
  EXPECT_GT(cached, 0u);
  ASSERT_EQ(StreamFiles(absl::MakeSpan(files), {.direct = true}, nothing), absl::OkStatus());
  EXPECT_EQ(PagesInCache(path), cached) << "what is there stays for the next start";
}

}  // namespace
}  // namespace mobi
