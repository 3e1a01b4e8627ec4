// YAML as a tree with line numbers, read from files that are hostile until proven otherwise:
// bounded in size, depth and number of values, one document, no anchors, aliases or tags, no key
// twice. Below it sits typed reading whose errors name file, line and path. The one place that
// touches yaml-cpp, which throws. Pure; a tree is immutable and thread-safe.
#ifndef MOBI_SERVER_POLICY_DOCUMENT_H_
#define MOBI_SERVER_POLICY_DOCUMENT_H_

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/base/clock.h"

namespace mobi {

struct YamlLimits {
  size_t max_bytes = 256 << 10;
  int max_depth = 16;
  int max_nodes = 4096;  // keys and values; a key is looked for among those of its map
};

struct YamlNode {
  enum class Kind { kNull, kScalar, kSequence, kMap };
  Kind kind = Kind::kNull;
  int line = 0;                      // from 1; of a map or sequence, where its first element is
  bool quoted = false;               // a scalar in quotes is a string, whatever it looks like
  std::string text = "";             // of a scalar
  std::vector<YamlNode> items = {};  // of a sequence
  std::vector<std::pair<std::string, YamlNode>> fields = {};  // of a map, in the file's order

  const YamlNode* Find(absl::string_view key) const;
};

// INVALID_ARGUMENT "FILE:LINE: reason".
absl::StatusOr<YamlNode> ParseYaml(absl::string_view text, absl::string_view file,
                                   const YamlLimits& limits = {});

// A map inside a document and the way to it. Borrows the document. A null value reads as absent.
class YamlMap {
 public:
  // INVALID_ARGUMENT unless `node` is a map that has no keys but these.
  static absl::StatusOr<YamlMap> Of(const YamlNode& node, absl::string_view file,
                                    absl::string_view path,
                                    std::initializer_list<absl::string_view> keys);

  const YamlNode* Find(absl::string_view key) const;  // null: nullptr
  bool Has(absl::string_view key) const { return Find(key) != nullptr; }

  // Required. Numbers are finite decimals, durations as in 90s, 1h30m, 500ms.
  absl::StatusOr<double> Number(absl::string_view key) const;
  absl::StatusOr<std::string> String(absl::string_view key) const;
  absl::StatusOr<Duration> DurationOf(absl::string_view key) const;
  absl::StatusOr<const std::vector<YamlNode>*> List(absl::string_view key) const;

  // With a default for an absent key.
  absl::StatusOr<double> NumberOr(absl::string_view key, double absent) const;
  absl::StatusOr<std::string> StringOr(absl::string_view key, absl::string_view absent) const;
  absl::StatusOr<bool> BoolOr(absl::string_view key, bool absent) const;
  absl::StatusOr<Duration> DurationOr(absl::string_view key, Duration absent) const;

  // INVALID_ARGUMENT "FILE:LINE: path.key: reason", the line being the key's or else the map's.
  absl::Status Error(absl::string_view key, absl::string_view reason) const;
  // Of a key, as in windows[0].name.
  std::string PathTo(absl::string_view key) const;

 private:
  YamlMap(const YamlNode& node, absl::string_view file, absl::string_view path)
      : node_(&node), file_(file), path_(path) {}
  absl::StatusOr<const YamlNode*> Scalar(absl::string_view key) const;

  const YamlNode* node_;
  std::string file_;
  std::string path_;
};

// The line of a path such as windows[0].floor_bits, or of as much of it as there is.
int LineOf(const YamlNode& root, absl::string_view path);

// How a duration is written in YAML, such as 1h30m.
std::string FormatDuration(Duration duration);

}  // namespace mobi

#endif  // MOBI_SERVER_POLICY_DOCUMENT_H_
