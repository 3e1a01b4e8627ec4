// Device memory that comes and goes behind addresses that stay: CUDA's virtual memory management.
// One thread; the caller sees to it that nothing on the device uses what goes. Errors are CUDA's
// own.
#ifndef MOBI_KERNELS_CUDA_DEVICE_MEMORY_H_
#define MOBI_KERNELS_CUDA_DEVICE_MEMORY_H_

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>

namespace mobi::cuda {

class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // Success also where the driver or the device cannot: then supported() is false.
  cudaError_t Create(int device);
  bool supported() const { return page_bytes_ > 1; }
  size_t page_bytes() const { return page_bytes_; }

  // cudaErrorMemoryAllocation: there are no such addresses.
  cudaError_t Reserve(size_t bytes, void** data);
  // Memory of undefined contents behind whole pages. cudaErrorMemoryAllocation: there is no more.
  cudaError_t Commit(void* at, size_t bytes);
  // cudaErrorInvalidValue, and nothing changes, unless the range is made of whole commits.
  cudaError_t Decommit(void* at, size_t bytes);
  // The reservation and all memory in it; false when `data` is none.
  bool Free(void* data);

 private:
  struct Driver {
    decltype(&cuDeviceGetAttribute) get_attribute;
    decltype(&cuMemGetAllocationGranularity) get_granularity;
    decltype(&cuMemAddressReserve) reserve;
    decltype(&cuMemAddressFree) free;
    decltype(&cuMemCreate) create;
    decltype(&cuMemRelease) release;
    decltype(&cuMemMap) map;
    decltype(&cuMemUnmap) unmap;
    decltype(&cuMemSetAccess) set_access;
  };

  bool FindDriver();

  Driver driver_{};
  CUmemAllocationProp properties_{};
  size_t page_bytes_ = 1;
  std::map<uintptr_t, size_t> reservations_;  // address and bytes
  std::map<uintptr_t, size_t> commits_;       // each one piece of memory, mapped as a whole
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_DEVICE_MEMORY_H_
