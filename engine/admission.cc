#include "engine/admission.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"

namespace mobi {
namespace {

// The mean stay is over about so many requests.
constexpr int kMemory = 16;
// At least, while none has ended.
constexpr double kFirstGuessSeconds = 1;
constexpr double kReadingMemorySeconds = 1;
// Less time than this says nothing about a rate.
constexpr double kMinReadingSeconds = 0.1;

}  // namespace

absl::Status Admission::Check(int priority, int64_t prompt_tokens, Duration time_left) const {
  if (waiting_requests_ >= options_.max_waiting_requests) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("the queue is full: %d requests wait", waiting_requests_));
  }
  if (waiting_tokens_ > 0 && waiting_tokens_ + prompt_tokens > options_.max_waiting_tokens) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("the queue is full: %d prompt tokens wait", waiting_tokens_));
  }
  const Duration wait = ExpectedWait(priority);
  if (wait > options_.max_expected_wait) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("the queue is full: it would take about %.1f s", ToSeconds(wait)));
  }
  const double prefill = static_cast<double>(prompt_tokens) * seconds_per_prompt_token_;
  if (ToSeconds(wait) + prefill >= ToSeconds(time_left)) {
    return absl::DeadlineExceededError(
        absl::StrFormat("the deadline cannot be met: queue and prompt would take about %.1f s",
                        ToSeconds(wait) + prefill));
  }
  return absl::OkStatus();
}

void Admission::Enter(int priority, int64_t prompt_tokens) {
  Waiting& waiting = by_priority_[priority];
  ++waiting.requests;
  waiting.tokens += prompt_tokens;
  ++waiting_requests_;
  waiting_tokens_ += prompt_tokens;
}

void Admission::Leave(int priority, int64_t prompt_tokens) {
  const auto waiting = by_priority_.find(priority);
  waiting->second.tokens -= prompt_tokens;
  if (--waiting->second.requests == 0) by_priority_.erase(waiting);
  --waiting_requests_;
  waiting_tokens_ -= prompt_tokens;
}

void Admission::StepEnded(const StepLoad& load, double seconds_per_prompt_token) {
  busy_seconds_ += load.seconds;
  last_ = load;
  seconds_per_prompt_token_ = seconds_per_prompt_token;
  // Without a backlog the rate is the clients', not ours.
  if (!load.others_wait || load.full) return;
  const double fading = std::exp(-load.seconds / kReadingMemorySeconds);
  started_ = started_ * fading + load.started;
  reading_seconds_ = reading_seconds_ * fading + load.seconds;
}

void Admission::Finished(double seconds) {
  finished_ = std::min(finished_ + 1, kMemory);
  mean_stay_ += (seconds - mean_stay_) / finished_;
}

Duration Admission::ExpectedWait(int priority) const {
  Waiting ahead;
  for (auto it = by_priority_.lower_bound(priority); it != by_priority_.end(); ++it) {
    ahead.requests += it->second.requests;
    ahead.tokens += it->second.tokens;
  }
  double wait = static_cast<double>(ahead.tokens) * seconds_per_prompt_token_;
  if (last_.others_wait && last_.full) {
    const double stay = finished_ > 0 ? mean_stay_ : std::max(kFirstGuessSeconds, busy_seconds_);
    wait = std::max(wait, ahead.requests * stay / std::max(last_.running, 1));
  } else if (last_.others_wait && reading_seconds_ > kMinReadingSeconds) {
    // One more than was counted: the next may start any moment.
    wait = std::max(wait, ahead.requests * reading_seconds_ / (started_ + 1));
  }
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(wait));
}

}  // namespace mobi
