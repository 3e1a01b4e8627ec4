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

void CallRegistry::EndSome(const std::unordered_set<std::string>& public_ids,
                           const absl::Status& status) {
  MutexLock lock(mutex_);
  for (Call* call : calls_) {
    const std::string id(call->public_id());
    if (!id.empty() && public_ids.count(id) > 0) call->End(status);
  }
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
