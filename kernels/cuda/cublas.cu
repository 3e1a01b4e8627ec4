#include <dlfcn.h>

#include <string>

#include "kernels/cuda/cublas.h"

namespace mobi::cuda {
namespace {

// cuBLAS's own advice for Hopper; it must not allocate during a step.
constexpr size_t kWorkspaceBytes = size_t{32} << 20;

// The library's header spells some functions as macros of their second version.
#define MOBI_QUOTE(name) #name
#define MOBI_SYMBOL(name) MOBI_QUOTE(name)

template <typename Function>
bool Find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

std::unique_ptr<Cublas> Cublas::Load(cudaStream_t stream) {
  std::unique_ptr<Cublas> cublas(new Cublas);
  if (cublas->Start(stream)) return cublas;
  cudaGetLastError();  // what failed is not the caller's concern
  return nullptr;
}

bool Cublas::Start(cudaStream_t stream) {
  const std::string name = "libcublas.so." + std::to_string(CUBLAS_VER_MAJOR);
  library_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library_ == nullptr) return false;
  decltype(&cublasCreate) create;
  decltype(&cublasSetStream) set_stream;
  decltype(&cublasSetWorkspace) set_workspace;
  decltype(&cublasSetMathMode) set_math_mode;
  return Find(library_, MOBI_SYMBOL(cublasDestroy), destroy_) &&
         Find(library_, MOBI_SYMBOL(cublasGemmEx), gemm_) &&
         Find(library_, MOBI_SYMBOL(cublasCreate), create) &&
         Find(library_, MOBI_SYMBOL(cublasSetStream), set_stream) &&
         Find(library_, MOBI_SYMBOL(cublasSetWorkspace), set_workspace) &&
         Find(library_, MOBI_SYMBOL(cublasSetMathMode), set_math_mode) &&
         create(&handle_) == CUBLAS_STATUS_SUCCESS &&
         cudaMalloc(&workspace_, kWorkspaceBytes) == cudaSuccess &&
         set_stream(handle_, stream) == CUBLAS_STATUS_SUCCESS &&
         set_workspace(handle_, workspace_, kWorkspaceBytes) == CUBLAS_STATUS_SUCCESS &&
         set_math_mode(handle_, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION) ==
             CUBLAS_STATUS_SUCCESS;
}

Cublas::~Cublas() {
  if (handle_ != nullptr) destroy_(handle_);
  cudaFree(workspace_);
  // The library stays loaded: it has registered what runs when the process ends.
}

cublasStatus_t Cublas::Matmul(const Tensor& x, const Tensor& weight, const Tensor& out) {
  const cudaDataType_t type = x.dtype == DType::kF16 ? CUDA_R_16F : CUDA_R_16BF;
  const float one = 1, zero = 0;
  // cuBLAS counts columns first: out^T [rows, tokens] = weight x^T.
  return gemm_(handle_, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(weight.rows),
               static_cast<int>(out.rows), static_cast<int>(weight.cols), &one, weight.data, type,
               static_cast<int>(weight.stride), x.data, type, static_cast<int>(x.stride), &zero,
               out.data, type, static_cast<int>(out.stride), CUBLAS_COMPUTE_32F,
               CUBLAS_GEMM_DEFAULT);
}

}  // namespace mobi::cuda
