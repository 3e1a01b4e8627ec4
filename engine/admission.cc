#include "engine/admission.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"

namespace mobi {
namespace {

constexpr double kMemorySeconds = 3;
// Less time than this says nothing about a rate.
constexpr double kMinSeconds = 0.1;

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

void Admission::StepEnded(double seconds, int started, bool others_wait,
                          double seconds_per_prompt_token) {
  backlog_ = others_wait;
  seconds_per_prompt_token_ = seconds_per_prompt_token;
  // Without a backlog the rate is the clients', not ours.
  if (!others_wait) return;
  const double fading = std::exp(-seconds / kMemorySeconds);
  started_ = started_ * fading + started;
  seconds_ = seconds_ * fading + seconds;
}

Duration Admission::ExpectedWait(int priority) const {
  Waiting ahead;
  for (auto it = by_priority_.lower_bound(priority); it != by_priority_.end(); ++it) {
    ahead.requests += it->second.requests;
    ahead.tokens += it->second.tokens;
  }
  double wait = static_cast<double>(ahead.tokens) * seconds_per_prompt_token_;
  if (backlog_ && seconds_ >= kMinSeconds) {
    // One more than was counted: the next may start any moment.
    wait = std::max(wait, ahead.requests * seconds_ / (started_ + 1));
  }
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(wait));
}

}  // namespace mobi
