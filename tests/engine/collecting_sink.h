// A TokenSink that keeps everything it is told and lets a test wait for the end.
#ifndef MOBI_TESTS_ENGINE_COLLECTING_SINK_H_
#define MOBI_TESTS_ENGINE_COLLECTING_SINK_H_

#include <algorithm>
#include <map>
#include <optional>
#include <vector>

#include "engine/base/mutex.h"
#include "engine/engine.h"

namespace mobi {

class CollectingSink final : public TokenSink {
 public:
  // stop_after: OnToken returns false at that many tokens of a completion.
  explicit CollectingSink(int stop_after = 1 << 30) : stop_after_(stop_after) {}

  void OnPromptLogprobs(int first, absl::Span<const float> logprobs) override {
    MutexLock lock(mutex_);
    prompt_logprobs.resize(std::max(prompt_logprobs.size(), first + logprobs.size()));
    std::copy(logprobs.begin(), logprobs.end(), prompt_logprobs.begin() + first);
  }
  void OnPromptTopLogprobs(int first, absl::Span<const TopLogprobs> entries) override {
    MutexLock lock(mutex_);
    prompt_top.resize(std::max(prompt_top.size(), first + entries.size()));
    std::copy(entries.begin(), entries.end(), prompt_top.begin() + first);
  }
  bool OnToken(const TokenEvent& event) override {
    MutexLock lock(mutex_);
    auto& tokens = completions[event.index];
    tokens.push_back(event.token);
    logprobs[event.index].push_back(event.logprob);
    bits.push_back(event.effective_bits);
    if (event.top != nullptr) top.push_back(*event.top);
    changed_.NotifyAll();
    return static_cast<int>(tokens.size()) < stop_after_;
  }
  void OnCompletionEnd(const CompletionEnd& end) override {
    MutexLock lock(mutex_);
    ends.push_back(end);
  }
  void OnDone(const RequestEnd& end) override {
    MutexLock lock(mutex_);
    ++times_done;
    done = end;
    changed_.NotifyAll();
  }

  const RequestEnd& Wait() {
    MutexLock lock(mutex_);
    while (!done.has_value()) changed_.Wait(mutex_);
    return *done;
  }
  void WaitForTokens(size_t count) {
    MutexLock lock(mutex_);
    while (!done.has_value() && completions[0].size() < count) changed_.Wait(mutex_);
  }

  // Read after Wait.
  std::map<int, std::vector<int32_t>> completions;
  std::map<int, std::vector<float>> logprobs;
  std::vector<float> bits;
  std::vector<TopLogprobs> top;
  std::vector<float> prompt_logprobs;
  std::vector<TopLogprobs> prompt_top;
  std::vector<CompletionEnd> ends;
  std::optional<RequestEnd> done;
  int times_done = 0;

 private:
  const int stop_after_;
  Mutex mutex_;
  CondVar changed_;
};

}  // namespace mobi

#endif  // MOBI_TESTS_ENGINE_COLLECTING_SINK_H_
