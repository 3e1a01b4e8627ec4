#include "kernels/cpu/host_memory.h"

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace mobi {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kHugePage = size_t{2} << 20;

std::optional<size_t> ReadNumber(const std::string& file) {
  std::ifstream in(file);
  std::string word;
  uint64_t value;
  if (!(in >> word) || !absl::SimpleAtoi(word, &value)) return std::nullopt;  // "max": no limit
  return value;
}

// In bytes; 0 when the kernel does not say.
size_t MemInfoField(std::string_view field) {
  std::ifstream in("/proc/meminfo");
  std::string name, unit;
  size_t kilobytes;
  while (in >> name >> kilobytes) {
    std::getline(in, unit);
    if (name == field) return kilobytes * 1024;
  }
  return 0;
}

// Fault the pages in now, on all cores: zeroing memory is slower than some disks are. Kernels
// before 5.14 do not know the request; they fault later.
void Populate(std::byte* data, size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  constexpr size_t kGrain = 64 * kHugePage;
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t at = next.fetch_add(kGrain); at < bytes; at = next.fetch_add(kGrain)) {
      madvise(data + at, std::min(kGrain, bytes - at), MADV_POPULATE_WRITE);
    }
  };
  const size_t pieces = (bytes + kGrain - 1) / kGrain;
  std::vector<std::thread> others(std::min<size_t>(NumUsableCores(), pieces) - 1);
  for (std::thread& thread : others) thread = std::thread(work);
  work();
  for (std::thread& thread : others) thread.join();
#else
  (void)data;
  (void)bytes;
#endif
}

absl::Status OutOfMemory(std::string_view what, size_t bytes, size_t free) {
  return absl::ResourceExhaustedError(
      absl::StrCat(std::string(what), ": ", bytes, " bytes of host memory asked, ", free, " free"));
}

}  // namespace

MemoryInfo HostMemoryInfo() {
  MemoryInfo info{MemInfoField("MemTotal:"), MemInfoField("MemAvailable:")};
  const std::string group = "/sys/fs/cgroup/";
  if (const auto limit = ReadNumber(group + "memory.max"); limit && *limit < info.total) {
    info.total = *limit;
    const size_t used = ReadNumber(group + "memory.current").value_or(0);
    info.free = std::min(info.free, *limit - std::min(*limit, used));
  }
  return info;
}

absl::StatusOr<void*> AllocateHost(size_t bytes, std::string_view what) {
  const size_t free = HostMemoryInfo().free;
  const size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
  void* data = nullptr;
  if (bytes <= free && bytes <= std::numeric_limits<size_t>::max() - alignment) {
    const size_t rounded = std::max((bytes + alignment - 1) / alignment, size_t{1}) * alignment;
    data = std::aligned_alloc(alignment, rounded);
    if (data != nullptr && alignment == kHugePage) {
      madvise(data, rounded, MADV_HUGEPAGE);
      Populate(static_cast<std::byte*>(data), rounded);
    }
  }
  if (data == nullptr) return OutOfMemory(what, bytes, free);
  return data;
}

void FreeHost(void* data) { std::free(data); }

size_t HostPageBytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

absl::StatusOr<void*> ReserveHost(size_t bytes, std::string_view what) {
  // Room to begin at a huge page.
  const size_t size = bytes + kHugePage;
  void* data = size < bytes ? MAP_FAILED
                            : mmap(nullptr, size, PROT_NONE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) return OutOfMemory(what, bytes, HostMemoryInfo().free);
  auto* begin = static_cast<std::byte*>(data);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(data) % kHugePage) % kHugePage;
  const size_t page = HostPageBytes();
  const size_t kept = std::max(page, (bytes + page - 1) / page * page);
  if (before > 0) munmap(begin, before);
  munmap(begin + before + kept, (size + page - 1) / page * page - before - kept);
  return begin + before;
}

absl::Status CommitHost(void* at, size_t bytes, std::string_view what) {
  const size_t free = HostMemoryInfo().free;
  if (bytes > free || mprotect(at, bytes, PROT_READ | PROT_WRITE) != 0) {
    return OutOfMemory(what, bytes, free);
  }
  if (bytes >= kHugePage) madvise(at, bytes, MADV_HUGEPAGE);
  return absl::OkStatus();
}

void DecommitHost(void* at, size_t bytes) {
  // A fresh mapping in place of the old one: its pages and its claim on memory are gone at once.
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(at, bytes, PROT_NONE, flags, -1, 0) != MAP_FAILED) return;
  // No room for another mapping: zeroed pages that can be read are the next best.
  madvise(at, bytes, MADV_DONTNEED);
}

void UnreserveHost(void* data, size_t bytes) { munmap(data, std::max(bytes, size_t{1})); }

int NumUsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cores = sched_getaffinity(0, sizeof(set), &set) == 0
                  ? CPU_COUNT(&set)
                  : static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  std::ifstream in("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  uint64_t microseconds;
  if (in >> quota >> period && absl::SimpleAtoi(quota, &microseconds) && period > 0) {
    cores =
        std::min(cores, static_cast<int>(std::ceil(static_cast<double>(microseconds) / period)));
  }
  return std::max(cores, 1);
}

}  // namespace mobi
