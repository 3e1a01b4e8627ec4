#include "engine/manifest.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "engine/base/file_writer.h"
#include "engine/base/mapped_file.h"
#include "engine/base/sha256.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr size_t kDigits = 64;
constexpr uint64_t kMaxManifestBytes = 1 << 20;

// name -> digest.
using Manifest = std::map<std::string, std::string, std::less<>>;

absl::StatusOr<Manifest> ParseManifest(std::string_view text, const std::string& path) {
  Manifest manifest;
  int line_number = 0;
  const std::vector<std::string> lines =
      absl::StrSplit(absl::string_view(text.data(), text.size()), '\n');
  for (const std::string& line : lines) {
    ++line_number;
    if (line.empty()) continue;
    const auto refuse = [&](std::string_view reason) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s: line %d: %s", path, line_number, reason));
    };
    const bool digits = line.size() > kDigits + 2 &&
                        std::all_of(line.begin(), line.begin() + kDigits,
                                    [](unsigned char c) { return absl::ascii_isxdigit(c); });
    // Between digest and name: a space, then a space or the star of binary mode.
    if (!digits || line[kDigits] != ' ' || (line[kDigits + 1] != ' ' && line[kDigits + 1] != '*')) {
      return refuse("not a SHA-256 and a file name");
    }
    const std::string name = line.substr(kDigits + 2);
    if (!IsPlainFileName(name)) return refuse("the file lies outside of the folder");
    const std::string digest = absl::AsciiStrToLower(line.substr(0, kDigits));
    if (!manifest.emplace(name, digest).second) return refuse("the file is named twice");
  }
  return manifest;
}

}  // namespace

bool IsPlainFileName(std::string_view name) {
  const bool printable = std::all_of(name.begin(), name.end(), [](char c) {
    return static_cast<unsigned char>(c) >= ' ' && c != '/' && c != '\x7f';
  });
  return printable && !name.empty() && name != "." && name != "..";
}

absl::Status WriteManifest(const std::string& dir) {
  std::vector<std::string> names;
  std::error_code error;
  for (std::filesystem::directory_iterator it(dir, error), end; !error && it != end;
       it.increment(error)) {
    names.push_back(it->path().filename().string());
  }
  if (error) return absl::ErrnoToStatus(error.value(), dir);
  std::sort(names.begin(), names.end());
  std::string text;
  for (const std::string& name : names) {
    MOBI_ASSIGN_OR_RETURN(const std::string digest, Sha256OfFile(dir + "/" + name));
    text += digest + "  " + name + "\n";
  }
  return WriteFile(dir + "/" + kManifestName, text);
}

absl::StatusOr<int> VerifyManifest(const std::string& dir, absl::Span<const std::string> files,
                                   const StreamOptions& options, ManifestSink sink) {
  const std::string path = dir + "/" + kManifestName;
  MOBI_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path, kMaxManifestBytes));
  MOBI_ASSIGN_OR_RETURN(const Manifest manifest, ParseManifest(file.text(), path));
  for (const std::string& name : files) {
    if (manifest.find(name) == manifest.end()) {
      return absl::InvalidArgumentError(absl::StrFormat("%s: %s: not listed", path, name));
    }
  }
  std::vector<StreamedFile> listed;
  std::vector<std::string_view> names;
  for (const auto& [name, expected] : manifest) {
    const bool weights = absl::EndsWith(name, ".safetensors") &&
                         std::find(files.begin(), files.end(), name) != files.end();
    listed.push_back({dir + "/" + name, weights ? INT64_MAX : kMaxSideFileBytes});
    names.push_back(name);
  }
  MOBI_RETURN_IF_ERROR(
      StreamFiles(absl::MakeSpan(listed), options,
                  [&](size_t i, uint64_t offset, auto bytes) { sink(names[i], offset, bytes); }));
  auto at = listed.begin();
  for (const auto& [name, expected] : manifest) {
    const std::string& found = (at++)->sha256;
    if (found != expected) {
      return absl::DataLossError(absl::StrFormat("%s/%s: SHA-256 is %s..., MANIFEST says %s...",
                                                 dir, name, found.substr(0, 12),
                                                 expected.substr(0, 12)));
    }
  }
  return static_cast<int>(manifest.size());
}

}  // namespace mobi
