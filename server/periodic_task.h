// A thread that calls a function at an interval until it is destroyed. The interval is between
// starts; a late call is not made up for.
#ifndef MOBI_SERVER_PERIODIC_TASK_H_
#define MOBI_SERVER_PERIODIC_TASK_H_

#include <functional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "engine/base/clock.h"
#include "engine/base/mutex.h"

namespace mobi {

class PeriodicTask {
 public:
  PeriodicTask(Duration interval, std::function<void()> task);
  ~PeriodicTask();
  PeriodicTask(const PeriodicTask&) = delete;
  PeriodicTask& operator=(const PeriodicTask&) = delete;

 private:
  void Run();

  const Duration interval_;
  const std::function<void()> task_;
  Mutex mutex_;
  CondVar changed_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_PERIODIC_TASK_H_
