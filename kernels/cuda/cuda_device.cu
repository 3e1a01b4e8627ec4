#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/cuda/cuda_device.h"

namespace mobi::cuda {
namespace {

constexpr int kLeastCapability = 80;

// Stands for all kernels: is there code for this device in the build?
__global__ void ProbeKernel() {}

std::string VersionText(int version) {
  return absl::StrFormat("%d.%d", version / 1000, version % 1000 / 10);
}

absl::StatusOr<int> CountDevices(const DeviceInfo& info) {
  if (info.driver_version == 0) {
    return absl::UnavailableError("CUDA: no NVIDIA driver on this machine");
  }
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    return absl::FailedPreconditionError(
        absl::StrCat("CUDA: the driver serves CUDA ", VersionText(info.driver_version),
                     ", this build needs ", VersionText(info.runtime_version),
                     "; install a newer driver or build with an older toolkit"));
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    return absl::UnavailableError("CUDA: no GPU on this machine");
  }
  if (error != cudaSuccess) {
    return absl::UnavailableError(
        absl::StrCat("CUDA: ", cudaGetErrorName(error), ": ", cudaGetErrorString(error)));
  }
  return count;
}

}  // namespace

absl::StatusOr<DeviceInfo> OpenDevice(int device) {
  DeviceInfo info;
  info.device = device;
  if (cudaDriverGetVersion(&info.driver_version) != cudaSuccess ||
      cudaRuntimeGetVersion(&info.runtime_version) != cudaSuccess) {
    return absl::UnavailableError("CUDA: the versions of driver and runtime cannot be read");
  }
  const absl::StatusOr<int> count = CountDevices(info);
  if (!count.ok()) return count.status();
  if (device < 0 || device >= *count) {
    return absl::UnavailableError(
        absl::StrCat("CUDA: no device ", device, "; this machine has ", *count));
  }
  cudaDeviceProp properties;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, device);
  if (error == cudaSuccess) error = cudaFree(nullptr);  // the context, or why there is none
  if (error != cudaSuccess) {
    return absl::UnavailableError(absl::StrCat(
        "CUDA: device ", device, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error)));
  }
  info.name = properties.name;
  info.compute_capability = 10 * properties.major + properties.minor;
  info.num_sms = properties.multiProcessorCount;
  info.total_memory = properties.totalGlobalMem;
  cudaFuncAttributes attributes;
  if (info.compute_capability < kLeastCapability ||
      cudaFuncGetAttributes(&attributes, ProbeKernel) != cudaSuccess) {
    return absl::FailedPreconditionError(
        absl::StrFormat("CUDA: device %d (%s, compute capability %d.%d) is not supported by this "
                        "build, which needs 8.0 or newer and code for that architecture",
                        device, info.name, properties.major, properties.minor));
  }
  return info;
}

}  // namespace mobi::cuda
