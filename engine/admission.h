// Counts what waits and foretells how long more would have to wait, so that a request that cannot
// be served in time is refused when it comes and not after it has waited. Where running requests
// must end first, Little's law tells the rate: their number over the time each stays; where prompts
// wait to be read, the rate at which they have started of late does. Deterministic; not
// thread-safe, the engine guards it.
#ifndef MOBI_ENGINE_ADMISSION_H_
#define MOBI_ENGINE_ADMISSION_H_

#include <cstdint>
#include <map>

#include "absl/status/status.h"
#include "engine/base/clock.h"

namespace mobi {

struct AdmissionOptions {
  int max_waiting_requests = 256;
  int64_t max_waiting_tokens = 1 << 18;
  Duration max_expected_wait = std::chrono::seconds(2);
};

// What a step was and what it left.
struct StepLoad {
  double seconds = 0;
  int running = 0;           // requests
  int started = 0;           // requests that it began to serve
  bool others_wait = false;  // requests that it did not
  bool full = false;         // they wait until others end, not only until prompts are read
};

class Admission {
 public:
  explicit Admission(const AdmissionOptions& options) : options_(options) {}

  // RESOURCE_EXHAUSTED: the queue is full, or too long for this priority. DEADLINE_EXCEEDED: the
  // wait and reading the prompt would take longer than `time_left`.
  absl::Status Check(int priority, int64_t prompt_tokens, Duration time_left) const;
  // Accepted, and later started or ended.
  void Enter(int priority, int64_t prompt_tokens);
  void Leave(int priority, int64_t prompt_tokens);

  // After a step.
  void StepEnded(const StepLoad& load, double seconds_per_prompt_token);
  // A request that ran has ended, so long after it started.
  void Finished(double seconds);

  // Until a new request of this priority would start: behind those of its priority and above.
  Duration ExpectedWait(int priority) const;

  int waiting_requests() const { return waiting_requests_; }
  int64_t waiting_tokens() const { return waiting_tokens_; }

 private:
  struct Waiting {
    int requests = 0;
    int64_t tokens = 0;
  };
  const AdmissionOptions options_;
  std::map<int, Waiting> by_priority_;  // none empty
  int waiting_requests_ = 0;
  int64_t waiting_tokens_ = 0;
  StepLoad last_;
  double mean_stay_ = 0;  // seconds, of the requests that ended of late
  int finished_ = 0;      // as many as count
  double busy_seconds_ = 0;
  // Over steps in which prompts waited to be read, fading: requests started, and time.
  double started_ = 0;
  double reading_seconds_ = 0;
  double seconds_per_prompt_token_ = 0;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_ADMISSION_H_
