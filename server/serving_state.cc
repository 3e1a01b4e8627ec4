#include "server/serving_state.h"

#include <utility>

namespace mobi {

ServingState::ServingState(std::function<void(bool ready)> on_readiness)
    : on_readiness_(std::move(on_readiness)) {}

void ServingState::SetLoaded(const ServedModel* model) {
  MutexLock lock(mutex_);
  model_ = model;
  AnnounceLocked();
}

void ServingState::SetFailed() {
  MutexLock lock(mutex_);
  failed_ = true;
  AnnounceLocked();
}

void ServingState::SetStalled(bool stalled) {
  MutexLock lock(mutex_);
  stalled_ = stalled;
  AnnounceLocked();
}

void ServingState::StartDrain(TimePoint deadline) {
  MutexLock lock(mutex_);
  drain_deadline_ = deadline;
  AnnounceLocked();
}

void ServingState::StopDrain() {
  MutexLock lock(mutex_);
  drain_deadline_.reset();
  AnnounceLocked();
}

void ServingState::SetStopping() {
  MutexLock lock(mutex_);
  stopping_ = true;
  AnnounceLocked();
}

bool ServingState::ready() const {
  MutexLock lock(mutex_);
  return ReadyLocked();
}

bool ServingState::failed() const {
  MutexLock lock(mutex_);
  return failed_;
}

bool ServingState::draining() const {
  MutexLock lock(mutex_);
  return stopping_ || drain_deadline_.has_value();
}

bool ServingState::DrainExpired(TimePoint now) const {
  MutexLock lock(mutex_);
  return drain_deadline_.has_value() && now >= *drain_deadline_;
}

absl::StatusOr<const ServedModel*> ServingState::Admit() const {
  MutexLock lock(mutex_);
  if (failed_) return absl::UnavailableError("the device has failed; the server is stopping");
  if (model_ == nullptr) return absl::UnavailableError("the model is loading");
  if (stopping_) return absl::UnavailableError("the server is stopping");
  if (drain_deadline_) return absl::UnavailableError("the server is draining");
  return model_;
}

absl::StatusOr<const ServedModel*> ServingState::model() const {
  MutexLock lock(mutex_);
  if (model_ == nullptr) return absl::UnavailableError("the model is loading");
  return model_;
}

bool ServingState::ReadyLocked() const {
  return model_ != nullptr && !failed_ && !stalled_ && !stopping_ && !drain_deadline_;
}

void ServingState::AnnounceLocked() {
  if (ReadyLocked() == announced_) return;
  announced_ = !announced_;
  if (on_readiness_) on_readiness_(announced_);
}

}  // namespace mobi
