// A TokenSink that holds the engine's thread at a token until it is opened, so that what is
// submitted meanwhile starts in one step; its completion ends there.
#ifndef MOBI_TESTS_ENGINE_GATE_SINK_H_
#define MOBI_TESTS_ENGINE_GATE_SINK_H_

#include <functional>
#include <utility>

#include "engine/base/mutex.h"
#include "engine/engine.h"

namespace mobi {

class GateSink final : public TokenSink {
 public:
  // Holds at the first token, or at the first at which `when` is true.
  explicit GateSink(std::function<bool()> when = [] { return true; }) : when_(std::move(when)) {}

  bool OnToken(const TokenEvent&) override {
    if (!when_()) return true;
    MutexLock lock(mutex_);
    held_ = true;
    changed_.NotifyAll();
    while (!open_) changed_.Wait(mutex_);
    return false;
  }
  void OnDone(const RequestEnd&) override {
    MutexLock lock(mutex_);
    done_ = true;
    changed_.NotifyAll();
  }
  // False: the request ended without having been held.
  bool WaitUntilHeld() {
    MutexLock lock(mutex_);
    while (!held_ && !done_) changed_.Wait(mutex_);
    return held_;
  }
  void Open() {
    MutexLock lock(mutex_);
    open_ = true;
    changed_.NotifyAll();
  }
  void WaitUntilDone() {
    MutexLock lock(mutex_);
    while (!done_) changed_.Wait(mutex_);
  }

 private:
  const std::function<bool()> when_;
  Mutex mutex_;
  CondVar changed_;
  bool held_ = false;
  bool open_ = false;
  bool done_ = false;
};

}  // namespace mobi

#endif  // MOBI_TESTS_ENGINE_GATE_SINK_H_
