#include "calibrator/matrix.h"

#include <malloc.h>
#include <sys/mman.h>

#include <limits>
#include <new>

namespace mobi {

void* AllocateLargePages(size_t bytes) {
  constexpr size_t kPage = size_t{2} << 20;
  const bool large = bytes >= 2 * kPage;
  void* memory =
      large ? std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage) : std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  // A wish: where the system has no large pages it goes on with small ones.
  if (large) madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
}

void KeepFreedMemory() {
  mallopt(M_ARENA_MAX, 1);  // others give back what they are made of
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
}

}  // namespace mobi
