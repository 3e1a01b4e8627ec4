#include "engine/step_surface.h"

#include <gtest/gtest.h>

#include <atomic>

#include "engine/synthetic_weights.h"
#include "kernels/create_backend.h"
#include "tests/engine/tiny_shape.h"

namespace mobi {
namespace {

// Every look at it takes a second.
class SlowClock final : public Clock {
 public:
  TimePoint Now() const override { return TimePoint(std::chrono::seconds(++looks_)); }
  std::chrono::system_clock::time_point WallNow() const override { return {}; }

 private:
  mutable std::atomic<int64_t> looks_{0};
};

class StepSurfaceTest : public testing::Test {
 protected:
  void SetUp() override {
    auto weights = SyntheticWeights::Create("synthetic", TinyShape(2), {});
    ASSERT_TRUE(weights.ok()) << weights.status();
    weights_ = std::make_unique<SyntheticWeights>(*std::move(weights));
    auto backend = CreateBackend("cpu", 1);
    ASSERT_TRUE(backend.ok());
    backend_ = *std::move(backend);
    auto model = Model::Load(*weights_, *backend_, 64);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
  }

  std::unique_ptr<SyntheticWeights> weights_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Model> model_;
};

TEST_F(StepSurfaceTest, HasARowForEveryNumberOfSequences) {
  for (const bool coherent : {false, true}) {
    const SurfaceOptions options{.bits = {2, 3, 8},
                                 .sequences = {1, 2, 5},
                                 .context = 33,
                                 .coherent = coherent,
                                 .per_point = Duration::zero()};
    int heard = 0;
    const auto rows = MeasureSurface(*model_, *weights_, options, RealClock(),
                                     [&](const SurfaceRow&) { ++heard; });
    ASSERT_TRUE(rows.ok()) << rows.status();
    ASSERT_EQ(rows->size(), 3u);
    EXPECT_EQ(heard, 3);
    for (size_t i = 0; i < rows->size(); ++i) {
      EXPECT_EQ((*rows)[i].sequences, options.sequences[i]);
      ASSERT_EQ((*rows)[i].milliseconds.size(), 3u);
      for (const double ms : (*rows)[i].milliseconds) EXPECT_GT(ms, 0);
    }
  }
}

TEST_F(StepSurfaceTest, RowsThatWouldEndTooLateAreLeftOut) {
  SurfaceOptions options{.bits = {2, 8},
                         .sequences = {1, 2, 4, 8},
                         .context = 16,
                         .per_point = Duration::zero(),
                         .limit = std::chrono::seconds(1)};
  const auto measure = [&] {
    const auto rows = MeasureSurface(*model_, *weights_, options, SlowClock(), {});
    EXPECT_TRUE(rows.ok()) << rows.status();
    return rows->size();
  };
  EXPECT_EQ(measure(), 1u);  // never none
  options.limit = std::chrono::seconds(60);
  EXPECT_EQ(measure(), 2u);
  options.limit = std::chrono::hours(1);
  EXPECT_EQ(measure(), 4u);
}

TEST_F(StepSurfaceTest, RefusesWhatCannotBeMeasured) {
  const auto code = [&](const SurfaceOptions& options) {
    return MeasureSurface(*model_, *weights_, options, RealClock(), {}).status().code();
  };
  EXPECT_EQ(code({.bits = {}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.sequences = {}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.context = 65}), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace mobi
