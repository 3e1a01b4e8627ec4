// Range checks of a request's fields. Collects every violation, so that a client learns all of them
// at once; the message is the first. One request, one thread.
#ifndef MOBI_SERVER_FIELD_CHECKS_H_
#define MOBI_SERVER_FIELD_CHECKS_H_

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "google/rpc/error_details.pb.h"

namespace mobi {

enum class Lower { kClosed, kOpen };

class FieldChecks {
 public:
  void Violation(const std::string& field, const std::string& reason);

  // The value, or `absent` when there is none or it is not in [low, high] ((low, high] when open).
  // NaN is in no range.
  float Float(const std::string& field, std::optional<float> value, float absent, float low,
              float high, Lower lower = Lower::kClosed);
  int Int(const std::string& field, std::optional<int> value, int absent, int low, int high);
  // At most `limit`; `unit` as in "700 bytes".
  void Size(const std::string& field, int64_t size, int64_t limit, const std::string& unit);

  bool ok() const { return detail_.field_violations().empty(); }
  // OK, or INVALID_ARGUMENT with a BadRequest of all violations.
  absl::Status status() const;

 private:
  google::rpc::BadRequest detail_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_FIELD_CHECKS_H_
