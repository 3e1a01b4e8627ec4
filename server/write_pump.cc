#include "server/write_pump.h"

namespace mobi {
namespace {

// Sources that wait before the second thread is woken for them.
constexpr size_t kBacklog = 12;

}  // namespace

WritePump::WritePump() {
  for (std::thread& thread : threads_) thread = std::thread([this] { Run(); });
}

WritePump::~WritePump() {
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  for (std::thread& thread : threads_) thread.join();
}

void WritePump::Schedule(Source* source) {
  MutexLock lock(mutex_);
  scheduled_.push_back(source);
  const bool wake = awake_ == 0 || (awake_ < kThreads && scheduled_.size() == kBacklog);
  if (!wake) return;  // who is awake looks again before it sleeps
  ++awake_;
  ++wakeups_;
  changed_.NotifyOne();
}

void WritePump::Run() {
  for (;;) {
    Source* source = nullptr;
    {
      MutexLock lock(mutex_);
      while (scheduled_.empty() && !stopping_) {
        --awake_;
        while (wakeups_ == 0 && !stopping_) changed_.Wait(mutex_);
        if (wakeups_ > 0) --wakeups_;
      }
      if (scheduled_.empty()) return;
      source = scheduled_.front();
      scheduled_.pop_front();
    }
    source->Pump();
  }
}

}  // namespace mobi
