#include "server/field_checks.h"

#include "server/rpc_status.h"

namespace mobi {

void FieldChecks::Violation(const std::string& field, const std::string& reason) {
  auto& violation = *detail_.add_field_violations();
  violation.set_field(field);
  violation.set_description(reason);
}

float FieldChecks::Float(const std::string& field, std::optional<float> value, float absent,
                         float low, float high, Lower lower) {
  if (!value) return absent;
  const bool above = lower == Lower::kOpen ? *value > low : *value >= low;
  if (above && *value <= high) return *value;
  Violation(field, absl::StrFormat("%g is out of range %s%g, %g]", *value,
                                   lower == Lower::kOpen ? "(" : "[", low, high));
  return absent;
}

int FieldChecks::Int(const std::string& field, std::optional<int> value, int absent, int low,
                     int high) {
  if (!value) return absent;
  if (*value >= low && *value <= high) return *value;
  Violation(field, absl::StrFormat("%d is out of range [%d, %d]", *value, low, high));
  return absent;
}

void FieldChecks::Size(const std::string& field, int64_t size, int64_t limit,
                       const std::string& unit) {
  if (size <= limit) return;
  Violation(field, absl::StrFormat("%d %s, at most %d are taken", size, unit, limit));
}

absl::Status FieldChecks::status() const {
  if (ok()) return absl::OkStatus();
  return BadRequestError(detail_);
}

}  // namespace mobi
