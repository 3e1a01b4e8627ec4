#include "server/rpc_status.h"

#include "gmock/gmock.h"
#include "google/rpc/status.pb.h"
#include "gtest/gtest.h"

namespace mobi {
namespace {

TEST(RpcStatus, FieldErrorNamesTheFieldInMessageAndDetail) {
  const grpc::Status status =
      ToGrpcStatus(FieldError("sampling.top_p", "2 is out of range (0, 1]"));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(status.error_message(), "sampling.top_p: 2 is out of range (0, 1]");
  google::rpc::Status rich;
  ASSERT_TRUE(rich.ParseFromString(status.error_details()));
  EXPECT_EQ(rich.code(), 3);
  EXPECT_EQ(rich.message(), status.error_message());
  ASSERT_EQ(rich.details_size(), 1);
  google::rpc::BadRequest detail;
  ASSERT_TRUE(rich.details(0).UnpackTo(&detail));
  ASSERT_EQ(detail.field_violations_size(), 1);
  EXPECT_EQ(detail.field_violations(0).field(), "sampling.top_p");
  EXPECT_EQ(detail.field_violations(0).description(), "2 is out of range (0, 1]");
}

TEST(RpcStatus, RetryInfoIsForOverloadAndUnavailableOnly) {
  const Duration delay = std::chrono::milliseconds(1500);
  for (int code = 1; code <= 16; ++code) {
    const absl::Status plain(static_cast<absl::StatusCode>(code), "why");
    const auto detail =
        DetailOf<google::rpc::RetryInfo>(FromGrpcStatus(ToGrpcStatus(WithRetry(plain, delay))));
    const bool expected = absl::IsResourceExhausted(plain) || absl::IsUnavailable(plain);
    ASSERT_EQ(detail.has_value(), expected) << plain;
    if (detail) {
      EXPECT_EQ(detail->retry_delay().seconds(), 1);
      EXPECT_EQ(detail->retry_delay().nanos(), 500'000'000);
    }
  }
}

TEST(RpcStatus, TheFirstRetryInfoStays) {
  const absl::Status once = WithRetry(absl::UnavailableError("x"), std::chrono::seconds(1));
  EXPECT_EQ(WithRetry(once, std::chrono::seconds(9)), once);
}

TEST(RpcStatus, RoundTripsThroughGrpc) {
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
  const absl::Status status = PreconditionError("POLICY", "precision.min_bits", "above 6");
  EXPECT_EQ(FromGrpcStatus(ToGrpcStatus(status)), status);
}

TEST(RpcStatus, LongMessagesAreCutBetweenCharacters) {
  std::string text;
  while (text.size() < 5000) text += "\xE2\x82\xAC";  // the euro sign, three bytes
  const grpc::Status status = ToGrpcStatus(absl::InternalError(text));
  EXPECT_LE(status.error_message().size(), 1024 + 3);
  EXPECT_EQ(status.error_message().substr(0, 1023), text.substr(0, 1023));
  EXPECT_EQ(status.error_message().substr(1023), "...");
}

}  // namespace
}  // namespace mobi
