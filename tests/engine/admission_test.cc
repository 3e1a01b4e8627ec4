#include "engine/admission.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <random>
#include <utility>
#include <vector>

namespace mobi {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr Duration kForever = std::chrono::hours(1);

// A server with slots: a request stays in one for about a second times slots / rate.
class QueueSimulation {
 public:
  QueueSimulation(double rate, int slots, const AdmissionOptions& options)
      : stay_(slots / rate), slots_(slots), admission_(options) {}

  void Run(double offered, double duration, std::mt19937_64& random, int most_started = 1000) {
    std::exponential_distribution<double> gap(offered);
    std::uniform_real_distribution<double> stay(0.5 * stay_, 1.5 * stay_);
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
      std::erase_if(running_, [&](const auto& run) {
        if (run.second > now_) return false;
        admission_.Finished(now_ - run.first);
        ++served_;
        return true;
      });
      int started = 0;
      while (static_cast<int>(running_.size()) < slots_ && !queue_.empty() &&
             started < most_started) {
        ++started;
        waits_.push_back(now_ - queue_.front());
        queue_.pop_front();
        admission_.Leave(0, 10);
        running_.emplace_back(now_, now_ + stay(random));
      }
      admission_.StepEnded({.seconds = kStep,
                            .running = static_cast<int>(running_.size()),
                            .started = started,
                            .others_wait = !queue_.empty(),
                            .full = static_cast<int>(running_.size()) == slots_},
                           0);
    }
  }

  static constexpr double kStep = 0.005;
  double now_ = 0;
  const double stay_;
  const int slots_;
  Admission admission_;
  std::deque<double> queue_;
  std::vector<std::pair<double, double>> running_;  // begin and end
  std::vector<double> waits_;
  int refused_ = 0;
  int served_ = 0;
};

TEST(Admission, HoldsWaitsNearTheLimitUnderOverload) {
  for (const double rate : {5.0, 20.0, 100.0}) {
    for (const int slots : {8, 64}) {
      std::mt19937_64 random(7);
      AdmissionOptions options;
      options.max_waiting_requests = 1000;
      QueueSimulation queue(rate, slots, options);
      queue.Run(10 * rate, 60, random);
      EXPECT_NEAR(queue.served_ / 60.0, rate, 0.1 * rate + slots / 60.0) << "was kept busy";
      double worst = 0;
      for (const double wait : queue.waits_) worst = std::max(worst, wait);
      // At first nobody knows how long requests stay.
      EXPECT_LE(worst, 3 + 1.5 * queue.stay_) << rate << " " << slots;
      EXPECT_GE(worst, 1.0) << rate << " " << slots;
      // Afterwards the queue is short soon, and nothing is refused.
      const int refused = queue.refused_;
      queue.Run(0.3 * rate, 60, random);
      EXPECT_LE(queue.refused_ - refused, 0.05 * 0.3 * rate * 60 + 1) << rate << " " << slots;
      EXPECT_LE(queue.waits_.back(), 0.5) << rate << " " << slots;
    }
  }
}

// Few run at a time because each step reads only so much of the prompts.
TEST(Admission, HoldsWaitsWherePromptsWaitToBeRead) {
  std::mt19937_64 random(9);
  QueueSimulation queue(640, 64, {});  // a stay of 0.1 s
  queue.Run(10, 5, random, 1);
  queue.Run(2000, 60, random, 1);  // one request a step: 200 a second
  double worst = 0;
  for (const double wait : queue.waits_) worst = std::max(worst, wait);
  EXPECT_LE(worst, 2.5);
  EXPECT_GE(worst, 1);
  EXPECT_NEAR(queue.served_ / 60.0, 200, 10);
}

TEST(Admission, ABurstOnAnIdleServerIsTaken) {
  Admission admission({});
  for (int i = 0; i < 100; ++i) admission.Finished(30);
  admission.StepEnded({.seconds = 1, .running = 1}, 1e-4);
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
  for (int i = 0; i < 100; ++i) admission.Finished(1);
  admission.StepEnded({.seconds = 1, .running = 10, .others_wait = true, .full = true}, 0);
  EXPECT_EQ(admission.ExpectedWait(0), milliseconds(5100));
  EXPECT_EQ(admission.ExpectedWait(2), milliseconds(100));
  EXPECT_EQ(admission.Check(0, 10, kForever).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(admission.Check(2, 10, kForever).ok());
}

TEST(Admission, DeadlinesThatCannotBeMetAreSaidSo) {
  Admission admission({});
  admission.StepEnded({.seconds = 1, .running = 1}, 1e-3);
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
