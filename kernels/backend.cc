#include "kernels/backend.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

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

absl::StatusOr<Buffer> Backend::Reserve(size_t, std::string_view what) {
  return absl::UnimplementedError(absl::StrCat(std::string(what), ": memory of the ",
                                               std::string(name()), " backend cannot come and go"));
}

absl::Status Backend::Commit(void*, size_t, std::string_view what) {
  return Reserve(0, what).status();
}

void Backend::Decommit(void*, size_t) {}

#ifndef MOBI_WITH_CUDA
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaOptions&) {
  return absl::UnavailableError("this build has no CUDA; rebuild on a machine with nvcc");
}
#endif

}  // namespace mobi
