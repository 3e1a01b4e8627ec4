#include "server/call_registry.h"

namespace mobi {

void CallRegistry::Add(Call* call) {
  MutexLock lock(mutex_);
  calls_.insert(call);
}

void CallRegistry::Remove(Call* call) {
  MutexLock lock(mutex_);
  calls_.erase(call);
  if (calls_.empty()) emptied_.NotifyAll();
}

int CallRegistry::size() const {
  MutexLock lock(mutex_);
  return static_cast<int>(calls_.size());
}

void CallRegistry::SweepAll(TimePoint now) {
  MutexLock lock(mutex_);
  for (Call* call : calls_) call->Sweep(now);
}

void CallRegistry::EndAll(const absl::Status& status) {
  MutexLock lock(mutex_);
  for (Call* call : calls_) call->End(status);
}

bool CallRegistry::WaitUntilEmpty(Duration timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  MutexLock lock(mutex_);
  while (!calls_.empty()) {
    const Duration left = deadline - std::chrono::steady_clock::now();
    if (left <= Duration::zero()) return false;
    emptied_.WaitFor(mutex_, left);
  }
  return true;
}

}  // namespace mobi
