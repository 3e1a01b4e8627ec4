#include "engine/admission.h"

#include <gtest/gtest.h>

#include <cmath>
#include <deque>
#include <random>
#include <vector>

namespace mobi {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr Duration kForever = std::chrono::hours(1);

// A server that starts `rate` requests a second whenever some wait, offered more than that.
class QueueSimulation {
 public:
  QueueSimulation(double rate, const AdmissionOptions& options)
      : rate_(rate), admission_(options) {}

  void Run(double offered, double duration, std::mt19937_64& random) {
    std::exponential_distribution<double> gap(offered);
    double next = now_ + gap(random);
    for (const double end = now_ + duration; now_ < end; now_ += kStep) {
      for (; next < now_; next += gap(random)) {
        if (admission_.Check(0, 10, kForever).ok()) {
          admission_.Enter(0, 10);
          queue_.push_back(now_);
        } else {
          ++refused_;
        }
      }
      credit_ = queue_.empty() ? 0 : credit_ + rate_ * kStep;
      int started = 0;
      for (; credit_ >= 1 && !queue_.empty(); credit_ -= 1, ++started) {
        waits_.push_back(now_ - queue_.front());
        queue_.pop_front();
        admission_.Leave(0, 10);
      }
      admission_.StepEnded(kStep, started, !queue_.empty(), 0);
    }
  }

  static constexpr double kStep = 0.02;
  double now_ = 0;
  double credit_ = 0;
  const double rate_;
  Admission admission_;
  std::deque<double> queue_;
  std::vector<double> waits_;
  int refused_ = 0;
};

TEST(Admission, HoldsWaitsNearTheLimitUnderOverload) {
  for (const double rate : {3.0, 20.0, 100.0}) {
    std::mt19937_64 random(7);
    AdmissionOptions options;
    options.max_waiting_requests = 1000;
    QueueSimulation queue(rate, options);
    queue.Run(10 * rate, 60, random);
    const double served = static_cast<double>(queue.waits_.size());
    EXPECT_NEAR(served / 60, rate, 0.05 * rate + 0.1) << "the server was kept busy";
    EXPECT_NEAR(queue.refused_, 9 * rate * 60, 9 * rate * 60 * 0.1);
    double worst = 0;
    for (size_t i = queue.waits_.size() / 4; i < queue.waits_.size(); ++i) {
      worst = std::max(worst, queue.waits_[i]);
    }
    EXPECT_LE(worst, 3.2) << rate;
    EXPECT_GE(worst, 1.0) << rate;
    // Afterwards the queue is short soon, and nothing is refused.
    const int refused = queue.refused_;
    queue.Run(0.3 * rate, 60, random);
    EXPECT_LE(queue.refused_ - refused, 0.02 * 0.3 * rate * 60 + 1) << rate;
    EXPECT_LE(queue.waits_.back(), 0.5) << rate;
  }
}

TEST(Admission, ABurstOnAnIdleServerIsTaken) {
  Admission admission({});
  for (int i = 0; i < 100; ++i) admission.StepEnded(0.01, i % 10 == 0 ? 1 : 0, false, 1e-4);
  for (int i = 0; i < 100; ++i) {
    ASSERT_TRUE(admission.Check(0, 100, kForever).ok()) << i;
    admission.Enter(0, 100);
  }
  // A hundred times a hundred tokens at 0.1 ms.
  EXPECT_NEAR(ToSeconds(admission.ExpectedWait(0)), 1, 1e-6);
}

TEST(Admission, APriorityWaitsOnlyBehindItsEquals) {
  Admission admission({});
  for (int i = 0; i < 50; ++i) admission.Enter(0, 10);
  admission.Enter(2, 10);
  for (int i = 0; i < 100; ++i) admission.StepEnded(0.1, 1, true, 0);
  EXPECT_GT(admission.ExpectedWait(0), seconds(2));
  EXPECT_LT(admission.ExpectedWait(2), milliseconds(200));
  EXPECT_EQ(admission.Check(0, 10, kForever).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(admission.Check(2, 10, kForever).ok());
}

TEST(Admission, DeadlinesThatCannotBeMetAreSaidSo) {
  Admission admission({});
  admission.StepEnded(1, 1, false, 1e-3);
  EXPECT_TRUE(admission.Check(0, 900, seconds(1)).ok());
  EXPECT_EQ(admission.Check(0, 1100, seconds(1)).code(), absl::StatusCode::kDeadlineExceeded);
  admission.Enter(0, 500);
  EXPECT_EQ(admission.Check(0, 900, seconds(1)).code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(Admission, BoundsTheQueue) {
  AdmissionOptions options;
  options.max_waiting_requests = 3;
  options.max_waiting_tokens = 100;
  Admission admission(options);
  EXPECT_TRUE(admission.Check(0, 1000, kForever).ok()) << "alone it may be longer than the limit";
  admission.Enter(0, 60);
  EXPECT_TRUE(admission.Check(0, 40, kForever).ok());
  EXPECT_EQ(admission.Check(0, 41, kForever).code(), absl::StatusCode::kResourceExhausted);
  admission.Enter(1, 1);
  admission.Enter(0, 1);
  EXPECT_EQ(admission.Check(0, 1, kForever).code(), absl::StatusCode::kResourceExhausted);
  admission.Leave(0, 60);
  admission.Leave(1, 1);
  admission.Leave(0, 1);
  EXPECT_EQ(admission.waiting_requests(), 0);
  EXPECT_EQ(admission.waiting_tokens(), 0);
  EXPECT_EQ(admission.ExpectedWait(-5), Duration::zero());
}

}  // namespace
}  // namespace mobi
