#include "server/policy.h"

#include <set>

#include "absl/strings/str_format.h"

namespace mobi {
namespace {

absl::Status CheckBits(const std::string& field, float bits) {
  if (bits >= kLowestBits && bits <= kHighestBits) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrFormat("%s: %g is out of range [%g, %g]", field, bits, kLowestBits, kHighestBits));
}

}  // namespace

const PriorityClass* Policy::FindClass(const std::string& name) const {
  for (const PriorityClass& candidate : classes) {
    if (candidate.name == name) return &candidate;
  }
  return nullptr;
}

Policy FixedPolicy(float bits) {
  Policy policy;
  policy.classes = {{.name = "premium", .priority = 1}, {.name = kDefaultPriorityClass}};
  policy.windows = {{.name = "fixed", .floor_bits = bits, .ceiling_bits = bits}};
  return policy;
}

absl::Status CheckPolicy(const Policy& policy) {
  std::set<std::string> names;
  for (const PriorityClass& priority_class : policy.classes) {
    const std::string field = "classes." + priority_class.name;
    if (!names.insert(priority_class.name).second) {
      return absl::InvalidArgumentError(field + ": named twice");
    }
    if (auto status = CheckBits(field + ".floor_bits", priority_class.floor_bits); !status.ok()) {
      return status;
    }
  }
  if (policy.FindClass(kDefaultPriorityClass) == nullptr) {
    return absl::InvalidArgumentError(absl::StrFormat("classes: needs %s", kDefaultPriorityClass));
  }
  if (policy.windows.empty()) return absl::InvalidArgumentError("windows: needs at least one");
  for (const PolicyWindow& window : policy.windows) {
    const std::string field = "windows." + window.name;
    for (auto [name, bits] : {std::pair{".floor_bits", window.floor_bits},
                              std::pair{".ceiling_bits", window.ceiling_bits}}) {
      if (auto status = CheckBits(field + name, bits); !status.ok()) return status;
    }
    if (window.floor_bits > window.ceiling_bits) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s.floor_bits: %g is above ceiling_bits %g", field, window.floor_bits,
                          window.ceiling_bits));
    }
  }
  return CheckBits("max_request_bits", policy.max_request_bits);
}

}  // namespace mobi
