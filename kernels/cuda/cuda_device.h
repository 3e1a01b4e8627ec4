// Choosing a CUDA device and saying clearly why one cannot be used. Called once, at start.
#ifndef MOBI_KERNELS_CUDA_CUDA_DEVICE_H_
#define MOBI_KERNELS_CUDA_CUDA_DEVICE_H_

#include <string>

#include "absl/status/statusor.h"

namespace mobi::cuda {

struct DeviceInfo {
  int device = 0;
  std::string name;
  int compute_capability = 0;  // 10 * major + minor
  int num_sms = 0;
  size_t total_memory = 0;
  int driver_version = 0;   // 1000 * major + 10 * minor, of the newest CUDA that the driver serves
  int runtime_version = 0;  // of this build
};

// Makes `device` current on this thread. UNAVAILABLE: no driver or no such device.
// FAILED_PRECONDITION: the driver is too old for this build, or the build has no code for the
// device.
absl::StatusOr<DeviceInfo> OpenDevice(int device);

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_CUDA_DEVICE_H_
