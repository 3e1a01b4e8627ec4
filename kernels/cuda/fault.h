// The first failure of a device, kept: after it every op is a no-op and Synchronize reports it.
// One thread.
#ifndef MOBI_KERNELS_CUDA_FAULT_H_
#define MOBI_KERNELS_CUDA_FAULT_H_

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace mobi::cuda {

class Fault {
 public:
  bool ok() const { return status_.ok(); }
  const absl::Status& status() const { return status_; }

  void Set(const absl::Status& status) { status_.Update(status); }
  // True when the call named `what` went well.
  bool Check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return true;
    Set(absl::InternalError(absl::StrCat("CUDA: ", what, ": ", cudaGetErrorName(error), ": ",
                                         cudaGetErrorString(error))));
    return false;
  }
  bool Check(cublasStatus_t error, const char* what) {
    if (error == CUBLAS_STATUS_SUCCESS) return true;
    Set(absl::InternalError(
        absl::StrCat("cuBLAS: ", what, ": ", "status ", static_cast<int>(error))));
    return false;
  }
  // A call of an op that its kernels cannot serve.
  bool Require(bool condition, const char* what) {
    if (!condition) Set(absl::InternalError(absl::StrCat("CUDA backend: ", what)));
    return condition;
  }

 private:
  absl::Status status_;
};

}  // namespace mobi::cuda

#endif  // MOBI_KERNELS_CUDA_FAULT_H_
