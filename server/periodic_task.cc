#include "server/periodic_task.h"

#include <utility>

namespace mobi {

PeriodicTask::PeriodicTask(Duration interval, std::function<void()> task)
    : interval_(interval), task_(std::move(task)), thread_([this] { Run(); }) {}

PeriodicTask::~PeriodicTask() {
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    changed_.NotifyOne();
  }
  thread_.join();
}

void PeriodicTask::Run() {
  auto next = std::chrono::steady_clock::now();
  for (;;) {
    {
      MutexLock lock(mutex_);
      for (;;) {
        if (stopping_) return;
        const Duration left = next - std::chrono::steady_clock::now();
        if (left <= Duration::zero()) break;
        changed_.WaitFor(mutex_, left);
      }
    }
    next = std::chrono::steady_clock::now() + interval_;
    task_();
  }
}

}  // namespace mobi
