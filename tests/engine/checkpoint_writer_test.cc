#include "engine/checkpoint_writer.h"

#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include "engine/base/file_writer.h"
#include "engine/manifest.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const nlohmann::json kPrices = {{"price_table", {{"token", {{2, 1.0}, {8, 0.5}}}}}};  // NOLINT

std::string Read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::vector<std::string> Names(const std::string& dir) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(dir)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

class CheckpointWriterTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(WriteTestModel(dir_.Sub("float")), absl::OkStatus());
    auto source = Checkpoint::Open(dir_.Sub("float"), {});
    ASSERT_EQ(source.status(), absl::OkStatus());
    source_.emplace(*std::move(source));
  }

  absl::StatusOr<std::unique_ptr<CheckpointWriter>> Create(const std::string& name,
                                                           bool overwrite = false) {
    CheckpointWriterOptions options;
    options.output_dir = dir_.Sub(name);
    options.overwrite = overwrite;
    return CheckpointWriter::Create(*source_, options);
  }

  absl::Status Quantize(const std::string& name, const TestQuantizeOptions& options = {}) {
    return WriteQuantizedTestModel(dir_.Sub("float"), dir_.Sub(name), options);
  }

  TempDir dir_;
  std::optional<Checkpoint> source_;
};

TEST_F(CheckpointWriterTest, WritesAFolderAsTheFormatSays) {
  ASSERT_EQ(Quantize("out"), absl::OkStatus());
  EXPECT_THAT(Names(dir_.path()), ElementsAre("float", "out"));
  EXPECT_THAT(Names(dir_.Sub("out")),
              ElementsAre("MANIFEST", "config.json", "generation_config.json", "model.safetensors",
                          "tokenizer.json", "tokenizer_config.json"));
  const auto config = nlohmann::json::parse(Read(dir_.Sub("out/config.json")));
  EXPECT_EQ(config["hidden_size"], 128);
  EXPECT_EQ(config["quantization_config"]["quant_method"], "mobiquant");
  EXPECT_EQ(config["quantization_config"]["slice_bits"], nlohmann::json({2, 2, 2, 2}));
  EXPECT_EQ(fs::status(dir_.Sub("out")).permissions() & fs::perms::others_read,
            fs::perms::others_read);
}

TEST_F(CheckpointWriterTest, EqualInputsGiveEqualFiles) {
  ASSERT_EQ(Quantize("a"), absl::OkStatus());
  ASSERT_EQ(Quantize("b"), absl::OkStatus());
  EXPECT_EQ(Read(dir_.Sub("a/MANIFEST")), Read(dir_.Sub("b/MANIFEST")));
}

TEST_F(CheckpointWriterTest, ManifestIsReadBySha256sum) {
  if (system("command -v sha256sum >/dev/null") != 0) GTEST_SKIP() << "no sha256sum";
  ASSERT_EQ(Quantize("out"), absl::OkStatus());
  const std::string check =
      "cd '" + dir_.Sub("out") + "' && sha256sum -c --strict --status MANIFEST";
  EXPECT_EQ(system(check.c_str()), 0);
  std::ofstream(dir_.Sub("out/tokenizer.json"), std::ios::app) << " ";
  EXPECT_NE(system(check.c_str()), 0);
}

TEST_F(CheckpointWriterTest, ShardsReadAsOne) {
  TestQuantizeOptions options;
  options.max_shard_bytes = 100000;
  ASSERT_EQ(Quantize("shards", options), absl::OkStatus());
  ASSERT_EQ(Quantize("single"), absl::OkStatus());
  const auto shards = Checkpoint::Open(dir_.Sub("shards"), {.verify_manifest = true});
  const auto single = Checkpoint::Open(dir_.Sub("single"), {.verify_manifest = true});
  ASSERT_EQ(shards.status(), absl::OkStatus());
  ASSERT_GT(shards->files().size(), 3u);
  EXPECT_TRUE(fs::exists(dir_.Sub("shards/model.safetensors.index.json")));
  size_t tensors = 0;
  for (const SafetensorsFile& file : shards->files()) {
    EXPECT_THAT(file.path(), HasSubstr("of-0000"));
    size_t bytes = 0;
    for (const HostTensor& tensor : file.tensors()) bytes += tensor.bytes.size();
    EXPECT_LE(bytes, options.max_shard_bytes);
    tensors += file.tensors().size();
  }
  ASSERT_EQ(tensors, single->files()[0].tensors().size());
  for (const HostTensor& tensor : single->files()[0].tensors()) {
    EXPECT_EQ(shards->Tensor(tensor.name, tensor.shape)->bytes, tensor.bytes) << tensor.name;
  }
}

TEST_F(CheckpointWriterTest, LeavesNothingWithoutCommit) {
  {
    const auto writer = Create("out");
    ASSERT_EQ(writer.status(), absl::OkStatus());
    ASSERT_EQ((*writer)->AddUnquantized(), absl::OkStatus());
    EXPECT_EQ(Names(dir_.path()).size(), 2u);
    EXPECT_FALSE(fs::exists(dir_.Sub("out")));
  }
  EXPECT_THAT(Names(dir_.path()), ElementsAre("float"));
}

TEST_F(CheckpointWriterTest, RefusesToCommitWhatCannotBeLoaded) {
  {
    const auto writer = Create("out");
    ASSERT_EQ(writer.status(), absl::OkStatus());
    ASSERT_EQ((*writer)->AddUnquantized(), absl::OkStatus());
    EXPECT_THAT(std::string((*writer)->Commit(kPrices).message()),
                HasSubstr("q_proj.slice_0: missing"));
  }
  {
    const auto writer = Create("out");
    ASSERT_EQ((*writer)->AddUnquantized(), absl::OkStatus());
    EXPECT_THAT(std::string((*writer)->Commit(nlohmann::json::object()).message()),
                HasSubstr("price_table: missing"));
  }
  EXPECT_THAT(Names(dir_.path()), ElementsAre("float"));
}

TEST_F(CheckpointWriterTest, NeverReplacesWhatItDidNotWrite) {
  EXPECT_TRUE(absl::IsAlreadyExists(Create("float", true).status()));
  ASSERT_EQ(WriteFile(dir_.Sub("notes.txt"), "x"), absl::OkStatus());
  EXPECT_THAT(std::string(Create("notes.txt", true).status().message()),
              HasSubstr("notes.txt: exists and is not a folder"));
  fs::create_directory(dir_.Sub("papers"));
  ASSERT_EQ(WriteFile(dir_.Sub("papers/a.txt"), "x"), absl::OkStatus());
  EXPECT_THAT(std::string(Create("papers", true).status().message()),
              HasSubstr("papers: not empty and not a mobiquant checkpoint"));
  EXPECT_THAT(std::string(Create("no/where").status().message()), HasSubstr("cannot be created"));
  EXPECT_THAT(Names(dir_.path()), ElementsAre("float", "notes.txt", "papers"));
}

TEST_F(CheckpointWriterTest, WritesIntoAnEmptyFolderAndThroughALink) {
  fs::create_directory(dir_.Sub("empty"));
  fs::create_directory_symlink(dir_.Sub("empty"), dir_.Sub("link"));
  ASSERT_EQ(Quantize("link/"), absl::OkStatus());
  EXPECT_TRUE(fs::is_symlink(dir_.Sub("link")));
  EXPECT_EQ(Checkpoint::Open(dir_.Sub("empty"), {}).status(), absl::OkStatus());
}

TEST_F(CheckpointWriterTest, ReplacesACheckpointOnlyWhenAsked) {
  ASSERT_EQ(Quantize("out"), absl::OkStatus());
  const std::string before = Read(dir_.Sub("out/MANIFEST"));
  TestQuantizeOptions options;
  options.seed = 2;
  const absl::Status refused = Quantize("out", options);
  EXPECT_TRUE(absl::IsAlreadyExists(refused));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("overwriting was not asked for"));
  EXPECT_EQ(Read(dir_.Sub("out/MANIFEST")), before);
  options.overwrite = true;
  ASSERT_EQ(Quantize("out", options), absl::OkStatus());
  EXPECT_NE(Read(dir_.Sub("out/MANIFEST")), before);
  EXPECT_EQ(Checkpoint::Open(dir_.Sub("out"), {.verify_manifest = true}).status(),
            absl::OkStatus());
  EXPECT_THAT(Names(dir_.path()), ElementsAre("float", "out"));
}

TEST_F(CheckpointWriterTest, NoticesWhatAppearsInTheMeantime) {
  const auto writer = Create("out");
  ASSERT_EQ(writer.status(), absl::OkStatus());
  ASSERT_EQ(Quantize("other"), absl::OkStatus());
  fs::rename(dir_.Sub("other"), dir_.Sub("out"));
  const std::string manifest = Read(dir_.Sub("out/MANIFEST"));
  ASSERT_FALSE((*writer)->Commit(kPrices).ok());
  EXPECT_EQ(Read(dir_.Sub("out/MANIFEST")), manifest);
}

// A limit on the size of files stands in for a full disk where no file system can be mounted.
TEST_F(CheckpointWriterTest, ReportsAWriteThatFails) {
  const sighandler_t handler = signal(SIGXFSZ, SIG_IGN);
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small = {100000, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const absl::Status status = Quantize("out");
  setrlimit(RLIMIT_FSIZE, &before);
  signal(SIGXFSZ, handler);
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("cannot be written: File too large"));
  EXPECT_THAT(Names(dir_.path()), ElementsAre("float"));
}

// In a child with a mount namespace of its own: a 256 KiB file system holds the output.
int QuantizeOntoAFullDisk(const std::string& source, const std::string& mount_point) {
  constexpr int kCannotMount = 77;
  const bool separate = unshare(CLONE_NEWNS) == 0 || unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0;
  if (!separate || mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
      mount("tmpfs", mount_point.c_str(), "tmpfs", 0, "size=256k") != 0) {
    return kCannotMount;
  }
  const absl::Status status = WriteQuantizedTestModel(source, mount_point + "/out");
  const bool says_so = absl::IsResourceExhausted(status) &&
                       std::string(status.message()).find("No space left") != std::string::npos;
  if (!says_so) fprintf(stderr, "%s\n", status.ToString().c_str());
  return says_so && fs::is_empty(mount_point) ? 0 : 1;
}

TEST_F(CheckpointWriterTest, FullDiskIsSaidAndLeavesNothing) {
  fs::create_directory(dir_.Sub("disk"));
  const pid_t child = fork();
  if (child == 0) _exit(QuantizeOntoAFullDisk(dir_.Sub("float"), dir_.Sub("disk")));
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  if (WEXITSTATUS(status) == 77) GTEST_SKIP() << "no right to mount a small file system";
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace mobi
