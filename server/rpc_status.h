// Statuses as gRPC clients see them: absl::Status carries google.rpc details as payloads (keyed by
// their type URL) and becomes a grpc::Status with the rich error model in its trailer. Pure
// functions, safe from any thread.
#ifndef MOBI_SERVER_RPC_STATUS_H_
#define MOBI_SERVER_RPC_STATUS_H_

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "engine/base/clock.h"
#include "google/rpc/error_details.pb.h"
#include "grpcpp/support/status.h"

namespace mobi {

// INVALID_ARGUMENT "field: reason" with a BadRequest that names the field.
absl::Status FieldError(const std::string& field, const std::string& reason);

// The same for one or more violations; the message is the first one's.
absl::Status BadRequestError(const google::rpc::BadRequest& detail);

// FAILED_PRECONDITION "field: reason" with a PreconditionFailure of `type`.
absl::Status PreconditionError(const std::string& type, const std::string& field,
                               const std::string& reason);

// Adds RetryInfo to RESOURCE_EXHAUSTED and UNAVAILABLE unless they have one.
absl::Status WithRetry(absl::Status status, Duration delay);

// Code, message (cut to 1 KiB: it is sent as a header) and payloads as details.
grpc::Status ToGrpcStatus(const absl::Status& status);

// For clients: the status with its details as payloads again.
absl::Status FromGrpcStatus(const grpc::Status& status);

// A string of its own: protobuf gives names as strings, later as views.
template <typename Detail>
std::string TypeUrl() {
  return std::string("type.googleapis.com/").append(Detail::descriptor()->full_name());
}

// The parsed detail of this type, or nothing.
template <typename Detail>
std::optional<Detail> DetailOf(const absl::Status& status) {
  const auto payload = status.GetPayload(TypeUrl<Detail>());
  Detail detail;
  if (!payload || !detail.ParseFromString(std::string(*payload))) return std::nullopt;
  return detail;
}

}  // namespace mobi

#endif  // MOBI_SERVER_RPC_STATUS_H_
