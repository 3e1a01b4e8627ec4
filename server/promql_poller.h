// Asks a Prometheus server for the policy's promql signals now and then, on a thread of its own, so
// that a slow or missing server costs the control loop nothing. Thread-safe.
#ifndef MOBI_SERVER_PROMQL_POLLER_H_
#define MOBI_SERVER_PROMQL_POLLER_H_

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "engine/base/mutex.h"
#include "server/policy.h"
#include "server/promql.h"

namespace mobi {

struct PromqlCounts {
  uint64_t queries = 0;
  std::array<uint64_t, kNumPromqlErrors> errors{};
  std::string last_error;  // empty when the last query gave a value
};

class PromqlPoller {
 public:
  // Between two questions for one signal, less where max_age asks for it.
  static constexpr Duration kInterval = std::chrono::seconds(2);

  // `clock` outlives the poller. INVALID_ARGUMENT: `url` is none.
  static absl::StatusOr<std::unique_ptr<PromqlPoller>> Start(const std::string& url,
                                                             const Clock& clock);
  ~PromqlPoller();
  PromqlPoller(const PromqlPoller&) = delete;
  PromqlPoller& operator=(const PromqlPoller&) = delete;

  // The signals to ask for from now on; those not of kind promql are left out. Answers to a query
  // that stays are kept.
  void SetSignals(const std::vector<PolicySignal>& signals);

  // By signal, the values that are not older than their max_age. The age of an answer begins when
  // the server's time of evaluation was first seen, so that a cached answer grows old.
  std::map<std::string, double> Answers() const;
  // By signal, over the life of the process.
  std::map<std::string, PromqlCounts> counts() const;

 private:
  struct Subject {
    PolicySignal signal;
    TimePoint next{};
    std::optional<double> value;
    double server_time = 0;
    TimePoint answered{};
  };

  PromqlPoller(std::unique_ptr<PromqlClient> client, const Clock& clock);
  void Run();
  // The subject that is due first, if it is due.
  std::optional<PolicySignal> NextDueLocked(Duration& wait) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void RecordLocked(const PolicySignal& signal, const PromqlAnswer& answer)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::unique_ptr<PromqlClient> client_;
  const Clock& clock_;
  std::atomic<bool> stopping_{false};
  mutable Mutex mutex_;
  CondVar changed_;
  std::vector<Subject> subjects_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, PromqlCounts> counts_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_PROMQL_POLLER_H_
