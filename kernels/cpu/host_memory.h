// Host memory for the CPU backend: aligned, faulted in when allocated so that a step never is, and
// honest about how much the process may still take (cgroup limits included). Thread-safe.
#ifndef MOBI_KERNELS_CPU_HOST_MEMORY_H_
#define MOBI_KERNELS_CPU_HOST_MEMORY_H_

#include <cstddef>
#include <string_view>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace mobi {

MemoryInfo HostMemoryInfo();

// RESOURCE_EXHAUSTED names `what`, the bytes asked and the bytes free. Never null, even for 0
// bytes.
absl::StatusOr<void*> AllocateHost(size_t bytes, std::string_view what);
void FreeHost(void* data);

// Addresses without memory, for pages that come (zeroed) and go; touching one that is away is a
// fault of the process. RESOURCE_EXHAUSTED as above.
absl::StatusOr<void*> ReserveHost(size_t bytes, std::string_view what);
absl::Status CommitHost(void* at, size_t bytes, std::string_view what);
void DecommitHost(void* at, size_t bytes);
void UnreserveHost(void* data, size_t bytes);
size_t HostPageBytes();

// Cores that this process may use: its affinity mask, cut down to its cgroup's quota.
int NumUsableCores();

}  // namespace mobi

#endif  // MOBI_KERNELS_CPU_HOST_MEMORY_H_
