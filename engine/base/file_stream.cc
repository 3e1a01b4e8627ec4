#include "engine/base/file_stream.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "engine/base/file_reader.h"
#include "engine/base/mutex.h"
#include "engine/base/sha256.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr size_t kPieceBytes = size_t{4} << 20;  // disks are slower at less
constexpr size_t kHugePage = size_t{2} << 20;
// Threads beside those that keep the cores busy: reading from a disk is waiting.
constexpr size_t kReaders = 4;
constexpr size_t kMaxThreads = 24;

struct Piece {
  std::byte* data = nullptr;
  size_t file = 0;
  uint64_t offset = 0;
  size_t size = 0;
};

struct File {
  explicit File(FileReader opened) : reader(std::move(opened)) {}

  FileReader reader;
  Sha256 hash;
  uint64_t next_read = 0;
  uint64_t next_hash = 0;
  bool hashing = false;
  int pieces_out = 0;
  std::map<uint64_t, Piece> unhashed;  // by offset
};

class Stream {
 public:
  Stream(std::vector<File> files, const StreamOptions& options, PieceSink sink)
      : options_(options), sink_(sink), files_(std::move(files)) {
    for (const File& file : files_) total_ += file.reader.size();
  }

  absl::Status Run() {
    const size_t pieces = total_ / kPieceBytes + files_.size();
    const size_t cores = std::max(1u, std::thread::hardware_concurrency());
    const size_t threads = std::min({cores + kReaders, kMaxThreads, pieces});
    const size_t buffers = std::min(2 * threads, pieces);
    const std::unique_ptr<std::byte, decltype(&std::free)> room(
        static_cast<std::byte*>(std::aligned_alloc(kHugePage, buffers * kPieceBytes)), &std::free);
    if (room == nullptr) return absl::ResourceExhaustedError("no memory to read files into");
    madvise(room.get(), buffers * kPieceBytes, MADV_HUGEPAGE);
    for (size_t i = 0; i < buffers; ++i) free_.push_back(room.get() + i * kPieceBytes);
    std::vector<std::thread> others(threads - 1);
    for (std::thread& thread : others) thread = std::thread([this] { Work(); });
    Work();
    for (std::thread& thread : others) thread.join();
    MutexLock lock(mutex_);
    return status_;
  }

  std::string HexDigest(size_t file) { return files_[file].hash.HexDigest(); }

 private:
  // What brings buffers back goes first, and what fills them last.
  void Work() {
    MutexLock lock(mutex_);
    while (status_.ok() && done_ < total_) {
      if (!ready_.empty()) {
        Give();
      } else if (File* const hashable = ToHash()) {
        Hash(*hashable);
      } else if (File* const readable = ToRead()) {
        Read(*readable);
      } else {
        changed_.Wait(mutex_);
        continue;
      }
      changed_.NotifyAll();
    }
  }

  void Give() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const Piece piece = ready_.front();
    ready_.pop_front();
    mutex_.Unlock();
    sink_(piece.file, piece.offset, {piece.data, piece.size});
    mutex_.Lock();
    --files_[piece.file].pieces_out;
    free_.push_back(piece.data);
    done_ += piece.size;
    if (options_.progress) options_.progress(done_, total_);
  }

  File* ToHash() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (File& file : files_) {
      if (!file.hashing && file.unhashed.count(file.next_hash) > 0) return &file;
    }
    return nullptr;
  }

  void Hash(File& file) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const Piece piece = file.unhashed.extract(file.next_hash).mapped();
    file.hashing = true;
    mutex_.Unlock();
    file.hash.Update({piece.data, piece.size});
    mutex_.Lock();
    file.hashing = false;
    file.next_hash += piece.size;
    ready_.push_back(piece);
  }

  // The file that has the fewest pieces out, so that as many as can be are hashed side by side.
  File* ToRead() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (free_.empty()) return nullptr;
    File* found = nullptr;
    for (File& file : files_) {
      if (file.next_read == file.reader.size()) continue;
      if (found == nullptr || file.pieces_out < found->pieces_out) found = &file;
    }
    return found;
  }

  void Read(File& file) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    Piece piece = {free_.back(), static_cast<size_t>(&file - files_.data()), file.next_read, 0};
    piece.size = std::min<uint64_t>(kPieceBytes, file.reader.size() - file.next_read);
    free_.pop_back();
    file.next_read += piece.size;
    ++file.pieces_out;
    mutex_.Unlock();
    absl::Status status = file.reader.Read(piece.offset, piece.size, piece.data);
    mutex_.Lock();
    status_.Update(std::move(status));
    if (options_.hash) {
      file.unhashed.emplace(piece.offset, piece);
    } else {
      ready_.push_back(piece);
    }
  }

  const StreamOptions& options_;
  const PieceSink sink_;
  Mutex mutex_;
  CondVar changed_;
  std::vector<File> files_;  // readers of any thread, hashes of the one that hashes; rest: mutex_
  std::vector<std::byte*> free_ ABSL_GUARDED_BY(mutex_);
  std::deque<Piece> ready_ ABSL_GUARDED_BY(mutex_);  // read, and hashed where that is wanted
  uint64_t total_ = 0;
  uint64_t done_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::Status StreamFiles(absl::Span<StreamedFile> files, const StreamOptions& options,
                         PieceSink sink) {
  std::vector<File> opened;
  for (const StreamedFile& file : files) {
    MOBI_ASSIGN_OR_RETURN(FileReader reader,
                          FileReader::Open(file.path, file.max_bytes, options.direct));
    opened.emplace_back(std::move(reader));
  }
  if (opened.empty()) return absl::OkStatus();
  Stream stream(std::move(opened), options, sink);
  MOBI_RETURN_IF_ERROR(stream.Run());
  if (!options.hash) return absl::OkStatus();
  for (size_t i = 0; i < files.size(); ++i) files[i].sha256 = stream.HexDigest(i);
  return absl::OkStatus();
}

}  // namespace mobi
