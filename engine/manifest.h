// MANIFEST: the SHA-256 of every file of a checkpoint folder, in the format of sha256sum, so that
// `sha256sum -c MANIFEST` checks it too. Pure functions on the file system.
#ifndef MOBI_ENGINE_MANIFEST_H_
#define MOBI_ENGINE_MANIFEST_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/base/file_stream.h"

namespace mobi {

inline constexpr char kManifestName[] = "MANIFEST";
// Tokenizer, configuration, licence.
inline constexpr uint64_t kMaxSideFileBytes = 256 << 20;

// True for a name that stays in its folder: not empty, no '/', not "." or "..".
bool IsPlainFileName(std::string_view name);

// Hashes every regular file in DIR and writes DIR/MANIFEST, fsynced.
absl::Status WriteManifest(const std::string& dir);

// Takes a piece of the file `name`, as PieceSink does.
using ManifestSink = absl::FunctionRef<void(std::string_view name, uint64_t offset,
                                            absl::Span<const std::byte> bytes)>;

// Compares DIR with DIR/MANIFEST, reading every file it names once, and returns their number; what
// is read passes through `sink`. `files` are names that must be among them; of those, weights may
// have any size, and no other file may be longer than kMaxSideFileBytes. NOT_FOUND: no MANIFEST or
// a file of it is missing; INVALID_ARGUMENT: a broken line, a name outside the folder, one of
// `files` not covered, a file too long; DATA_LOSS: a file does not match.
absl::StatusOr<int> VerifyManifest(const std::string& dir, absl::Span<const std::string> files,
                                   const StreamOptions& options, ManifestSink sink);

}  // namespace mobi

#endif  // MOBI_ENGINE_MANIFEST_H_
