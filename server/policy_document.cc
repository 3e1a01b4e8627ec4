#include "server/policy_document.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "absl/strings/charconv.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "engine/base/status_macros.h"
#include "yaml-cpp/eventhandler.h"
#include "yaml-cpp/exceptions.h"
#include "yaml-cpp/parser.h"

namespace mobi {
namespace {

// How a value looks in an error message.
std::string Excerpt(absl::string_view text) {
  return absl::StrCat("\"", absl::CHexEscape(text.substr(0, 40)),
                      text.size() > 40 ? "...\"" : "\"");
}

absl::Status ErrorAt(absl::string_view file, int line, absl::string_view path,
                     absl::string_view reason) {
  return absl::InvalidArgumentError(
      absl::StrCat(file, ":", line, ": ", path, path.empty() ? "" : ": ", reason));
}

// Builds the tree from the parser's events; after the first problem it ignores the rest.
class TreeBuilder final : public YAML::EventHandler {
 public:
  explicit TreeBuilder(const YamlLimits& limits) : limits_(limits) {}

  const std::string& problem() const { return problem_; }
  int problem_line() const { return problem_line_; }
  YamlNode TakeRoot() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnAnchor(const YAML::Mark& mark, const std::string&) override {
    Problem(mark, "anchors are not allowed");
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    Problem(mark, "aliases are not allowed");
  }
  void OnNull(const YAML::Mark& mark, YAML::anchor_t) override { Add(mark, YamlNode::Kind::kNull); }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                const std::string& value) override {
    CheckTag(mark, tag);
    if (expects_key()) return AddKey(mark, value);
    YamlNode* node = Add(mark, YamlNode::Kind::kScalar);
    if (node == nullptr) return;
    node->text = value;
    node->quoted = tag == "!";
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {
    CheckTag(mark, tag);
    Enter(Add(mark, YamlNode::Kind::kSequence), mark);
  }
  void OnSequenceEnd() override { Leave(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                  YAML::EmitterStyle::value) override {
    CheckTag(mark, tag);
    Enter(Add(mark, YamlNode::Kind::kMap), mark);
  }
  void OnMapEnd() override { Leave(); }

 private:
  struct Level {
    YamlNode* node;
    bool has_key;
  };

  void Problem(const YAML::Mark& mark, std::string reason) {
    if (!problem_.empty()) return;
    problem_ = std::move(reason);
    problem_line_ = mark.line + 1;
  }
  // "?" is no tag, "!" is what quotes mean.
  void CheckTag(const YAML::Mark& mark, const std::string& tag) {
    if (tag != "?" && tag != "!" && !tag.empty()) Problem(mark, "tags are not allowed");
  }
  bool expects_key() const {
    return !levels_.empty() && levels_.back().node->kind == YamlNode::Kind::kMap &&
           !levels_.back().has_key;
  }
  void AddKey(const YAML::Mark& mark, const std::string& key) {
    if (!problem_.empty()) return;
    Level& level = levels_.back();
    if (!CountNode(mark)) return;
    if (level.node->Find(key) != nullptr) {
      return Problem(mark, absl::StrCat("the key ", Excerpt(key), " is there twice"));
    }
    level.node->fields.emplace_back(key, YamlNode{.line = mark.line + 1});
    level.has_key = true;
  }
  // nullptr after a problem. The node's line is its key's, where it has one.
  YamlNode* Add(const YAML::Mark& mark, YamlNode::Kind kind) {
    if (expects_key()) Problem(mark, "a key must be a word");
    if (!problem_.empty() || !CountNode(mark)) return nullptr;
    YamlNode* node = &root_;
    if (levels_.empty()) {
      node->line = mark.line + 1;
    } else if (Level& level = levels_.back(); level.node->kind == YamlNode::Kind::kMap) {
      node = &level.node->fields.back().second;
      level.has_key = false;
    } else {
      node = &level.node->items.emplace_back(YamlNode{.line = mark.line + 1});
    }
    node->kind = kind;
    return node;
  }
  bool CountNode(const YAML::Mark& mark) {
    if (++num_nodes_ <= limits_.max_nodes) return true;
    Problem(mark, absl::StrFormat("more than %d keys and values", limits_.max_nodes));
    return false;
  }
  // Parents do not grow while a child is open, so pointers stay good.
  void Enter(YamlNode* node, const YAML::Mark& mark) {
    if (node == nullptr) return;
    if (levels_.size() >= static_cast<size_t>(limits_.max_depth)) {
      return Problem(mark, absl::StrFormat("nested deeper than %d levels", limits_.max_depth));
    }
    levels_.push_back({node, false});
  }
  void Leave() {
    if (problem_.empty()) levels_.pop_back();
  }

  const YamlLimits limits_;
  int num_nodes_ = 0;
  YamlNode root_;
  std::vector<Level> levels_;
  std::string problem_;
  int problem_line_ = 0;
};

}  // namespace

const YamlNode* YamlNode::Find(absl::string_view key) const {
  for (const auto& [name, value] : fields) {
    if (name == key) return &value;
  }
  return nullptr;
}

absl::StatusOr<YamlNode> ParseYaml(absl::string_view text, absl::string_view file,
                                   const YamlLimits& limits) {
  if (text.size() > limits.max_bytes) {
    return absl::InvalidArgumentError(absl::StrFormat("%s: has %d bytes, at most %d are read", file,
                                                      text.size(), limits.max_bytes));
  }
  TreeBuilder builder(limits);
  int extra_line = 0;
  try {
    std::istringstream stream{std::string(text)};
    YAML::Parser parser(stream);
    if (!parser.HandleNextDocument(builder)) return ErrorAt(file, 1, "", "is empty");
    TreeBuilder second(limits);
    if (parser.HandleNextDocument(second)) extra_line = std::max(second.TakeRoot().line, 1);
  } catch (const YAML::Exception& error) {
    return ErrorAt(file, error.mark.line + 1, "", error.msg);
  }
  if (!builder.problem().empty()) {
    return ErrorAt(file, builder.problem_line(), "", builder.problem());
  }
  if (extra_line > 0) return ErrorAt(file, extra_line, "", "a second document is not allowed");
  return builder.TakeRoot();
}

absl::StatusOr<YamlMap> YamlMap::Of(const YamlNode& node, absl::string_view file,
                                    absl::string_view path,
                                    std::initializer_list<absl::string_view> keys) {
  const YamlMap map(node, file, path);
  if (node.kind != YamlNode::Kind::kMap) {
    return ErrorAt(file, node.line, path, "must be a map of keys to values");
  }
  for (const auto& [key, value] : node.fields) {
    if (std::find(keys.begin(), keys.end(), key) == keys.end()) {
      return ErrorAt(file, value.line, path,
                     absl::StrCat("unknown key ", Excerpt(key), ", the known ones are ",
                                  absl::StrJoin(keys, ", ")));
    }
  }
  return map;
}

const YamlNode* YamlMap::Find(absl::string_view key) const {
  const YamlNode* node = node_->Find(key);
  return node != nullptr && node->kind != YamlNode::Kind::kNull ? node : nullptr;
}

absl::StatusOr<const YamlNode*> YamlMap::Scalar(absl::string_view key) const {
  const YamlNode* node = Find(key);
  if (node == nullptr) return Error(key, "is missing");
  if (node->kind != YamlNode::Kind::kScalar) return Error(key, "must be a single value");
  return node;
}

absl::StatusOr<double> YamlMap::Number(absl::string_view key) const {
  MOBI_ASSIGN_OR_RETURN(const YamlNode* node, Scalar(key));
  double value = 0;
  const char* end = node->text.data() + node->text.size();
  const auto result = absl::from_chars(node->text.data(), end, value);
  if (node->quoted || result.ec != std::errc() || result.ptr != end || !std::isfinite(value)) {
    return Error(key, absl::StrCat("must be a number, not ", Excerpt(node->text)));
  }
  return value;
}

absl::StatusOr<std::string> YamlMap::String(absl::string_view key) const {
  MOBI_ASSIGN_OR_RETURN(const YamlNode* node, Scalar(key));
  return node->text;
}

absl::StatusOr<Duration> YamlMap::DurationOf(absl::string_view key) const {
  MOBI_ASSIGN_OR_RETURN(const YamlNode* node, Scalar(key));
  absl::Duration value;
  if (!absl::ParseDuration(node->text, &value) || value < absl::ZeroDuration() ||
      value > absl::Hours(24 * 365)) {
    return Error(key, absl::StrCat("must be a duration such as 500ms, 30s or 1h30m, not ",
                                   Excerpt(node->text)));
  }
  return absl::ToChronoNanoseconds(value);
}

absl::StatusOr<const std::vector<YamlNode>*> YamlMap::List(absl::string_view key) const {
  const YamlNode* node = Find(key);
  if (node == nullptr) return Error(key, "is missing");
  if (node->kind != YamlNode::Kind::kSequence) return Error(key, "must be a list");
  return &node->items;
}

absl::StatusOr<double> YamlMap::NumberOr(absl::string_view key, double absent) const {
  if (!Has(key)) return absent;
  return Number(key);
}

absl::StatusOr<std::string> YamlMap::StringOr(absl::string_view key,
                                              absl::string_view absent) const {
  if (!Has(key)) return std::string(absent);
  return String(key);
}

absl::StatusOr<bool> YamlMap::BoolOr(absl::string_view key, bool absent) const {
  if (!Has(key)) return absent;
  MOBI_ASSIGN_OR_RETURN(const YamlNode* node, Scalar(key));
  if (!node->quoted && node->text == "true") return true;
  if (!node->quoted && node->text == "false") return false;
  return Error(key, absl::StrCat("must be true or false, not ", Excerpt(node->text)));
}

absl::StatusOr<Duration> YamlMap::DurationOr(absl::string_view key, Duration absent) const {
  if (!Has(key)) return absent;
  return DurationOf(key);
}

absl::Status YamlMap::Error(absl::string_view key, absl::string_view reason) const {
  const YamlNode* node = node_->Find(key);
  return ErrorAt(file_, node != nullptr ? node->line : node_->line, PathTo(key), reason);
}

std::string YamlMap::PathTo(absl::string_view key) const {
  return path_.empty() ? std::string(key) : absl::StrCat(path_, ".", key);
}

int LineOf(const YamlNode& root, absl::string_view path) {
  const YamlNode* node = &root;
  while (!path.empty()) {
    const size_t end = std::min(path.find_first_of(".[]", 1), path.size());
    const absl::string_view part = path.substr(0, end);
    path.remove_prefix(end);
    while (absl::StartsWith(path, "]") || absl::StartsWith(path, ".")) path.remove_prefix(1);
    const YamlNode* child = nullptr;
    size_t index = 0;
    if (absl::StartsWith(part, "[")) {
      if (absl::SimpleAtoi(part.substr(1), &index) && index < node->items.size()) {
        child = &node->items[index];
      }
    } else {
      child = node->Find(part);
    }
    if (child == nullptr) break;
    node = child;
  }
  return node->line;
}

std::string FormatDuration(Duration duration) {
  return absl::FormatDuration(absl::FromChrono(duration));
}

}  // namespace mobi
