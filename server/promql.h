// One question to a Prometheus server over its HTTP API: an expression in, a number out, or one of
// a few reasons why not. Bounded in time and in bytes, follows no redirects. Not thread-safe.
// Source: https://prometheus.io/docs/prometheus/latest/querying/api/#instant-queries
#ifndef MOBI_SERVER_PROMQL_H_
#define MOBI_SERVER_PROMQL_H_

#include <atomic>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/base/clock.h"

namespace mobi {

enum class PromqlError {
  kTimeout,
  kUnreachable,  // no connection, or it broke
  kRefused,      // Prometheus answered with an error, such as a bad expression
  kBadResponse,  // not what the API says
  kNoSeries,
  kManySeries,  // the expression must give one
  kNotFinite,
};
inline constexpr int kNumPromqlErrors = 7;

// As in metrics: "timeout", "no_series" and so on.
const char* PromqlErrorName(PromqlError error);

struct PromqlAnswer {
  std::optional<double> value = std::nullopt;
  double time = 0;  // the server's, of the evaluation
  // Without a value:
  PromqlError error = PromqlError::kBadResponse;
  std::string reason = "";
};

// What an HTTP response means.
PromqlAnswer ParsePromqlResponse(long http_status, absl::string_view body);

class PromqlClient {
 public:
  // `url`: http or https, as in http://prometheus:9090 or with a path before /api/v1.
  // INVALID_ARGUMENT: it is none.
  static absl::StatusOr<std::unique_ptr<PromqlClient>> Create(const std::string& url);
  ~PromqlClient();
  PromqlClient(const PromqlClient&) = delete;
  PromqlClient& operator=(const PromqlClient&) = delete;

  // Blocks for `timeout` at most, or for a second after `*stop` became true.
  PromqlAnswer Query(const std::string& query, Duration timeout, const std::atomic<bool>* stop);

 private:
  PromqlClient(void* curl, std::string endpoint) : curl_(curl), endpoint_(std::move(endpoint)) {}

  void* const curl_;  // CURL*, keeps the connection
  const std::string endpoint_;
};

}  // namespace mobi

#endif  // MOBI_SERVER_PROMQL_H_
