// Whether the server takes requests: loading, serving, draining, stalled or failed. Readiness
// (health, metrics) and the answer to new requests come from here. Thread-safe.
#ifndef MOBI_SERVER_SERVING_STATE_H_
#define MOBI_SERVER_SERVING_STATE_H_

#include <functional>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "engine/base/mutex.h"
#include "server/served_model.h"

namespace mobi {

class ServingState {
 public:
  // `on_readiness` hears every change of ready(), in order and under this object's lock.
  explicit ServingState(std::function<void(bool ready)> on_readiness = {});

  // `model` outlives this.
  void SetLoaded(const ServedModel* model);
  // The device is gone: not ready for ever.
  void SetFailed();
  // No step for too long although requests run: not ready, but requests are still taken.
  void SetStalled(bool stalled);
  // Refuses new requests; at `deadline` running ones should be ended. A second call moves it.
  void StartDrain(TimePoint deadline);
  void StopDrain();
  // The process is about to end: refuses new requests for ever.
  void SetStopping();

  bool ready() const;
  bool failed() const;
  bool draining() const;
  // Draining, and the deadline has come.
  bool DrainExpired(TimePoint now) const;

  // The model for a new generation: UNAVAILABLE while loading or draining, or after a fault.
  absl::StatusOr<const ServedModel*> Admit() const;
  // The model for what costs nothing: UNAVAILABLE while loading.
  absl::StatusOr<const ServedModel*> model() const;

 private:
  bool ReadyLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void AnnounceLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::function<void(bool)> on_readiness_;
  mutable Mutex mutex_;
  const ServedModel* model_ ABSL_GUARDED_BY(mutex_) = nullptr;
  bool failed_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool stalled_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<TimePoint> drain_deadline_ ABSL_GUARDED_BY(mutex_);
  bool announced_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace mobi

#endif  // MOBI_SERVER_SERVING_STATE_H_
