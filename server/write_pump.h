// The threads between the engine and gRPC: the engine's thread marks a call as having output, these
// start the write. Starting a write may run the whole transport down to sendmsg, which the engine
// must not pay for. One thread does it as long as it keeps up. With many streams a second one
// joins: while one is in sendmsg for a connection, what the other writes to the same connection
// waits and goes out in one packet, which costs a third less a token. Thread-safe.
#ifndef MOBI_SERVER_WRITE_PUMP_H_
#define MOBI_SERVER_WRITE_PUMP_H_

#include <array>
#include <deque>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "engine/base/mutex.h"

namespace mobi {

class WritePump {
 public:
  class Source {
   public:
    virtual ~Source() = default;
    // Runs on one of the pump's threads once for every Schedule. May delete the source.
    virtual void Pump() = 0;
  };

  WritePump();
  // Runs what was scheduled, then joins.
  ~WritePump();
  WritePump(const WritePump&) = delete;
  WritePump& operator=(const WritePump&) = delete;

  // `source` stays alive until its Pump ran. Never blocks for long.
  void Schedule(Source* source);

 private:
  static constexpr size_t kThreads = 2;

  void Run();

  Mutex mutex_;
  CondVar changed_;
  std::deque<Source*> scheduled_ ABSL_GUARDED_BY(mutex_);
  // Threads that run or have been woken, and those of them that have not noticed yet.
  size_t awake_ ABSL_GUARDED_BY(mutex_) = kThreads;
  size_t wakeups_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::array<std::thread, kThreads> threads_;  // last: they use the others
};

}  // namespace mobi

#endif  // MOBI_SERVER_WRITE_PUMP_H_
