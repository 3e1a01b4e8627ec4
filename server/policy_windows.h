// Which of a policy's windows is open when: now for the controller, over the coming week for
// people. Pure functions.
#ifndef MOBI_SERVER_POLICY_WINDOWS_H_
#define MOBI_SERVER_POLICY_WINDOWS_H_

#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/policy.h"

namespace mobi {

// policy.windows[window] holds from the time asked for up to `until`; what holds then is asked for
// again (it can be the same one).
struct OpenWindow {
  size_t window = 0;
  absl::Time until;
};

// `policy` has passed CheckPolicy.
OpenWindow WindowAt(const Policy& policy, absl::Time time);

struct WindowSpan {
  size_t window = 0;
  TimeSpan span;
};

// All of [from, to) in order, each window as long as it holds; at most `max_spans`.
std::vector<WindowSpan> WindowsBetween(const Policy& policy, absl::Time from, absl::Time to,
                                       size_t max_spans);

// What an operator wants to see of a policy before it is applied: classes, signals, and the windows
// of the week from `now` as a table, in the time zone of the first window that has one.
std::string DescribePolicy(const Policy& policy, absl::Time now);

// Reads, parses and describes a policy file: all of `mobictl policy check FILE`. Errors are
// ReadPolicyFile's.
absl::StatusOr<std::string> CheckPolicyFile(const std::string& path, absl::Time now);

}  // namespace mobi

#endif  // MOBI_SERVER_POLICY_WINDOWS_H_
