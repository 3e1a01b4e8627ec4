#include <algorithm>

#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/driver.h"

namespace mobi::cuda {
namespace {

template <typename Function>
bool Find(const char* name, Function*& function) {
  return FindInDriver(name, 10020, function);
}

// The driver's errors have the runtime's numbers.
cudaError_t Error(CUresult result) { return static_cast<cudaError_t>(result); }

uintptr_t AddressOf(const void* at) { return reinterpret_cast<uintptr_t>(at); }

}  // namespace

bool DeviceMemory::FindDriver() {
  return Find("cuDeviceGetAttribute", driver_.get_attribute) &&
         Find("cuMemGetAllocationGranularity", driver_.get_granularity) &&
         Find("cuMemAddressReserve", driver_.reserve) && Find("cuMemAddressFree", driver_.free) &&
         Find("cuMemCreate", driver_.create) && Find("cuMemRelease", driver_.release) &&
         Find("cuMemMap", driver_.map) && Find("cuMemUnmap", driver_.unmap) &&
         Find("cuMemSetAccess", driver_.set_access);
}

cudaError_t DeviceMemory::Create(int device) {
  int supported = 0;
  if (!FindDriver() ||
      driver_.get_attribute(&supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
                            device) != CUDA_SUCCESS ||
      supported == 0) {
    return cudaSuccess;
  }
  properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties_.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
  return Error(
      driver_.get_granularity(&page_bytes_, &properties_, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
}

cudaError_t DeviceMemory::Reserve(size_t bytes, void** data) {
  const size_t pages = std::max<size_t>(1, (bytes + page_bytes_ - 1) / page_bytes_);
  CUdeviceptr address = 0;
  const CUresult result = driver_.reserve(&address, pages * page_bytes_, page_bytes_, 0, 0);
  if (result != CUDA_SUCCESS) return Error(result);
  reservations_.emplace(address, pages * page_bytes_);
  *data = reinterpret_cast<void*>(address);
  return cudaSuccess;
}

cudaError_t DeviceMemory::Commit(void* at, size_t bytes) {
  const uintptr_t address = AddressOf(at);
  if (bytes == 0) return cudaSuccess;
  CUmemGenericAllocationHandle memory;
  CUresult result = driver_.create(&memory, bytes, &properties_, 0);
  if (result != CUDA_SUCCESS) return Error(result);
  result = driver_.map(address, bytes, 0, memory, 0);
  driver_.release(memory);  // it lives as long as its mapping
  if (result != CUDA_SUCCESS) return Error(result);
  const CUmemAccessDesc access = {.location = properties_.location,
                                  .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  result = driver_.set_access(address, bytes, &access, 1);
  if (result != CUDA_SUCCESS) {
    driver_.unmap(address, bytes);
    return Error(result);
  }
  commits_.emplace(address, bytes);
  return cudaSuccess;
}

cudaError_t DeviceMemory::Decommit(void* at, size_t bytes) {
  const uintptr_t end = AddressOf(at) + bytes;
  uintptr_t next = AddressOf(at);
  const auto first = commits_.find(next);
  auto last = first;
  for (; last != commits_.end() && last->first == next && next < end; ++last) next += last->second;
  if (next != end) return cudaErrorInvalidValue;
  if (bytes == 0) return cudaSuccess;
  commits_.erase(first, last);
  return Error(driver_.unmap(AddressOf(at), bytes));
}

bool DeviceMemory::Free(void* data) {
  const auto reservation = reservations_.find(AddressOf(data));
  if (reservation == reservations_.end()) return false;
  const auto [begin, bytes] = *reservation;
  // Errors can only be an earlier fault's.
  const auto first = commits_.lower_bound(begin), last = commits_.lower_bound(begin + bytes);
  for (auto commit = first; commit != last; ++commit) driver_.unmap(commit->first, commit->second);
  commits_.erase(first, last);
  driver_.free(begin, bytes);
  reservations_.erase(reservation);
  return true;
}

}  // namespace mobi::cuda
