#include "engine/manifest.h"

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <map>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "engine/base/file_writer.h"
#include "engine/base/mapped_file.h"
#include "engine/base/mutex.h"
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

struct Listed {
  MappedFile file;
  std::string digest;
};

// On as many threads as there are cores: one hashes no faster than some disks read.
void HashAll(std::vector<Listed>& listed, const HashProgress& progress) {
  constexpr size_t kPiece = 16 << 20;
  uint64_t total = 0;
  for (const Listed& one : listed) total += one.file.bytes().size();
  Mutex mutex;
  uint64_t done = 0;
  const auto hashed = [&](size_t bytes) {
    MutexLock lock(mutex);
    done += bytes;
    if (progress) progress(done, total);
  };
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < listed.size(); i = next++) {
      Sha256 hash;
      auto left = listed[i].file.bytes();
      while (!left.empty()) {
        const auto piece = left.subspan(0, kPiece);
        hash.Update(piece);
        hashed(piece.size());
        left.remove_prefix(piece.size());
      }
      listed[i].digest = hash.HexDigest();
    }
  };
  const size_t cores = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> others(std::max<size_t>(1, std::min(cores, listed.size())) - 1);
  for (std::thread& thread : others) thread = std::thread(work);
  work();
  for (std::thread& thread : others) thread.join();
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
                                   const HashProgress& progress) {
  const std::string path = dir + "/" + kManifestName;
  MOBI_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path, kMaxManifestBytes));
  MOBI_ASSIGN_OR_RETURN(const Manifest manifest, ParseManifest(file.text(), path));
  for (const std::string& name : files) {
    if (manifest.find(name) == manifest.end()) {
      return absl::InvalidArgumentError(absl::StrFormat("%s: %s: not listed", path, name));
    }
  }
  std::vector<Listed> listed;
  for (const auto& [name, expected] : manifest) {
    const bool weights = absl::EndsWith(name, ".safetensors") &&
                         std::find(files.begin(), files.end(), name) != files.end();
    MOBI_ASSIGN_OR_RETURN(
        MappedFile mapped,
        MappedFile::Open(dir + "/" + name, weights ? INT64_MAX : kMaxSideFileBytes));
    listed.push_back({std::move(mapped), {}});
  }
  HashAll(listed, progress);
  auto at = listed.begin();
  for (const auto& [name, expected] : manifest) {
    const std::string& found = (at++)->digest;
    if (found != expected) {
      return absl::DataLossError(absl::StrFormat("%s/%s: SHA-256 is %s..., MANIFEST says %s...",
                                                 dir, name, found.substr(0, 12),
                                                 expected.substr(0, 12)));
    }
  }
  return static_cast<int>(manifest.size());
}

}  // namespace mobi
