// Policies as operators write them: YAML to Policy and back. Unknown keys, wrong types, bad ranges
// and impossible windows are refused with file, line and reason. Pure functions.
// The format: deploy/policies/README.md.
#ifndef MOBI_SERVER_POLICY_YAML_H_
#define MOBI_SERVER_POLICY_YAML_H_

#include <cstddef>
#include <string>

#include "absl/status/statusor.h"
#include "server/policy.h"

namespace mobi {

inline constexpr size_t kMaxPolicyBytes = 256 << 10;

// A policy that CheckPolicy accepts, or INVALID_ARGUMENT "FILE:LINE: path: reason".
absl::StatusOr<Policy> ParsePolicy(const std::string& yaml, const std::string& file);

// YAML that ParsePolicy reads as the same policy.
std::string FormatPolicy(const Policy& policy);

}  // namespace mobi

#endif  // MOBI_SERVER_POLICY_YAML_H_
