#include "kernels/backend.h"

#include <utility>

namespace mobi {

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this != &other) {
    Reset();
    backend_ = std::exchange(other.backend_, nullptr);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

void Buffer::Reset() {
  if (data_ != nullptr) backend_->Free(data_);
  data_ = nullptr;
}

#ifndef MOBI_WITH_CUDA
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaOptions&) {
  return absl::UnavailableError("this build has no CUDA; rebuild on a machine with nvcc");
}
#endif

}  // namespace mobi
