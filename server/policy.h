// An operator's precision policy as data: windows of bits, priority classes. Control plane only;
// the engine never sees it. Immutable once built and shared by pointer, so a reader keeps the
// version it started with.
#ifndef MOBI_SERVER_POLICY_H_
#define MOBI_SERVER_POLICY_H_

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace mobi {

inline constexpr float kLowestBits = 2.0f;
inline constexpr float kHighestBits = 8.0f;
inline constexpr char kDefaultPriorityClass[] = "standard";

// Who waits first and who keeps how many bits.
struct PriorityClass {
  std::string name;
  int priority = 0;  // higher goes first
  float floor_bits = kLowestBits;
};

// What the target may be while the window lasts; a floor that equals the ceiling fixes it.
struct PolicyWindow {
  std::string name;
  float floor_bits = kLowestBits;
  float ceiling_bits = kHighestBits;
};

struct Policy {
  std::vector<PriorityClass> classes;     // highest priority first; has kDefaultPriorityClass
  std::vector<PolicyWindow> windows;      // first match wins; the last one always matches
  float max_request_bits = kHighestBits;  // a request may not ask for a higher min_bits

  const PriorityClass* FindClass(const std::string& name) const;
};

// Classes premium and standard, one window fixed at `bits`.
Policy FixedPolicy(float bits);

// INVALID_ARGUMENT names the field; FixedPolicy's are valid for bits in [2, 8].
absl::Status CheckPolicy(const Policy& policy);

}  // namespace mobi

#endif  // MOBI_SERVER_POLICY_H_
