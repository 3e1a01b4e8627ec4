// The driver's functions, asked for at run time, so that a program links and starts without a
// driver.
#ifndef MOBI_KERNELS_CUDA_DRIVER_H_
#define MOBI_KERNELS_CUDA_DRIVER_H_

#include <cuda.h>
#include <cuda_runtime.h>

namespace mobi::cuda {

// since: the CUDA version that brought the function, with the signature that it has since, as
// 1000 * major + 10 * minor. False: this driver does not have it.
template <typename Function>
bool FindInDriver(const char* name, unsigned int since, Function*& function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, since, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // reported here
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return false;
  function = reinterpret_cast<Function*>(found);
  return true;
}

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_DRIVER_H_
