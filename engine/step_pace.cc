#include "engine/step_pace.h"

#include <algorithm>
#include <cstddef>
#include <limits>

namespace mobi {
namespace {

constexpr int kMinTokens = 8;
// Weights of a new observation. The estimates err on the side of short chunks: decodes alone are
// taken to be about as fast as they have been, and prompt tokens about as slow. A step that lost
// its core for a while counts as twice as slow at most.
constexpr double kTrusting = 0.3;
constexpr double kWary = 0.1;
constexpr double kSlowest = 2;
// A chunk is at most so many times the last one: what a token costs is known near there only.
constexpr int kMaxGrowth = 2;

void Blend(double value, double weight_down, double weight_up, double& average) {
  if (average == 0) {
    average = value;
    return;
  }
  const double weight = value < average ? weight_down : weight_up;
  average += weight * (std::min(value, kSlowest * average) - average);
}

}  // namespace

StepPace::StepPace(double max_slowdown, int max_num_seqs, int full_step)
    : max_slowdown_(max_slowdown),
      full_step_(full_step),
      decode_seconds_(static_cast<size_t>(max_num_seqs) + 1) {}

void StepPace::Observe(int decodes, int prompt_tokens, double seconds) {
  // Only steps full of prompt tokens tell their pace; it drifts up slowly, so that one lucky step
  // does not count for ever.
  if (prompt_tokens >= full_step_) {
    const double pace = seconds / prompt_tokens;
    const double known = seconds_per_prompt_token_ * 1.05;
    seconds_per_prompt_token_ = known == 0 ? pace : std::min(pace, known);
  }
  if (decodes == 0) return;
  if (prompt_tokens > 0) {
    ObserveMixed(decodes, prompt_tokens, seconds);
  } else {
    Blend(seconds, kTrusting, kWary, decode_seconds_[decodes]);
  }
}

void StepPace::ObserveMixed(int decodes, int prompt_tokens, double seconds) {
  last_beside_ = std::max(prompt_tokens, kMinTokens);
  const double alone = DecodeSeconds(decodes);
  if (alone == 0) return;
  // The decodes alone cannot take longer than with company: what is known of them is old.
  if (seconds < alone && decode_seconds_[decodes] > 0) decode_seconds_[decodes] = seconds;
  Blend(std::max(seconds - alone, 0.01 * seconds) / prompt_tokens, kWary, kTrusting,
        seconds_per_token_beside_);
}

// Of the nearest count that was seen: fewer decodes take no longer, and as many more as there are
// take at most in proportion.
double StepPace::DecodeSeconds(int decodes) const {
  for (int i = decodes; i > 0; --i) {
    if (decode_seconds_[i] > 0) return decode_seconds_[i];
  }
  for (size_t i = static_cast<size_t>(decodes) + 1; i < decode_seconds_.size(); ++i) {
    if (decode_seconds_[i] > 0) return decode_seconds_[i] * decodes / static_cast<double>(i);
  }
  return 0;
}

int StepPace::PromptTokensBeside(int decodes) const {
  if (decodes == 0 || max_slowdown_ <= 1) return std::numeric_limits<int>::max();
  const double alone = DecodeSeconds(decodes);
  const double per_token =
      seconds_per_token_beside_ > 0 ? seconds_per_token_beside_ : seconds_per_prompt_token_;
  if (alone == 0 || per_token == 0) return kMinTokens;
  const double tokens = (max_slowdown_ - 1) * alone / per_token;
  const int most = kMaxGrowth * std::max(last_beside_, kMinTokens);
  return std::max(kMinTokens, static_cast<int>(std::min<double>(tokens, most)));
}

}  // namespace mobi
