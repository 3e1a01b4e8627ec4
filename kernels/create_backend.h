// The backend that a person names on a command line.
#ifndef MOBI_KERNELS_CREATE_BACKEND_H_
#define MOBI_KERNELS_CREATE_BACKEND_H_

#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace mobi {

// "cpu", "cuda", or "auto" for CUDA where it works. INVALID_ARGUMENT: another name; otherwise as
// CreateCudaBackend.
absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(std::string_view device, int num_threads);

}  // namespace mobi

#endif  // MOBI_KERNELS_CREATE_BACKEND_H_
