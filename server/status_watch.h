// A server stream that sends a message now and then at every interval until the client goes: one
// write or one alarm is outstanding at any time. Deletes itself in OnDone.
#ifndef MOBI_SERVER_STATUS_WATCH_H_
#define MOBI_SERVER_STATUS_WATCH_H_

#include <functional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "engine/base/clock.h"
#include "engine/base/mutex.h"
#include "grpcpp/alarm.h"
#include "grpcpp/support/server_callback.h"
#include "mobi/v1/precision.pb.h"

namespace mobi {

class StatusWatch final : public grpc::ServerWriteReactor<v1::PrecisionStatus> {
 public:
  // `read` is called on gRPC's threads, one call at a time.
  StatusWatch(Duration interval, std::function<v1::PrecisionStatus()> read)
      : interval_(interval), read_(std::move(read)) {
    Write();
  }

  void OnWriteDone(bool ok) override {
    {
      MutexLock lock(mutex_);
      if (ok && !cancelled_) {
        alarm_.Set(std::chrono::system_clock::now() + interval_, [this](bool) { OnAlarm(); });
        return;
      }
    }
    Finish(grpc::Status::CANCELLED);
  }
  void OnCancel() override {
    MutexLock lock(mutex_);
    cancelled_ = true;
    alarm_.Cancel();
  }
  void OnDone() override { delete this; }

 private:
  void OnAlarm() {
    bool cancelled = false;
    {
      MutexLock lock(mutex_);
      cancelled = cancelled_;
    }
    if (cancelled) {
      Finish(grpc::Status::CANCELLED);
    } else {
      Write();
    }
  }
  void Write() {
    message_ = read_();
    StartWrite(&message_);
  }

  const Duration interval_;
  const std::function<v1::PrecisionStatus()> read_;
  v1::PrecisionStatus message_;
  Mutex mutex_;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::Alarm alarm_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_STATUS_WATCH_H_
