#include <cublas_v2.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <map>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "peer_linears.h"

namespace mobi {
namespace {

constexpr int kThreads = 256;
constexpr size_t kWorkspaceBytes = size_t{32} << 20;

absl::Status Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("CUDA: ", what, ": ", cudaGetErrorString(error)));
}

absl::Status Check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("cuBLAS: ", what, ": ", cublasGetStatusString(status)));
}

__global__ void FillKernel(half* data, size_t count) {
  for (size_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    const uint32_t hash = static_cast<uint32_t>(i) * 2654435761u;
    data[i] = __float2half(static_cast<float>(hash >> 8) * 0x1p-24f - 0.5f);
  }
}

__global__ void ReadKernel(const uint4* data, size_t count, uint32_t* sink) {
  uint32_t sum = 0;
  for (size_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    const uint4 v = data[i];
    sum |= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x12345678u) *sink = sum;  // keeps the reads
}

class CublasLinears final : public PeerLinears {
 public:
  CublasLinears(const std::vector<MatmulShape>& shapes, int num_layers)
      : shapes_(shapes), num_layers_(num_layers) {}
  ~CublasLinears() override {
    for (const auto& [tokens, graph] : graphs_) cudaGraphExecDestroy(graph);
    if (handle_ != nullptr) cublasDestroy(handle_);
    for (void* data : memory_) cudaFree(data);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  absl::Status Prepare(int max_tokens) {
    MOBI_RETURN_IF_ERROR(Check(cudaStreamCreate(&stream_), "stream"));
    MOBI_RETURN_IF_ERROR(Check(cublasCreate(&handle_), "create"));
    MOBI_ASSIGN_OR_RETURN(void* workspace, Allocate(kWorkspaceBytes));
    MOBI_RETURN_IF_ERROR(Check(cublasSetStream(handle_, stream_), "stream"));
    MOBI_RETURN_IF_ERROR(
        Check(cublasSetWorkspace(handle_, workspace, kWorkspaceBytes), "workspace"));
    int64_t widest = 0, highest = 0;
    for (int i = 0; i < num_layers_; ++i) {
      for (const MatmulShape& shape : shapes_) {
        MOBI_ASSIGN_OR_RETURN(half * weight, Random(shape.rows * shape.cols));
        weights_.push_back(weight);
        widest = std::max(widest, shape.cols);
        highest = std::max(highest, shape.rows);
      }
    }
    MOBI_ASSIGN_OR_RETURN(x_, Random(max_tokens * widest));
    MOBI_ASSIGN_OR_RETURN(out_, Random(max_tokens * highest));
    return Check(cudaStreamSynchronize(stream_), "fill");
  }

  std::string description() const override {
    int version = 0;
    cublasGetVersion(handle_, &version);
    return absl::StrCat("cuBLAS ", version, ", fp16");
  }
  int num_layers() const override { return num_layers_; }
  int bytes_of_weight() const override { return sizeof(half); }

  absl::Status Run(int num_tokens) override {
    cudaGraphExec_t& graph = graphs_[num_tokens];
    if (graph == nullptr) MOBI_RETURN_IF_ERROR(Record(num_tokens, graph));
    MOBI_RETURN_IF_ERROR(Check(cudaGraphLaunch(graph, stream_), "launch"));
    return Check(cudaStreamSynchronize(stream_), "products");
  }

 private:
  absl::StatusOr<void*> Allocate(size_t bytes) {
    void* data = nullptr;
    MOBI_RETURN_IF_ERROR(Check(cudaMalloc(&data, bytes), "memory for the peer"));
    memory_.push_back(data);
    return data;
  }

  absl::StatusOr<half*> Random(size_t count) {
    MOBI_ASSIGN_OR_RETURN(void* data, Allocate(count * sizeof(half)));
    FillKernel<<<1024, kThreads, 0, stream_>>>(static_cast<half*>(data), count);
    MOBI_RETURN_IF_ERROR(Check(cudaGetLastError(), "fill"));
    return static_cast<half*>(data);
  }

  absl::Status Enqueue(int num_tokens) {
    const float one = 1, zero = 0;
    for (size_t i = 0; i < weights_.size(); ++i) {
      const MatmulShape& shape = shapes_[i % shapes_.size()];
      const auto rows = static_cast<int>(shape.rows), cols = static_cast<int>(shape.cols);
      MOBI_RETURN_IF_ERROR(
          Check(cublasGemmEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, rows, num_tokens, cols, &one,
                             weights_[i], CUDA_R_16F, cols, x_, CUDA_R_16F, cols, &zero, out_,
                             CUDA_R_16F, rows, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                "product"));
    }
    return absl::OkStatus();
  }

  absl::Status Record(int num_tokens, cudaGraphExec_t& exec) {
    MOBI_RETURN_IF_ERROR(Enqueue(num_tokens));  // loads kernels
    MOBI_RETURN_IF_ERROR(
        Check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture"));
    const absl::Status enqueued = Enqueue(num_tokens);
    cudaGraph_t graph = nullptr;
    MOBI_RETURN_IF_ERROR(Check(cudaStreamEndCapture(stream_, &graph), "capture"));
    const cudaError_t error = cudaGraphInstantiate(&exec, graph, 0);
    cudaGraphDestroy(graph);
    MOBI_RETURN_IF_ERROR(enqueued);
    return Check(error, "graph");
  }

  const std::vector<MatmulShape> shapes_;
  const int num_layers_;
  cudaStream_t stream_ = nullptr;
  cublasHandle_t handle_ = nullptr;
  std::vector<void*> memory_;
  std::vector<const half*> weights_;
  half *x_ = nullptr, *out_ = nullptr;
  std::map<int, cudaGraphExec_t> graphs_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<PeerLinears>> CreateCublas(const std::vector<MatmulShape>& shapes,
                                                          int num_layers, int max_tokens) {
  auto peer = std::make_unique<CublasLinears>(shapes, num_layers);
  MOBI_RETURN_IF_ERROR(peer->Prepare(max_tokens));
  return peer;
}

absl::StatusOr<double> CudaReadBytesPerSecond() {
  constexpr size_t kBytes = size_t{2} << 30;
  constexpr int kRuns = 20;
  uint4* data = nullptr;
  MOBI_RETURN_IF_ERROR(Check(cudaMalloc(&data, kBytes), "memory to read"));
  FillKernel<<<1024, kThreads>>>(reinterpret_cast<half*>(data), kBytes / sizeof(half));
  cudaEvent_t begin, end;
  float best_ms = 0;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  for (int i = 0; i < kRuns; ++i) {
    cudaEventRecord(begin);
    ReadKernel<<<132 * 8, kThreads>>>(data, kBytes / sizeof(uint4),
                                      reinterpret_cast<uint32_t*>(data));
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    if (i == 0 || ms < best_ms) best_ms = ms;
  }
  const cudaError_t error = cudaGetLastError();
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaFree(data);
  MOBI_RETURN_IF_ERROR(Check(error, "read"));
  return static_cast<double>(kBytes) / (best_ms * 1e-3);
}

}  // namespace mobi
