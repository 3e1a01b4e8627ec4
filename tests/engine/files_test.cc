// engine/base's files: mapping, writing, hashing.
#include <sys/resource.h>
#include <sys/stat.h>

#include <filesystem>
#include <random>

#include "engine/base/file_writer.h"
#include "engine/base/mapped_file.h"
#include "engine/base/sha256.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

std::string Hash(std::string_view text) {
  Sha256 hash;
  hash.Update(AsBytes(text));
  return hash.HexDigest();
}

// The examples of FIPS 180-4.
TEST(Sha256Test, KnownAnswers) {
  EXPECT_EQ(Hash(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Hash("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(Hash(std::string(1000000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256Test, PiecesAreOneMessage) {
  std::mt19937 random(1);
  for (int i = 0; i < 100; ++i) {
    std::string text(random() % 500, '\0');
    for (char& c : text) c = static_cast<char>(random());
    const size_t cut = random() % (text.size() + 1);
    Sha256 hash;
    hash.Update(AsBytes(text.substr(0, cut)));
    hash.Update(AsBytes(text.substr(cut)));
    EXPECT_EQ(hash.HexDigest(), Hash(text));
  }
}

TEST(MappedFileTest, ReadsFilesOfAnySize) {
  TempDir dir;
  for (const size_t size : {0, 1, 4095, 4096, 4097, 100000}) {
    std::string text(size, 'x');
    if (size > 0) text.back() = 'y';
    const std::string path = dir.Sub(std::to_string(size));
    ASSERT_EQ(WriteFile(path, text), absl::OkStatus());
    const auto file = MappedFile::Open(path, size);
    ASSERT_EQ(file.status(), absl::OkStatus());
    EXPECT_EQ(file->text(), text);
    EXPECT_EQ(*Sha256OfFile(path), Hash(text));
    if (size == 0) continue;
    EXPECT_THAT(std::string(MappedFile::Open(path, size - 1).status().message()),
                HasSubstr("the limit is " + std::to_string(size - 1)));
  }
}

TEST(MappedFileTest, OutlivesNameAndMove) {
  TempDir dir;
  ASSERT_EQ(WriteFile(dir.Sub("f"), "text"), absl::OkStatus());
  auto file = MappedFile::Open(dir.Sub("f"));
  ASSERT_EQ(file.status(), absl::OkStatus());
  fs::remove(dir.Sub("f"));
  MappedFile moved = *std::move(file);
  EXPECT_EQ(moved.text(), "text");
  MappedFile assigned;
  assigned = std::move(moved);
  EXPECT_EQ(assigned.text(), "text");
}

TEST(MappedFileTest, RefusesWhatIsNoFile) {
  TempDir dir;
  ASSERT_EQ(mkfifo(dir.Sub("pipe").c_str(), 0600), 0);
  fs::create_symlink("loop", dir.Sub("loop"));
  EXPECT_TRUE(absl::IsNotFound(MappedFile::Open(dir.Sub("none")).status()));
  EXPECT_TRUE(absl::IsNotFound(MappedFile::Open(dir.Sub(std::string("a\0b", 3))).status()));
  for (const std::string& path : {dir.path(), dir.Sub("pipe"), std::string("/dev/zero")}) {
    EXPECT_THAT(std::string(MappedFile::Open(path).status().message()),
                HasSubstr(path + ": not a regular file"));
  }
  EXPECT_THAT(std::string(MappedFile::Open(dir.Sub("loop")).status().message()),
              HasSubstr("loop: Too many levels of symbolic links"));
}

TEST(FileWriterTest, WritesAtAnyOffset) {
  TempDir dir;
  auto file = FileWriter::Create(dir.Sub("f"));
  ASSERT_EQ(file.status(), absl::OkStatus());
  ASSERT_EQ(file->WriteAt(4, AsBytes("data")), absl::OkStatus());
  ASSERT_EQ(file->WriteAt(0, AsBytes("head")), absl::OkStatus());
  ASSERT_EQ(file->Close(), absl::OkStatus());
  EXPECT_EQ(MappedFile::Open(dir.Sub("f"))->text(), "headdata");
  EXPECT_TRUE(absl::IsAlreadyExists(FileWriter::Create(dir.Sub("f")).status()));
  EXPECT_THAT(std::string(FileWriter::Create(dir.Sub("no/f")).status().message()),
              HasSubstr("no/f: cannot be created: No such file"));
}

}  // namespace
}  // namespace mobi
