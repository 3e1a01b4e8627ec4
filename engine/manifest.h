// MANIFEST: the SHA-256 of every file of a checkpoint folder, in the format of sha256sum, so that
// `sha256sum -c MANIFEST` checks it too. Pure functions on the file system.
#ifndef MOBI_ENGINE_MANIFEST_H_
#define MOBI_ENGINE_MANIFEST_H_

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace mobi {

inline constexpr char kManifestName[] = "MANIFEST";
// Tokenizer, configuration, licence.
inline constexpr uint64_t kMaxSideFileBytes = 256 << 20;

// True for a name that stays in its folder: not empty, no '/', not "." or "..".
bool IsPlainFileName(std::string_view name);

// Hashes every regular file in DIR and writes DIR/MANIFEST, fsynced.
absl::Status WriteManifest(const std::string& dir);

// Hears how many bytes are hashed of all that there are; called by one thread at a time.
using HashProgress = std::function<void(uint64_t done, uint64_t total)>;

// Compares DIR with DIR/MANIFEST, reading every file it names, several at once where there are
// cores for it; returns their number. `files` are names that must be among them; of those, weights
// may have any size, and no other file may be longer than kMaxSideFileBytes. NOT_FOUND: no MANIFEST
// or a file of it is missing; INVALID_ARGUMENT: a broken line, a name outside the folder, one of
// `files` not covered, a file too long; DATA_LOSS: a file does not match.
absl::StatusOr<int> VerifyManifest(const std::string& dir, absl::Span<const std::string> files,
                                   const HashProgress& progress = nullptr);

}  // namespace mobi

#endif  // MOBI_ENGINE_MANIFEST_H_
