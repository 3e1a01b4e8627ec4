// Counts what waits and foretells how long more would have to wait, so that a request that cannot
// be served in time is refused when it comes and not after it has waited. Little's law: what waits,
// over the rate at which requests started while others had to wait. Deterministic; not thread-safe,
// the engine guards it.
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

class Admission {
 public:
  explicit Admission(const AdmissionOptions& options) : options_(options) {}

  // RESOURCE_EXHAUSTED: the queue is full, or too long for this priority. DEADLINE_EXCEEDED: the
  // wait and reading the prompt would take longer than `time_left`.
  absl::Status Check(int priority, int64_t prompt_tokens, Duration time_left) const;
  // Accepted, and later started or ended.
  void Enter(int priority, int64_t prompt_tokens);
  void Leave(int priority, int64_t prompt_tokens);

  // After a step: how many requests it started, and whether others had to wait on.
  void StepEnded(double seconds, int started, bool others_wait, double seconds_per_prompt_token);

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
  // Over steps in which requests had to wait, fading: requests started, and time.
  double started_ = 0;
  double seconds_ = 0;
  bool backlog_ = false;
  double seconds_per_prompt_token_ = 0;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_ADMISSION_H_
