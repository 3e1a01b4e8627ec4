// JSON from files that are hostile until proven otherwise: parsing that never throws and bounds
// depth, and reads of fields that name file, field and reason when they fail. The one place that
// touches nlohmann::json's throwing interface. Pure functions, safe from any thread.
// Strictness beyond the parser's: no duplicate keys, valid UTF-8 only, no infinities.
#ifndef MOBI_ENGINE_BASE_JSON_H_
#define MOBI_ENGINE_BASE_JSON_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace mobi {

struct JsonLimits {
  size_t max_bytes = 1 << 20;
  int max_depth = 32;
};

// INVALID_ARGUMENT "FILE: byte N: reason".
absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view file,
                                         const JsonLimits& limits = {});

// An object inside a parsed document, with the way to it for errors: "FILE: rope_scaling.factor:
// missing". Borrows the document. A key whose value is null reads as absent.
class JsonObject {
 public:
  // INVALID_ARGUMENT unless `value` is an object.
  static absl::StatusOr<JsonObject> Of(const nlohmann::json& value, std::string_view file,
                                       std::string_view path = "");

  // Absent or null: nullptr.
  const nlohmann::json* Find(std::string_view key) const;
  bool Has(std::string_view key) const { return Find(key) != nullptr; }

  // Required fields. Integers must be written as integers; numbers must be finite.
  absl::StatusOr<int64_t> Int(std::string_view key, int64_t min, int64_t max) const;
  absl::StatusOr<double> Number(std::string_view key, double min, double max) const;
  absl::StatusOr<std::string> String(std::string_view key) const;
  absl::StatusOr<bool> Bool(std::string_view key) const;
  absl::StatusOr<JsonObject> Object(std::string_view key) const;
  // The value is an array; the pointer is never null.
  absl::StatusOr<const nlohmann::json*> Array(std::string_view key) const;
  // Element `index`, below the size, of the array `key`: an object.
  absl::StatusOr<JsonObject> Element(std::string_view key, size_t index) const {
    const absl::StatusOr<const nlohmann::json*> array = Array(key);
    if (!array.ok()) return array.status();
    return Of((**array)[index], file_, PathTo(key) + "[" + std::to_string(index) + "]");
  }

  // The same with a default for an absent field.
  absl::StatusOr<int64_t> IntOr(std::string_view key, int64_t min, int64_t max,
                                int64_t absent) const;
  absl::StatusOr<double> NumberOr(std::string_view key, double min, double max,
                                  double absent) const;
  absl::StatusOr<std::string> StringOr(std::string_view key, std::string_view absent) const;
  absl::StatusOr<bool> BoolOr(std::string_view key, bool absent) const;

  // INVALID_ARGUMENT "FILE: path.key: reason".
  absl::Status Error(std::string_view key, std::string_view reason) const;

  const nlohmann::json& value() const { return *value_; }
  const std::string& file() const { return file_; }

 private:
  JsonObject(const nlohmann::json* value, std::string_view file, std::string_view path)
      : value_(value), file_(file), path_(path) {}
  std::string PathTo(std::string_view key) const;

  const nlohmann::json* value_;
  std::string file_;
  std::string path_;
};

// How a value looks in an error message: at most 40 characters of its JSON.
std::string JsonExcerpt(const nlohmann::json& value);

}  // namespace mobi

#endif  // MOBI_ENGINE_BASE_JSON_H_
