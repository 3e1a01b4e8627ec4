// Reads files from begin to end, every byte once: pieces are read several at a time, hashed in
// order, and given to a sink while they are still in the processor's cache. All cores take part, in
// whatever of the three waits; a fixed room of buffers is all the memory that it takes.
#ifndef MOBI_ENGINE_BASE_FILE_STREAM_H_
#define MOBI_ENGINE_BASE_FILE_STREAM_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"

namespace mobi {

struct StreamedFile {
  std::string path;
  uint64_t max_bytes = std::numeric_limits<int64_t>::max();
  std::string sha256 = {};  // comes out, of a stream that hashes
};

struct StreamOptions {
  bool hash = true;
  // Past the page cache where pages are not in it: half the memory that is touched, but the next
  // who reads finds nothing there.
  bool direct = false;
  // Hears how many bytes are done with, of all that there are; called by one thread at a time.
  std::function<void(uint64_t done, uint64_t total)> progress = {};
};

// Takes a piece of files[file]; called by several threads at once, in any order. A piece begins at
// a multiple of 4096 bytes of the file, and so do its bytes in memory.
using PieceSink =
    absl::FunctionRef<void(size_t file, uint64_t offset, absl::Span<const std::byte> bytes)>;

// Errors as MappedFile::Open's and FileReader's; after one, not all has been given to the sink.
absl::Status StreamFiles(absl::Span<StreamedFile> files, const StreamOptions& options,
                         PieceSink sink);

}  // namespace mobi

#endif  // MOBI_ENGINE_BASE_FILE_STREAM_H_
