#include "kernels/create_backend.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace mobi {

absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(std::string_view device, int num_threads) {
  if (device == "cuda") return CreateCudaBackend({});
  if (device == "auto") {
    auto cuda = CreateCudaBackend({});
    if (cuda.ok()) return cuda;
  } else if (device != "cpu") {
    return absl::InvalidArgumentError(
        absl::StrCat("device: \"", std::string(device), "\" is none of auto, cpu and cuda"));
  }
  CpuOptions cpu;
  cpu.num_threads = num_threads;
  return CreateCpuBackend(cpu);
}

}  // namespace mobi
