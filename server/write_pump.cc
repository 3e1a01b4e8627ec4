#include "server/write_pump.h"

namespace mobi {

WritePump::~WritePump() {
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    changed_.NotifyOne();
  }
  thread_.join();
}

void WritePump::Schedule(Source* source) {
  MutexLock lock(mutex_);
  scheduled_.push_back(source);
  if (!waiting_) return;  // the thread looks again before it sleeps
  waiting_ = false;
  changed_.NotifyOne();
}

void WritePump::Run() {
  std::vector<Source*> batch;
  for (;;) {
    {
      MutexLock lock(mutex_);
      while (scheduled_.empty() && !stopping_) {
        waiting_ = true;
        changed_.Wait(mutex_);
      }
      waiting_ = false;
      if (scheduled_.empty()) return;
      batch.swap(scheduled_);
    }
    for (Source* source : batch) source->Pump();
    batch.clear();
  }
}

}  // namespace mobi
