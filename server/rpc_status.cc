#include "server/rpc_status.h"

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "google/rpc/status.pb.h"

namespace mobi {
namespace {

constexpr size_t kMaxMessageBytes = 1024;

template <typename Detail>
void Attach(const Detail& detail, absl::Status& status) {
  status.SetPayload(TypeUrl<Detail>(), absl::Cord(detail.SerializeAsString()));
}

// A cut never splits a UTF-8 sequence: the message is a proto string.
std::string Shortened(std::string message) {
  if (message.size() <= kMaxMessageBytes) return message;
  size_t size = kMaxMessageBytes;
  while (size > 0 && (message[size] & 0xC0) == 0x80) --size;
  message.resize(size);
  return message + "...";
}

}  // namespace

absl::Status FieldError(const std::string& field, const std::string& reason) {
  google::rpc::BadRequest detail;
  auto& violation = *detail.add_field_violations();
  violation.set_field(field);
  violation.set_description(reason);
  return BadRequestError(detail);
}

absl::Status BadRequestError(const google::rpc::BadRequest& detail) {
  const auto& first = detail.field_violations(0);
  absl::Status status =
      absl::InvalidArgumentError(absl::StrCat(first.field(), ": ", first.description()));
  Attach(detail, status);
  return status;
}

absl::Status PreconditionError(const std::string& type, const std::string& field,
                               const std::string& reason) {
  absl::Status status = absl::FailedPreconditionError(absl::StrCat(field, ": ", reason));
  google::rpc::PreconditionFailure detail;
  auto& violation = *detail.add_violations();
  violation.set_type(type);
  violation.set_subject(field);
  violation.set_description(reason);
  Attach(detail, status);
  return status;
}

absl::Status WithRetry(absl::Status status, Duration delay) {
  if (!absl::IsResourceExhausted(status) && !absl::IsUnavailable(status)) return status;
  if (DetailOf<google::rpc::RetryInfo>(status)) return status;
  google::rpc::RetryInfo detail;
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(delay);
  detail.mutable_retry_delay()->set_seconds(seconds.count());
  detail.mutable_retry_delay()->set_nanos(static_cast<int32_t>((delay - seconds).count()));
  Attach(detail, status);
  return status;
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  google::rpc::Status rich;
  rich.set_code(static_cast<int>(status.code()));
  rich.set_message(Shortened(std::string(status.message())));
  status.ForEachPayload([&rich](absl::string_view type_url, const absl::Cord& payload) {
    auto& detail = *rich.add_details();
    detail.set_type_url(std::string(type_url));
    detail.set_value(std::string(payload));
  });
  const auto code = static_cast<grpc::StatusCode>(status.code());
  if (rich.details().empty()) return grpc::Status(code, rich.message());
  return grpc::Status(code, rich.message(), rich.SerializeAsString());
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  google::rpc::Status rich;
  if (!status.error_details().empty() && rich.ParseFromString(status.error_details())) {
    for (const auto& detail : rich.details()) {
      result.SetPayload(detail.type_url(), absl::Cord(detail.value()));
    }
  }
  return result;
}

}  // namespace mobi
