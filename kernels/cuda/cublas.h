// cuBLAS for the dense products of float models, loaded when one is first asked for: it is 600 MB
// that quantized models never need, and its thread-local storage, if linked, does not leave the
// small stacks of other libraries' threads their room. One thread.
#ifndef MOBI_KERNELS_CUDA_CUBLAS_H_
#define MOBI_KERNELS_CUDA_CUBLAS_H_

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <memory>

#include "kernels/tensor.h"

namespace mobi::cuda {

class Cublas {
 public:
  // Null where the library of this build's CUDA version is not found or does not start.
  static std::unique_ptr<Cublas> Load(cudaStream_t stream);
  ~Cublas();
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  // out = x weight^T, all three of one 16-bit type, summed in fp32.
  cublasStatus_t Matmul(const Tensor& x, const Tensor& weight, const Tensor& out);

 private:
  // cublasGemmEx, of which the header has another overload.
  using GemmEx = cublasStatus_t(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int,
                                const void*, const void*, cudaDataType, int, const void*,
                                cudaDataType, int, const void*, void*, cudaDataType, int,
                                cublasComputeType_t, cublasGemmAlgo_t);

  Cublas() = default;
  bool Start(cudaStream_t stream);

  void* library_ = nullptr;
  void* workspace_ = nullptr;
  cublasHandle_t handle_ = nullptr;
  decltype(&cublasDestroy) destroy_ = nullptr;
  GemmEx* gemm_ = nullptr;
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_CUBLAS_H_
