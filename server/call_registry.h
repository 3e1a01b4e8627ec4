// The Generate calls that were let in and have not ended: counted for metrics and drains, looked at
// now and then for clients that stopped reading. Thread-safe. Lock order: the registry's lock, then
// a call's.
#ifndef MOBI_SERVER_CALL_REGISTRY_H_
#define MOBI_SERVER_CALL_REGISTRY_H_

#include <string>
#include <string_view>
#include <unordered_set>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "engine/base/clock.h"
#include "engine/base/mutex.h"

namespace mobi {

class CallRegistry {
 public:
  // Methods run with the registry's lock held, so they must not call back into it.
  class Call {
   public:
    virtual ~Call() = default;
    // Ends the call when its client stopped reading.
    virtual void Sweep(TimePoint now) = 0;
    // Ends the call with `status` as soon as it can.
    virtual void End(const absl::Status& status) = 0;
    // What other calls may name it by; empty: nothing.
    virtual std::string_view public_id() const { return {}; }
  };

  void Add(Call* call);
  void Remove(Call* call);
  int size() const;
  void SweepAll(TimePoint now);
  void EndAll(const absl::Status& status);
  // Ends the calls with one of these public ids.
  void EndSome(const std::unordered_set<std::string>& public_ids, const absl::Status& status);
  // False when calls are left after `timeout`.
  bool WaitUntilEmpty(Duration timeout);

 private:
  mutable Mutex mutex_;
  CondVar emptied_;
  std::unordered_set<Call*> calls_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mobi

#endif  // MOBI_SERVER_CALL_REGISTRY_H_
