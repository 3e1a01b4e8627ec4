// Memory that comes and goes behind addresses that stay, on every backend.
#include <cstddef>
#include <string>
#include <vector>

#include "backend_suite.h"

namespace mobi {
namespace {

class BackendMemory : public BackendTest {
 protected:
  size_t page() { return backend().page_bytes(); }

  // Pages of addresses; the test ends where there are none.
  std::byte* Reserve(size_t pages) {
    auto buffer = backend().Reserve(pages * page(), "test");
    EXPECT_TRUE(buffer.ok()) << buffer.status();
    if (!buffer.ok()) return nullptr;
    reserved_.push_back(*std::move(buffer));
    return reserved_.back().As<std::byte>();
  }
  void Commit(std::byte* at, size_t pages) {
    const absl::Status status = backend().Commit(at, pages * page(), "test");
    ASSERT_TRUE(status.ok()) << status;
  }
  void Write(std::byte* at, const std::vector<uint8_t>& bytes) {
    backend().Upload(bytes.data(), bytes.size(), at);
  }
  std::vector<uint8_t> Read(const std::byte* at, size_t bytes) {
    return ToHost(reinterpret_cast<const uint8_t*>(at), bytes);
  }
  std::vector<uint8_t> Random(size_t bytes) {
    std::vector<uint8_t> values(bytes);
    for (uint8_t& value : values) value = static_cast<uint8_t>(random_());
    return values;
  }
  static std::vector<uint8_t> Zeros(size_t bytes) { return std::vector<uint8_t>(bytes); }

  void TearDown() override {
    reserved_.clear();
    BackendTest::TearDown();
  }

 private:
  std::vector<Buffer> reserved_;
};

TEST_P(BackendMemory, ReservationsBeginAtPages) {
  for (const size_t pages : {1, 7, 100}) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(Reserve(pages)) % page(), 0u);
  }
  auto part = backend().Reserve(page() + 1, "test");
  ASSERT_TRUE(part.ok()) << part.status();
  Commit(part->As<std::byte>(), 2);
}

TEST_P(BackendMemory, ComesZeroedAndHoldsWhatIsWritten) {
  std::byte* at = Reserve(6);
  const size_t bytes = 3 * page();
  for (int round = 0; round < 3; ++round) {
    Commit(at + bytes, 3);
    EXPECT_EQ(Read(at + bytes, bytes), Zeros(bytes)) << "contents survived";
    const std::vector<uint8_t> written = Random(bytes);
    Write(at + bytes, written);
    EXPECT_EQ(Read(at + bytes, bytes), written);
    backend().Decommit(at + bytes, bytes);
  }
  EXPECT_TRUE(backend().Synchronize().ok());
}

TEST_P(BackendMemory, PiecesKeepTheirContentsWhileOthersComeAndGo) {
  constexpr size_t kPieces = 16;
  std::byte* at = Reserve(kPieces);
  std::vector<std::vector<uint8_t>> written;
  for (size_t i = 0; i < kPieces; ++i) {
    Commit(at + i * page(), 1);
    written.push_back(Random(page()));
    Write(at + i * page(), written.back());
  }
  for (size_t i = 1; i < kPieces; i += 2) backend().Decommit(at + i * page(), page());
  for (size_t i = 0; i < kPieces; i += 2) EXPECT_EQ(Read(at + i * page(), page()), written[i]);
  for (size_t i = 1; i < kPieces; i += 4) Commit(at + i * page(), 1);
  EXPECT_EQ(Read(at + page(), page()), Zeros(page()));
  // Three neighbours that came one by one go together.
  backend().Decommit(at, 3 * page());
  EXPECT_EQ(Read(at + 4 * page(), page()), written[4]);
}

TEST_P(BackendMemory, WhatIsUnderWayEndsBeforeItsMemoryGoes) {
  std::byte* at = Reserve(8);
  for (int round = 0; round < 20; ++round) {
    Commit(at, 8);
    const std::vector<uint8_t> bytes = Random(page());
    for (size_t i = 0; i < 8; ++i) Write(at + i * page(), bytes);
    backend().Zero(at, 8 * page());
    backend().Decommit(at, 8 * page());
  }
  const absl::Status status = backend().Synchronize();
  EXPECT_TRUE(status.ok()) << status;
}

TEST_P(BackendMemory, MoreThanThereIsIsRefusedByNameAndNothingIsLost) {
  const size_t pages = backend().memory().total / page() + 1;
  std::byte* at = Reserve(pages + 1);
  ASSERT_NE(at, nullptr) << "addresses cost nothing";
  Commit(at, 1);
  const std::vector<uint8_t> written = Random(page());
  Write(at, written);
  const absl::Status status = backend().Commit(at + page(), pages * page(), "the planes");
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  const std::string message(status.message());
  EXPECT_NE(message.find("the planes"), std::string::npos) << message;
  EXPECT_NE(message.find(std::to_string(pages * page())), std::string::npos) << message;
  EXPECT_EQ(Read(at, page()), written);
  Commit(at + page(), 1);
  EXPECT_EQ(Read(at + page(), page()), Zeros(page()));
}

// The pages that a recorded step reads may have gone and come back since it was recorded.
TEST_P(BackendMemory, ARecordedStepReadsWhatHasComeBack) {
  constexpr int64_t kCols = 64;
  std::byte* at = Reserve(1);
  const auto row = [&](float value) {
    Matrix matrix = Matrix::Poisoned(activations(), 1, kCols);
    for (int64_t c = 0; c < kCols; ++c) matrix.set(0, c, value + static_cast<float>(c));
    return matrix;
  };
  const Tensor table = Tensor::Of(at, activations(), 1, kCols);
  const Tensor out = OnDevice(Matrix::Poisoned(activations(), 1, kCols));
  const int32_t* ids = OnDevice(std::vector<int32_t>{0});
  const StepKey key = {.num_tokens = 1, .num_seqs = 1, .decode_only = true};
  for (int round = 0; round < 4; ++round) {
    Commit(at, 1);
    const Matrix expected = row(static_cast<float>(1 + round));
    backend().Upload(expected.bytes.data(), expected.bytes.size(), at);
    backend().RunStep(key, [&] { backend().Embed(table, ids, out); });
    ExpectSame(ToHost(out), expected, "round " + std::to_string(round));
    backend().Decommit(at, page());
  }
}

MOBI_BACKEND_SUITE(BackendMemory);

}  // namespace
}  // namespace mobi
