#include "server/promql_poller.h"

#include <algorithm>
#include <utility>

#include "engine/base/status_macros.h"

namespace mobi {

absl::StatusOr<std::unique_ptr<PromqlPoller>> PromqlPoller::Start(const std::string& url,
                                                                  const Clock& clock) {
  MOBI_ASSIGN_OR_RETURN(std::unique_ptr<PromqlClient> client, PromqlClient::Create(url));
  return std::unique_ptr<PromqlPoller>(new PromqlPoller(std::move(client), clock));
}

PromqlPoller::PromqlPoller(std::unique_ptr<PromqlClient> client, const Clock& clock)
    : client_(std::move(client)), clock_(clock), thread_([this] { Run(); }) {}

PromqlPoller::~PromqlPoller() {
  stopping_.store(true, std::memory_order_relaxed);
  {
    MutexLock lock(mutex_);
    changed_.NotifyOne();
  }
  thread_.join();
}

void PromqlPoller::SetSignals(const std::vector<PolicySignal>& signals) {
  MutexLock lock(mutex_);
  std::vector<Subject> subjects;
  for (const PolicySignal& signal : signals) {
    if (signal.kind != SignalKind::kPromql) continue;
    Subject subject;
    const auto before = std::find_if(subjects_.begin(), subjects_.end(), [&](const Subject& old) {
      return old.signal.name == signal.name && old.signal.query == signal.query;
    });
    if (before != subjects_.end()) subject = *before;
    subject.signal = signal;
    subjects.push_back(std::move(subject));
    counts_.try_emplace(signal.name);
  }
  subjects_ = std::move(subjects);
  changed_.NotifyOne();
}

std::map<std::string, double> PromqlPoller::Answers() const {
  MutexLock lock(mutex_);
  const TimePoint now = clock_.Now();
  std::map<std::string, double> answers;
  for (const Subject& subject : subjects_) {
    if (subject.value && now - subject.answered <= subject.signal.max_age) {
      answers[subject.signal.name] = *subject.value;
    }
  }
  return answers;
}

std::map<std::string, PromqlCounts> PromqlPoller::counts() const {
  MutexLock lock(mutex_);
  return counts_;
}

void PromqlPoller::Run() {
  for (;;) {
    std::optional<PolicySignal> due;
    {
      MutexLock lock(mutex_);
      while (!due) {
        if (stopping_.load(std::memory_order_relaxed)) return;
        Duration wait = kInterval;
        due = NextDueLocked(wait);
        if (!due) changed_.WaitFor(mutex_, wait);
      }
    }
    const PromqlAnswer answer = client_->Query(due->query, due->timeout, &stopping_);
    MutexLock lock(mutex_);
    if (stopping_.load(std::memory_order_relaxed)) return;
    RecordLocked(*due, answer);
  }
}

std::optional<PolicySignal> PromqlPoller::NextDueLocked(Duration& wait) {
  const auto first =
      std::min_element(subjects_.begin(), subjects_.end(),
                       [](const Subject& a, const Subject& b) { return a.next < b.next; });
  if (first == subjects_.end()) return std::nullopt;
  const TimePoint now = clock_.Now();
  if (first->next > now) {
    wait = std::min(wait, first->next - now);
    return std::nullopt;
  }
  first->next = now + std::min(kInterval, first->signal.max_age / 3);
  return first->signal;
}

void PromqlPoller::RecordLocked(const PolicySignal& signal, const PromqlAnswer& answer) {
  PromqlCounts& counts = counts_[signal.name];
  ++counts.queries;
  counts.last_error = answer.value ? "" : answer.reason;
  if (!answer.value) ++counts.errors[static_cast<int>(answer.error)];
  for (Subject& subject : subjects_) {
    if (subject.signal.name != signal.name || subject.signal.query != signal.query) continue;
    if (!answer.value || (subject.value && answer.time == subject.server_time)) continue;
    subject.value = answer.value;
    subject.server_time = answer.time;
    subject.answered = clock_.Now();
  }
}

}  // namespace mobi
