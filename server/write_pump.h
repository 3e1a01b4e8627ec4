// The thread between the engine and gRPC: the engine's thread marks a call as having output, this
// one starts the write. Starting a write may run the whole transport down to sendmsg, which the
// engine must not pay for. Thread-safe.
#ifndef MOBI_SERVER_WRITE_PUMP_H_
#define MOBI_SERVER_WRITE_PUMP_H_

#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "engine/base/mutex.h"

namespace mobi {

class WritePump {
 public:
  class Source {
   public:
    virtual ~Source() = default;
    // Runs on the pump's thread once for every Schedule. May delete the source.
    virtual void Pump() = 0;
  };

  WritePump() : thread_([this] { Run(); }) {}
  // Runs what was scheduled, then joins.
  ~WritePump();
  WritePump(const WritePump&) = delete;
  WritePump& operator=(const WritePump&) = delete;

  // `source` stays alive until its Pump ran. Never blocks for long.
  void Schedule(Source* source);

 private:
  void Run();

  Mutex mutex_;
  CondVar changed_;
  std::vector<Source*> scheduled_ ABSL_GUARDED_BY(mutex_);
  bool waiting_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace mobi

#endif  // MOBI_SERVER_WRITE_PUMP_H_
