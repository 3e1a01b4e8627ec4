#include "engine/base/json.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

using nlohmann::json;

constexpr size_t kMaxExcerpt = 40;
constexpr size_t kMaxReason = 160;

// One printable line, whatever the bytes: a hostile file must not write to the terminal.
std::string Printable(std::string_view text, size_t max_length) {
  std::string line;
  for (const char c : text.substr(0, max_length)) line += c >= ' ' && c <= '~' ? c : '?';
  if (text.size() > max_length) line += "...";
  return line;
}

// Builds the document from parse events, refusing what the parser itself lets pass.
class StrictBuilder {
 public:
  explicit StrictBuilder(int max_depth) : max_depth_(max_depth) {}

  bool null() { return Add(nullptr) != nullptr; }
  bool boolean(bool value) { return Add(value) != nullptr; }
  bool number_integer(json::number_integer_t value) { return Add(value) != nullptr; }
  bool number_unsigned(json::number_unsigned_t value) { return Add(value) != nullptr; }
  bool number_float(json::number_float_t value, const std::string&) {
    return Add(value) != nullptr;
  }
  bool string(std::string& value) { return Add(std::move(value)) != nullptr; }
  bool binary(json::binary_t&) { return false; }
  bool start_object(size_t) { return Push(json::object()); }
  bool start_array(size_t) { return Push(json::array()); }
  bool end_object() { return Pop(); }
  bool end_array() { return Pop(); }

  bool key(std::string& name) {
    if (open_.back()->contains(name)) {
      error_ = "duplicate key \"" + Printable(name, kMaxExcerpt) + "\"";
      return false;
    }
    key_ = std::move(name);
    return true;
  }

  // The parser's own message holds raw input and a class name; the reason in it is what helps.
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception& error) {
    std::string_view reason = error.what();
    if (const size_t dash = reason.find(" - "); dash != reason.npos) {
      reason.remove_prefix(dash + 3);
    } else if (const size_t bracket = reason.find("] "); bracket != reason.npos) {
      reason.remove_prefix(bracket + 2);
    }
    reason = reason.substr(0, reason.find("; last read"));
    error_ =
        absl::StrFormat("not valid JSON at byte %u: %s", position, Printable(reason, kMaxReason));
    return false;
  }

  const std::string& error() const { return error_; }
  json Take() { return std::move(root_); }

 private:
  json* Add(json value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (open_.back()->is_array()) {
      open_.back()->push_back(std::move(value));
      return &open_.back()->back();
    }
    return &((*open_.back())[key_] = std::move(value));
  }

  bool Push(json container) {
    if (static_cast<int>(open_.size()) >= max_depth_) {
      error_ = absl::StrFormat("nested deeper than %d", max_depth_);
      return false;
    }
    open_.push_back(Add(std::move(container)));
    return true;
  }

  bool Pop() {
    open_.pop_back();
    return true;
  }

  const int max_depth_;
  json root_;
  std::vector<json*> open_;  // the containers around the current position
  std::string key_;
  std::string error_;
};

}  // namespace

absl::StatusOr<json> ParseJson(std::string_view text, std::string_view file,
                               const JsonLimits& limits) {
  if (text.size() > limits.max_bytes) {
    return absl::InvalidArgumentError(absl::StrFormat("%s: %u bytes of JSON, the limit is %u", file,
                                                      text.size(), limits.max_bytes));
  }
  StrictBuilder builder(limits.max_depth);
  if (!json::sax_parse(text.begin(), text.end(), &builder)) {
    return absl::InvalidArgumentError(absl::StrFormat("%s: %s", file, builder.error()));
  }
  return builder.Take();
}

std::string JsonExcerpt(const json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "a list";
  return Printable(value.dump(-1, ' ', true, json::error_handler_t::replace), kMaxExcerpt);
}

absl::StatusOr<JsonObject> JsonObject::Of(const json& value, std::string_view file,
                                          std::string_view path) {
  if (!value.is_object()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s: %s%s%s is not an object", file, path, path.empty() ? "" : ": ", JsonExcerpt(value)));
  }
  return JsonObject(&value, file, path);
}

const json* JsonObject::Find(std::string_view key) const {
  const auto found = value_->find(key);
  return found == value_->end() || found->is_null() ? nullptr : &*found;
}

absl::Status JsonObject::Error(std::string_view key, std::string_view reason) const {
  return absl::InvalidArgumentError(absl::StrFormat("%s: %s: %s", file_, PathTo(key), reason));
}

std::string JsonObject::PathTo(std::string_view key) const {
  const std::string name = Printable(key, kMaxReason);
  return path_.empty() ? name : path_ + "." + name;
}

absl::StatusOr<int64_t> JsonObject::Int(std::string_view key, int64_t min, int64_t max) const {
  const json* value = Find(key);
  if (value == nullptr) return Error(key, "missing");
  if (!value->is_number_integer()) return Error(key, JsonExcerpt(*value) + " is not an integer");
  const bool too_large =
      value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
  const int64_t number = too_large ? 0 : value->get<int64_t>();
  if (too_large || number < min || number > max) {
    return Error(key, absl::StrFormat("%s is not in %d..%d", JsonExcerpt(*value), min, max));
  }
  return number;
}

absl::StatusOr<double> JsonObject::Number(std::string_view key, double min, double max) const {
  const json* value = Find(key);
  if (value == nullptr) return Error(key, "missing");
  if (!value->is_number()) return Error(key, JsonExcerpt(*value) + " is not a number");
  const double number = value->get<double>();
  if (!(number >= min && number <= max)) {  // false for NaN as well
    return Error(key, absl::StrFormat("%s is not in %g..%g", JsonExcerpt(*value), min, max));
  }
  return number;
}

absl::StatusOr<std::string> JsonObject::String(std::string_view key) const {
  const json* value = Find(key);
  if (value == nullptr) return Error(key, "missing");
  if (!value->is_string()) return Error(key, JsonExcerpt(*value) + " is not a string");
  return value->get<std::string>();
}

absl::StatusOr<bool> JsonObject::Bool(std::string_view key) const {
  const json* value = Find(key);
  if (value == nullptr) return Error(key, "missing");
  if (!value->is_boolean()) return Error(key, JsonExcerpt(*value) + " is not true or false");
  return value->get<bool>();
}

absl::StatusOr<JsonObject> JsonObject::Object(std::string_view key) const {
  const json* value = Find(key);
  if (value == nullptr) return Error(key, "missing");
  return Of(*value, file_, PathTo(key));
}

absl::StatusOr<const json*> JsonObject::Array(std::string_view key) const {
  const json* value = Find(key);
  if (value == nullptr) return Error(key, "missing");
  if (!value->is_array()) return Error(key, JsonExcerpt(*value) + " is not a list");
  return value;
}

absl::StatusOr<int64_t> JsonObject::IntOr(std::string_view key, int64_t min, int64_t max,
                                          int64_t absent) const {
  return Has(key) ? Int(key, min, max) : absent;
}

absl::StatusOr<double> JsonObject::NumberOr(std::string_view key, double min, double max,
                                            double absent) const {
  return Has(key) ? Number(key, min, max) : absent;
}

absl::StatusOr<std::string> JsonObject::StringOr(std::string_view key,
                                                 std::string_view absent) const {
  return Has(key) ? String(key) : std::string(absent);
}

absl::StatusOr<bool> JsonObject::BoolOr(std::string_view key, bool absent) const {
  return Has(key) ? Bool(key) : absent;
}

}  // namespace mobi
