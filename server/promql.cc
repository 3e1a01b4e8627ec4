#include "server/promql.h"

#include <curl/curl.h>

#include <cmath>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "engine/base/json.h"

namespace mobi {
namespace {

// One sample has some hundred bytes; anything of this size has far too many series.
constexpr size_t kMaxResponseBytes = 64 << 10;
constexpr size_t kMaxReasonBytes = 200;

PromqlAnswer Failure(PromqlError error, absl::string_view reason) {
  return {.error = error, .reason = std::string(reason.substr(0, kMaxReasonBytes))};
}

// [<time>, "<value>"], the API's form of a sample.
PromqlAnswer ParseSample(const nlohmann::json& sample) {
  if (!sample.is_array() || sample.size() != 2 || !sample[0].is_number() ||
      !sample[1].is_string()) {
    return Failure(PromqlError::kBadResponse, "a sample is not [time, \"value\"]");
  }
  double value = 0;
  const auto& text = sample[1].get_ref<const std::string&>();
  if (!absl::SimpleAtod(text, &value)) {
    return Failure(PromqlError::kBadResponse, "a value is not a number");
  }
  if (!std::isfinite(value)) {
    return Failure(PromqlError::kNotFinite, absl::StrCat("the value is ", text));
  }
  return {.value = value, .time = sample[0].get<double>()};
}

PromqlAnswer ParseVector(const nlohmann::json& result) {
  if (!result.is_array()) return Failure(PromqlError::kBadResponse, "the vector is no array");
  if (result.empty()) return Failure(PromqlError::kNoSeries, "the result has no series");
  if (result.size() > 1) {
    return Failure(PromqlError::kManySeries,
                   absl::StrFormat("the result has %d series, needs one", result.size()));
  }
  if (!result[0].is_object() || !result[0].contains("value")) {
    return Failure(PromqlError::kBadResponse, "a series has no value");
  }
  return ParseSample(result[0]["value"]);
}

struct Response {
  std::string body;
  bool too_large = false;
};

size_t OnData(char* data, size_t size, size_t count, void* context) {
  auto& response = *static_cast<Response*>(context);
  if (response.body.size() + size * count > kMaxResponseBytes) {
    response.too_large = true;
    return 0;
  }
  response.body.append(data, size * count);
  return size * count;
}

int OnProgress(void* context, curl_off_t, curl_off_t, curl_off_t, curl_off_t) {
  return static_cast<const std::atomic<bool>*>(context)->load(std::memory_order_relaxed) ? 1 : 0;
}

PromqlAnswer TransferFailure(CURLcode code, const Response& response) {
  if (response.too_large) {
    return Failure(PromqlError::kManySeries,
                   absl::StrFormat("the response has more than %d bytes", kMaxResponseBytes));
  }
  const bool timeout = code == CURLE_OPERATION_TIMEDOUT || code == CURLE_ABORTED_BY_CALLBACK;
  return Failure(timeout ? PromqlError::kTimeout : PromqlError::kUnreachable,
                 curl_easy_strerror(code));
}

}  // namespace

const char* PromqlErrorName(PromqlError error) {
  switch (error) {
    case PromqlError::kTimeout:
      return "timeout";
    case PromqlError::kUnreachable:
      return "unreachable";
    case PromqlError::kRefused:
      return "refused";
    case PromqlError::kBadResponse:
      return "bad_response";
    case PromqlError::kNoSeries:
      return "no_series";
    case PromqlError::kManySeries:
      return "many_series";
    case PromqlError::kNotFinite:
      return "not_finite";
  }
  return "";
}

PromqlAnswer ParsePromqlResponse(long http_status, absl::string_view body) {
  const auto document =
      ParseJson({body.data(), body.size()}, "response", {.max_bytes = kMaxResponseBytes});
  if (!document.ok() || !document->is_object()) {
    if (http_status != 200) {
      return Failure(PromqlError::kRefused, absl::StrFormat("HTTP status %d", http_status));
    }
    return Failure(PromqlError::kBadResponse, "the response is no JSON object");
  }
  const auto text = [](const nlohmann::json& object, const char* key) {
    return object.contains(key) && object[key].is_string() ? object[key].get<std::string>() : "";
  };
  if (http_status != 200 || text(*document, "status") != "success") {
    return Failure(PromqlError::kRefused,
                   absl::StrFormat("HTTP status %d: %s", http_status, text(*document, "error")));
  }
  const nlohmann::json data = document->value("data", nlohmann::json());
  if (!data.is_object() || !data.contains("result")) {
    return Failure(PromqlError::kBadResponse, "the response has no result");
  }
  const std::string type = text(data, "resultType");
  if (type == "vector") return ParseVector(data["result"]);
  if (type == "scalar") return ParseSample(data["result"]);
  return Failure(PromqlError::kBadResponse,
                 absl::StrCat("a result of type \"", type, "\", needs vector or scalar"));
}

absl::StatusOr<std::unique_ptr<PromqlClient>> PromqlClient::Create(const std::string& url) {
  if (curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK) {
    return absl::InternalError("libcurl cannot be initialized");
  }
  absl::Cleanup undo = [] { curl_global_cleanup(); };
  CURLU* parsed = curl_url();
  const auto free_url = absl::MakeCleanup([parsed] { curl_url_cleanup(parsed); });
  char* scheme = nullptr;
  const bool good = curl_url_set(parsed, CURLUPART_URL, url.c_str(), 0) == CURLUE_OK &&
                    curl_url_get(parsed, CURLUPART_SCHEME, &scheme, 0) == CURLUE_OK;
  const std::string scheme_text = scheme == nullptr ? "" : scheme;
  curl_free(scheme);
  if (!good || (scheme_text != "http" && scheme_text != "https")) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", url, "\" is no URL of a Prometheus server, such as http://host:9090"));
  }
  CURL* curl = curl_easy_init();
  if (curl == nullptr) return absl::InternalError("libcurl cannot be initialized");
  std::move(undo).Cancel();
  return std::unique_ptr<PromqlClient>(
      new PromqlClient(curl, absl::StrCat(absl::StripSuffix(url, "/"), "/api/v1/query")));
}

PromqlClient::~PromqlClient() {
  curl_easy_cleanup(curl_);
  curl_global_cleanup();
}

PromqlAnswer PromqlClient::Query(const std::string& query, Duration timeout,
                                 const std::atomic<bool>* stop) {
  const long timeout_ms = std::lround(ToMillis(timeout));
  char* escaped = curl_easy_escape(curl_, query.data(), static_cast<int>(query.size()));
  const std::string form =
      absl::StrFormat("query=%s&timeout=%dms", escaped == nullptr ? "" : escaped, timeout_ms);
  curl_free(escaped);
  Response response;
  curl_easy_reset(curl_);  // keeps the connection
  curl_easy_setopt(curl_, CURLOPT_URL, endpoint_.c_str());
  curl_easy_setopt(curl_, CURLOPT_PROTOCOLS_STR, "http,https");
  curl_easy_setopt(curl_, CURLOPT_POSTFIELDSIZE, static_cast<long>(form.size()));
  curl_easy_setopt(curl_, CURLOPT_POSTFIELDS, form.c_str());
  curl_easy_setopt(curl_, CURLOPT_NOSIGNAL, 1L);
  curl_easy_setopt(curl_, CURLOPT_TIMEOUT_MS, timeout_ms);
  curl_easy_setopt(curl_, CURLOPT_WRITEFUNCTION, OnData);
  curl_easy_setopt(curl_, CURLOPT_WRITEDATA, &response);
  if (stop != nullptr) {
    curl_easy_setopt(curl_, CURLOPT_NOPROGRESS, 0L);
    curl_easy_setopt(curl_, CURLOPT_XFERINFOFUNCTION, OnProgress);
    curl_easy_setopt(curl_, CURLOPT_XFERINFODATA, const_cast<std::atomic<bool>*>(stop));
  }
  const CURLcode code = curl_easy_perform(curl_);
  if (code != CURLE_OK) return TransferFailure(code, response);
  long http_status = 0;
  curl_easy_getinfo(curl_, CURLINFO_RESPONSE_CODE, &http_status);
  return ParsePromqlResponse(http_status, response.body);
}

}  // namespace mobi
