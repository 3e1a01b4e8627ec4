// Reading a checkpoint's weights: every view gets its bytes, what is not finite or not what was
// opened is refused, and a backend that cannot take uploads side by side gets one at a time.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/checkpoint.h"
#include "engine/model.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/create_backend.h"
#include "tests/engine/forwarding_backend.h"
#include "tests/engine/test_models.h"

namespace mobi {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

constexpr char kScales[] = "model.layers.1.mlp.down_proj.scales_3";

class ModelLoaderTest : public testing::Test {
 protected:
  void SetUp() override {
    TestQuantizeOptions quantize;
    quantize.max_shard_bytes = 200000;
    ASSERT_EQ(WriteTestModels(dir_, {}, quantize), absl::OkStatus());
    Open();
    ASSERT_GT(checkpoint_->files().size(), 1u) << "wanted: several files";
  }

  void Open() {
    auto opened = Checkpoint::Open(dir_.Sub("mobiquant"), {});
    ASSERT_EQ(opened.status(), absl::OkStatus());
    checkpoint_ = std::make_unique<Checkpoint>(*std::move(opened));
  }

  absl::Status Load(const ReadOptions& options) {
    auto backend = CreateBackend("cpu", 1);
    return Model::Load(*checkpoint_, **backend, 0, options).status();
  }

  // The file that has the tensor, and where it begins there.
  std::pair<std::string, size_t> Find(std::string_view name) {
    for (const SafetensorsFile& file : checkpoint_->files()) {
      const HostTensor* tensor = file.Find(name);
      if (tensor == nullptr) continue;
      return {file.path(), static_cast<size_t>(tensor->bytes.data() - file.bytes().data())};
    }
    ADD_FAILURE() << name;
    return {};
  }

  TempDir dir_;
  std::unique_ptr<Checkpoint> checkpoint_;
};

TEST_F(ModelLoaderTest, EveryViewGetsItsBytesWhicheverWayTheyAreRead) {
  std::vector<absl::Span<const std::byte>> views;
  for (const SafetensorsFile& file : checkpoint_->files()) {
    for (const HostTensor& tensor : file.tensors()) views.push_back(tensor.bytes);
  }
  std::reverse(views.begin(), views.end());
  for (const bool verify : {false, true}) {
    for (const bool direct : {false, true}) {
      std::vector<std::vector<std::byte>> got;
      for (const auto& view : views) got.emplace_back(view.size());
      ASSERT_EQ(checkpoint_->Read(views, {.verify = verify, .direct = direct},
                                  [&](size_t view, size_t offset, auto bytes) {
                                    std::memcpy(got[view].data() + offset, bytes.data(),
                                                bytes.size());
                                  }),
                absl::OkStatus());
      for (size_t i = 0; i < views.size(); ++i) {
        EXPECT_TRUE(std::equal(views[i].begin(), views[i].end(), got[i].begin())) << i;
      }
    }
  }
}

TEST_F(ModelLoaderTest, AScaleThatIsNotFiniteIsRefusedByNameAndPlace) {
  const auto [path, begin] = Find(kScales);
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(begin + 5 * sizeof(uint16_t)));
  file.write("\x00\x7C", 2);  // infinite, in fp16
  file.close();
  const absl::Status status = Load({});
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()),
              HasSubstr(std::string(kScales) + ": element 5 is not finite"));
  const absl::Status verified = Load({.verify = true});
  EXPECT_TRUE(absl::IsDataLoss(verified)) << verified << ": a damaged file explains the rest";
}

TEST_F(ModelLoaderTest, WeightsThatWereReplacedAfterOpeningAreNotLoaded) {
  const std::string path = Find(kScales).first;
  std::ofstream(path + ".new") << "something else";
  fs::rename(path + ".new", path);  // the mapping keeps the old one
  const absl::Status status = Load({});
  EXPECT_TRUE(absl::IsDataLoss(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("replaced while they were loaded"));
}

// Counts uploads that meet.
class OneAtATime final : public ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;
  bool concurrent_uploads() const override { return false; }
  void Upload(const void* host, size_t bytes, void* device) override {
    if (inside_.exchange(true)) ++met_;
    ForwardingBackend::Upload(host, bytes, device);
    inside_ = false;
    ++uploads_;
  }
  int met() const { return met_; }
  int uploads() const { return uploads_; }

 private:
  std::atomic<bool> inside_{false};
  std::atomic<int> met_{0}, uploads_{0};
};

TEST_F(ModelLoaderTest, UploadsDoNotMeetWhereTheBackendCannotHaveThat) {
  OneAtATime backend(*CreateBackend("cpu", 1));
  ASSERT_EQ(Model::Load(*checkpoint_, backend, 0).status(), absl::OkStatus());
  EXPECT_GT(backend.uploads(), 100);
  EXPECT_EQ(backend.met(), 0);
}

}  // namespace
}  // namespace mobi
